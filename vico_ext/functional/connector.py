"""The connectors: normalised shuffle, projections with fused epilogues, and the packed order of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vico_ext.functional.folded import FoldedLinear, FoldedWeights, first_layer, runs_folded
from vico_ext.functional.router import _cast
from vico_ext.functional.shuffle import normalized_shuffle
from vico_ext.ops.call import call, refuse_gradient
from vico_ext.routing import RoutingPlan

__all__ = ["bias_gelu", "connector", "pack_tokens", "pack_tokens_"]

PROJECTIONS = ("torch", "fused", "folded")

# Names of the released checkpoints: LayerNorm, then the Linears, of the connector at each rate.
_FULL = ("mlp1.0", "mlp1.1", "mlp1.3")
_COMPRESSED = ("mlp2.0", "mlp2.1", "mlp2.4", "mlp2.7")


def _dropout_seed(dropout_p: float, training: bool, device: torch.device) -> Tensor | None:
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    if not training or dropout_p == 0:
        return None
    # From torch's default generator: torch.manual_seed governs it, and activation checkpointing restores it. On the
    # device of the tensors, so that a CUDA graph draws anew in every replay.
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, dropout_p: float = 0.0, training: bool = False) -> Tensor:
    """dropout(gelu(x + bias)) in one pass, with the exact GELU z Phi(z).

    Equivalent to ``F.dropout(F.gelu(x + bias), dropout_p, training)``; the mask is drawn by Philox4x32-10 and drawn
    again, not stored, for the backward pass.

    Args:
        x: ``[..., H]``.
        bias: ``[H]``, dtype of ``x``, or float32 beside 16-bit ``x``; or None.
        dropout_p: probability of an element becoming zero; the others are scaled by 1 / (1 - dropout_p).
        training: whether dropout is applied.

    Returns:
        Shape and dtype of ``x``, contiguous.

    Raises:
        ValueError: ``dropout_p`` is no probability.
    """
    seed = _dropout_seed(dropout_p, training, x.device)
    return call(torch.ops.vico.bias_gelu, x, bias, seed, 0.0 if seed is None else dropout_p)


def _bias_gelu_of_temporary(x: Tensor, bias: Tensor, dropout_p: float, training: bool) -> Tensor:
    """:func:`bias_gelu` of a tensor that nobody else holds: in place, unless a gradient needs its old values."""
    if torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad):
        return bias_gelu(x, bias, dropout_p=dropout_p, training=training)
    seed = _dropout_seed(dropout_p, training, x.device)
    call(torch.ops.vico.bias_gelu_, x, bias, seed, 0.0 if seed is None else dropout_p)
    return x


def pack_tokens(
    full: Tensor,
    compressed: Tensor,
    plan: RoutingPlan,
    full_bias: Tensor | None = None,
    compressed_bias: Tensor | None = None,
) -> Tensor:
    """Both connectors' tokens, each plus its bias, as one packed sequence in tile order.

    Args:
        full: ``[F, n, H]``, tokens of the tiles that stay whole, in the order of ``plan.order``.
        compressed: ``[K, m, H]``, tokens of the compressed tiles, likewise; dtype of ``full``.
        plan: the routing plan of these F + K tiles.
        full_bias: ``[H]`` added to the rows of ``full``, in their dtype, or float32 beside 16-bit rows; or None.
        compressed_bias: likewise for ``compressed``.

    Returns:
        ``[F n + K m, H]``: tile t's tokens are rows plan.cu_tokens[t] .. plan.cu_tokens[t + 1].

    Raises:
        ValueError: the plan has another number of tiles of either kind, or of tokens per tile.
    """
    _check_rows(full, compressed, plan)
    return call(torch.ops.vico.pack_tokens, full, compressed, full_bias, compressed_bias, plan.cu_tokens, plan.order)


def pack_tokens_(
    out: Tensor,
    full: Tensor,
    compressed: Tensor,
    plan: RoutingPlan,
    first_row: Tensor,
    full_bias: Tensor | None = None,
    compressed_bias: Tensor | None = None,
) -> Tensor:
    """:func:`pack_tokens` into rows of ``out``, in place, which is returned; for inference.

    Args:
        out: ``[rows, H]``, dtype of ``full``, of any row stride; shares no memory with what is read. Rows that are no
            tile's stay as they are.
        full: see :func:`pack_tokens`, as for ``compressed``, ``plan`` and the biases.
        first_row: ``[F + K]`` int64: tile t's tokens are written to the rows of ``out`` from first_row[t] on. No two
            tiles may share a row.

    Raises:
        ValueError: a gradient would be lost, and whatever :func:`pack_tokens` raises.
        RuntimeError: a tile's rows lie outside ``out`` or are another's too, or shapes, dtypes or devices do not fit.
    """
    _check_rows(full, compressed, plan)
    tensors = {"full": full, "compressed": compressed, "full_bias": full_bias, "compressed_bias": compressed_bias}
    refuse_gradient("pack_tokens_ writes in place", "pack_tokens", out=out, **tensors)
    torch.ops.vico.pack_tokens_(out, *tensors.values(), first_row, plan.order)
    return out


def _check_rows(full: Tensor, compressed: Tensor, plan: RoutingPlan) -> None:
    """Raises ValueError unless the rows are those of the plan's tiles."""
    for name, tokens, tiles, per_tile in (
        ("full", full, plan.full_tiles, plan.tokens[0]),
        ("compressed", compressed, plan.compressed_tiles, plan.tokens[1]),
    ):
        if tokens.dim() != 3 or tokens.shape[0] != tiles or tokens.shape[1] != per_tile:
            raise ValueError(
                f"{name} must have shape [{tiles}, {per_tile}, H] for this plan of {plan.tiles} tiles, "
                f"{plan.compressed_tiles} of them compressed, got {list(tokens.shape)}: is it the plan of another "
                "batch?"
            )


def check_projection(projection: str) -> None:
    """Raises ValueError where there is no such projection."""
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be 'torch', 'fused' or 'folded', got {projection!r}")


def check_plan(tokens: Tensor, plan: RoutingPlan, has_cls: bool) -> None:
    """Raises TypeError or ValueError unless ``plan`` is a plan of the tiles in ``tokens`` [P, has_cls + N, V]."""
    if not isinstance(plan, RoutingPlan):
        raise TypeError(f"plan must be a RoutingPlan (see plan_routing), got {type(plan).__name__}")
    if tokens.dim() != 3:
        raise ValueError(f"tokens must have shape [tiles, tokens, channels], got {list(tokens.shape)}")
    if plan.tiles != tokens.shape[0]:
        raise ValueError(
            f"the plan routes {plan.tiles} tiles, but tokens hold {tokens.shape[0]} (shape {list(tokens.shape)}): "
            "is it the plan of another batch?"
        )
    patches = tokens.shape[1] - int(has_cls)
    wanted = (patches // 4, patches // 16)
    if plan.tokens[0] != wanted[0] or plan.tokens[1] != wanted[1]:
        raise ValueError(
            f"the plan gives {plan.tokens[0]} or {plan.tokens[1]} tokens to a tile, but {patches} patch tokens per "
            f"tile make {wanted[0]} or {wanted[1]}: is it the plan of another batch? (plan_routing's tokens={wanted})"
        )


def check_out(out: Tensor | None, first_row: Tensor | None, plan: RoutingPlan | None) -> None:
    """Raises ValueError unless ``out``, ``first_row`` and ``plan`` of :func:`connector` go together."""
    if (out is None) != (first_row is None):
        raise ValueError(
            f"out and first_row go together, got {'out' if first_row is None else 'first_row'} alone: first_row says "
            "where in out each tile's tokens go"
        )
    if out is not None and plan is None:
        raise ValueError("out needs a plan, whose tiles it takes, got None")


def place_tokens(
    full: Tensor,
    compressed: Tensor,
    plan: RoutingPlan,
    out: Tensor | None,
    first_row: Tensor | None,
    full_bias: Tensor | None = None,
    compressed_bias: Tensor | None = None,
) -> Tensor:
    """:func:`pack_tokens`, or :func:`pack_tokens_` where there is an ``out``."""
    if out is None or first_row is None:
        return pack_tokens(full, compressed, plan, full_bias, compressed_bias)
    return pack_tokens_(out, full, compressed, plan, first_row, full_bias, compressed_bias)


def _check_dtype(tokens: Tensor, weights: Mapping[str, Tensor]) -> None:
    """Raises TypeError where the norm would take 16-bit tokens, beside wider parameters, and the first Linear not."""
    wanted = weights["mlp1.1.weight"].dtype
    if tokens.dtype not in (torch.bfloat16, torch.float16) or tokens.dtype == wanted:
        return
    if not torch.is_autocast_enabled(tokens.device.type):
        raise TypeError(
            f"tokens must have the dtype of the connector's weights, {wanted}, got {tokens.dtype}: cast the tokens or "
            "the connector, or use autocast"
        )


def connector(
    tokens: Tensor,
    weights: Mapping[str, Tensor],
    plan: RoutingPlan | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
    grid: tuple[int, int] | None = None,
    has_cls: bool = True,
    ps_version: str = "v2",
    projection: str = "torch",
    folded: FoldedWeights | None = None,
    out: Tensor | None = None,
    first_row: Tensor | None = None,
) -> Tensor:
    """ViT tokens to the language model's visual tokens; with a plan, only the chosen connector runs on each tile.

    The 256-token connector is LayerNorm(4V) -> Linear -> GELU -> Linear on 2x2 shuffled tokens, the 64-token connector
    LayerNorm(16V) -> Linear -> GELU -> dropout -> Linear -> GELU -> dropout -> Linear on 4x4 shuffled ones. Equivalent
    to :func:`vico_ext.reference.connector`, or ``connector_256`` without a plan.

    With a plan both connectors run, perhaps on no tile at all, so every parameter gets a gradient, zero if need be, as
    DistributedDataParallel expects.

    Args:
        tokens: ``[P, 1 + N, V]`` with the CLS token in front, or ``[P, N, V]``; any strides.
        weights: parameters under the released names, ``mlp1.{0,1,3}`` and, with a plan, ``mlp2.{0,1,4,7}``, each
            ``.weight`` and ``.bias``.
        plan: the routing plan of these P tiles, with N / 4 and N / 16 tokens; None for 256 tokens from every tile.
        dropout_p: dropout of the 64-token connector, in training.
        training: whether dropout is applied.
        eps: of the LayerNorms.
        grid: rows and columns of the token grid; by default the square of N tokens.
        has_cls: whether a CLS token leads each tile; it is skipped.
        ps_version: "v2", or "v1" of older models, which leaves the output grid transposed.
        projection: "torch", cuBLAS or the CPU's BLAS and an epilogue of our own; or "fused", on CUDA in 16 bits our own
            GEMMs with the epilogue in them, one launch per layer for both connectors, the last one writing the packed
            order. At 8B sizes the two are about equal on an H100 (docs/kernels.md). "fused" takes one more product per
            GELU in the backward pass, and elsewhere than on CUDA in 16 bits it runs as "torch" does. "folded" is
            "fused" with the LayerNorms folded into the first Linears, which read the tokens through their shuffled
            view: no normalised rows, but their mean and 1 / std. It is for inference: where a gradient is recorded or
            dropout applied, under torch.compile, or where tokens are cast, it runs as "fused" does.
        folded: what keeps the folded weights between calls, see there for which changes it sees; by default they are
            made anew in each call, which takes longer than "folded" saves.
        out: with a plan and for inference, ``[rows, H]`` in the dtype of the projections, of any row stride: the last
            layer writes into it, and it is returned. Rows that are no tile's stay as they are.
        first_row: ``[P]`` int64, with ``out``: tile t's tokens go to its rows from first_row[t] on.

    Returns:
        With a plan ``[T, H]``, T = plan.total_tokens, packed in tile order; without, ``[P, N / 4, H]``. Dtype of the
        projections: that of ``tokens``, or autocast's.

    Note:
        "folded" computes rstd (a . w - mean sum(w)), a difference of sums in float32 whose error grows with the mean of
        a row of K raw values a. Tensor cores cut off what a sum cannot hold, in each of K / 16 steps: beside the error
        of "torch", whose normalised row is rounded to 16 bits, that is of the order of |mean| / std times K / 1.6e6 in
        bfloat16 and K / 2e5 in float16. With K up to 51200 the two are within 2x of each other up to |mean| / std = 25
        in bfloat16 and 3 in float16; tokens of a far larger mean lose digits. At worst an element is off by 2^-24
        (K / 8 + 16) rstd (sum |a w| + |mean sum(w)|) and the roundings of the weight and of the result.

    Raises:
        TypeError: ``plan`` is no plan, or 16-bit tokens meet weights of another dtype without autocast.
        ValueError: the plan is not of these tiles, the tokens do not fill the grid, there is no such projection,
            ``out`` comes without ``first_row`` or a plan, or a gradient would be lost in it.
        KeyError: a parameter is missing from ``weights``.
    """

    check_projection(projection)

    def parameters(name: str) -> tuple[Tensor, Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def normalized(name: str, rate: int, tile_index: Tensor | None) -> Tensor:
        return normalized_shuffle(
            tokens,
            *parameters(name),
            rate,
            eps=eps,
            grid=grid,
            tile_index=tile_index,
            has_cls=has_cls,
            ps_version=ps_version,
        )

    def run(names: tuple[str, ...], rate: int, tile_index: Tensor | None, dropout_p: float, add_bias: bool) -> Tensor:
        norm, *inner, last = names
        x = normalized(norm, rate, tile_index)
        for name in inner:
            weight, bias = parameters(name)
            # One name for input and output, so that the input is freed as soon as autograd allows.
            x = F.linear(x, weight)
            x = _bias_gelu_of_temporary(x, bias, dropout_p, training)
        weight, bias = parameters(last)
        return F.linear(x, weight, bias if add_bias else None)

    def layer(name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = parameters(name)
        return _cast(x), _cast(weight), bias

    check_out(out, first_row, plan)
    _check_dtype(tokens, weights)
    keeper = None
    if projection == "folded":
        used = _FULL if plan is None else _FULL + _COMPRESSED
        drops = plan is not None and training and dropout_p > 0
        if runs_folded(tokens, [t for name in used for t in parameters(name)], drops):
            keeper = FoldedWeights() if folded is None else folded

    def folded_layer(names: tuple[str, ...]) -> FoldedLinear | None:
        if keeper is None:
            return None
        return keeper.layer(names[1], parameters(names[0]), parameters(names[1]), tokens.dtype)

    absent = (None, None, None)
    layout: dict[str, Any] = {"eps": eps, "grid": grid, "has_cls": has_cls, "ps_version": ps_version}
    if plan is None:
        if projection == "torch":
            return run(_FULL, 2, None, 0.0, True)
        first = folded_layer(_FULL)
        if first is not None:
            full, _ = first_layer(tokens, first, 2, tile_index=None, **layout)
        else:
            full = normalized(_FULL[0], 2, None)
            full, _ = call(torch.ops.vico.projection, *layer(_FULL[1], full), *absent, True)
        full, _ = call(torch.ops.vico.projection, *layer(_FULL[2], full), *absent, False)
        return full
    check_plan(tokens, plan, has_cls)
    # split and not slices: with a number of tiles that torch.compile does not know, these are of that very number.
    full_tiles, compressed_tiles = plan.order.split([plan.full_tiles, plan.compressed_tiles])
    if projection == "torch":
        full = run(_FULL, 2, full_tiles, 0.0, False)
        compressed = run(_COMPRESSED, 4, compressed_tiles, dropout_p, False)
        return place_tokens(full, compressed, plan, out, first_row, weights["mlp1.3.bias"], weights["mlp2.7.bias"])

    def dropout() -> tuple[Tensor | None, float]:
        seed = _dropout_seed(dropout_p, training, tokens.device)
        return seed, 0.0 if seed is None else dropout_p

    # The connector with one layer more begins alone; then both go together.
    first, first_compressed = folded_layer(_FULL), folded_layer(_COMPRESSED)
    if first is not None and first_compressed is not None:
        compressed, _ = first_layer(tokens, first_compressed, 4, tile_index=compressed_tiles, **layout)
        rows = layer(_COMPRESSED[2], compressed)
        full, compressed = first_layer(tokens, first, 2, tile_index=full_tiles, rows=rows, **layout)
    else:
        compressed = normalized(_COMPRESSED[0], 4, compressed_tiles)
        _, compressed = call(torch.ops.vico.projection, *absent, *layer(_COMPRESSED[1], compressed), True, *dropout())
        full = normalized(_FULL[0], 2, full_tiles)
        full, compressed = call(
            torch.ops.vico.projection, *layer(_FULL[1], full), *layer(_COMPRESSED[2], compressed), True, *dropout()
        )
    last = (*layer(_FULL[2], full), *layer(_COMPRESSED[3], compressed))
    if out is None:
        return call(torch.ops.vico.packed_projection, *last, plan.cu_tokens, plan.order)
    names = ("full", "full_weight", "full_bias", "compressed", "compressed_weight", "compressed_bias")
    refuse_gradient("out is written in place", "a call without it", out=out, **dict(zip(names, last, strict=True)))
    torch.ops.vico.packed_projection_(out, *last, first_row, plan.order)
    return out
