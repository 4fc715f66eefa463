"""The connectors: normalised shuffle, projections with fused epilogues, and the packed order of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vico_ext.functional.autocast import cast_for_product
from vico_ext.functional.bias_gelu import bias_gelu_of_temporary, dropout_seed
from vico_ext.functional.branch import Branch
from vico_ext.functional.folded import FoldedLinear, FoldedWeights, first_layer, runs_folded
from vico_ext.functional.pack import Destination, check_destination, check_plan, place_tokens
from vico_ext.functional.shuffle import normalized_shuffle
from vico_ext.ops.call import call, refuse_gradient
from vico_ext.routing import RoutingPlan

__all__ = ["connector"]

PROJECTIONS = ("torch", "fused", "folded")

# Names of the released checkpoints: LayerNorm, then the Linears, of the connector at each rate.
_FULL = ("mlp1.0", "mlp1.1", "mlp1.3")
_COMPRESSED = ("mlp2.0", "mlp2.1", "mlp2.4", "mlp2.7")
_ABSENT = (None, None, None)  # a connector that takes no part in a projection


def check_projection(projection: str) -> None:
    """Raises ValueError where there is no such projection."""
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be 'torch', 'fused' or 'folded', got {projection!r}")


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
    destination: Destination | None = None,
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
            order, in 1.03 times "torch"'s time at 8B sizes on an H200 (docs/gpu.md). "fused" takes one more product
            per GELU in the backward pass, and elsewhere than on CUDA in 16 bits it runs as "torch" does. "folded" is
            "fused" with the LayerNorms folded into the first Linears, which read the tokens through their shuffled
            view: no normalised rows, but their mean and 1 / std. It is for inference: where a gradient is recorded or
            dropout applied, under torch.compile, or where tokens are cast, it runs as "fused" does.
        folded: what keeps the folded weights between calls, see there for which changes it sees; by default they are
            made anew in each call, which takes longer than "folded" saves.
        destination: with a plan and for inference: called before the last layer for ``out``, ``[rows, H]`` in the dtype
            of the projections, of any row stride, which that layer writes into and which is returned, and
            ``first_row``, ``[P]`` int64: tile t's tokens go to its rows from first_row[t] on. Others stay as they are.

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
            ``destination`` comes without a plan, or a gradient would be lost in it.
        KeyError: a parameter is missing from ``weights``.
    """
    check_projection(projection)
    check_destination(destination, plan)
    _check_dtype(tokens, weights)
    if plan is not None:
        check_plan(tokens, plan, has_cls)
    layout = {"eps": eps, "grid": grid, "has_cls": has_cls, "ps_version": ps_version}
    c = _Call(tokens, weights, dropout_p, training, layout)
    if projection == "torch":
        return _by_torch(c, plan, destination)
    keeper = None
    if projection == "folded":
        used = _FULL if plan is None else _FULL + _COMPRESSED
        drops = plan is not None and training and dropout_p > 0
        if runs_folded(tokens, [t for name in used for t in c.parameters(name)], drops):
            keeper = FoldedWeights() if folded is None else folded
    if plan is None:
        return _full_by_own(c, keeper)
    return _both_by_own(c, keeper, plan, destination)


@dataclass(frozen=True, slots=True)
class _Call:
    """What one call of :func:`connector` was given."""

    tokens: Tensor
    weights: Mapping[str, Tensor]
    dropout_p: float
    training: bool
    layout: dict[str, Any]  # eps, grid, has_cls and ps_version, as normalized_shuffle takes them

    def parameters(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def layer(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A Linear's arguments as the projection ops take them."""
        weight, bias = self.parameters(name)
        return cast_for_product(x), cast_for_product(weight), bias

    def normalized(self, name: str, rate: int, tile_index: Tensor | None) -> Tensor:
        return normalized_shuffle(self.tokens, *self.parameters(name), rate, tile_index=tile_index, **self.layout)

    def folded(self, names: tuple[str, ...], keeper: FoldedWeights | None) -> FoldedLinear | None:
        """The LayerNorm and first Linear of ``names`` as one."""
        if keeper is None:
            return None
        return keeper.layer(names[1], self.parameters(names[0]), self.parameters(names[1]), self.tokens.dtype)

    def first(
        self,
        folded: FoldedLinear,
        rate: int,
        tile_index: Tensor | None,
        rows: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return first_layer(self.tokens, folded, rate, tile_index=tile_index, rows=rows, **self.layout)

    def dropout(self) -> tuple[Tensor | None, float]:
        seed = dropout_seed(self.dropout_p, self.training, self.tokens.device)
        return seed, 0.0 if seed is None else self.dropout_p


def _tiles(plan: RoutingPlan) -> tuple[Tensor, Tensor]:
    """The tiles that stay whole, and those that are compressed."""
    # split and not slices: with a number of tiles that torch.compile does not know, these are of that very number.
    full, compressed = plan.order.split([plan.full_tiles, plan.compressed_tiles])
    return full, compressed


def _by_torch(c: _Call, plan: RoutingPlan | None, destination: Destination | None) -> Tensor:
    """torch's products, and an epilogue of our own after each."""

    def run(names: tuple[str, ...], rate: int, tile_index: Tensor | None, dropout_p: float, add_bias: bool) -> Tensor:
        norm, *inner, last = names
        x = c.normalized(norm, rate, tile_index)
        for name in inner:
            weight, bias = c.parameters(name)
            # One name for input and output, so that the input is freed as soon as autograd allows.
            x = F.linear(x, weight)
            x = bias_gelu_of_temporary(x, bias, dropout_p, c.training)
        weight, bias = c.parameters(last)
        return F.linear(x, weight, bias if add_bias else None)

    if plan is None:
        return run(_FULL, 2, None, 0.0, True)
    full_tiles, compressed_tiles = _tiles(plan)
    with Branch(c.tokens) as branch:
        compressed = run(_COMPRESSED, 4, compressed_tiles, c.dropout_p, False)
    full = run(_FULL, 2, full_tiles, 0.0, False)
    place = None if destination is None else destination()
    branch.join(compressed)
    return place_tokens(full, compressed, plan, place, c.weights["mlp1.3.bias"], c.weights["mlp2.7.bias"])


def _full_by_own(c: _Call, keeper: FoldedWeights | None) -> Tensor:
    """The 256-token connector on every tile, by our own GEMMs."""
    first = c.folded(_FULL, keeper)
    if first is not None:
        x, _ = c.first(first, 2, None)
    else:
        rows = c.layer(_FULL[1], c.normalized(_FULL[0], 2, None))
        x, _ = call(torch.ops.vico.projection, *rows, *_ABSENT, True)
    x, _ = call(torch.ops.vico.projection, *c.layer(_FULL[2], x), *_ABSENT, False)
    return x


def _both_by_own(c: _Call, keeper: FoldedWeights | None, plan: RoutingPlan, destination: Destination | None) -> Tensor:
    """Both connectors by our own GEMMs: the one with one layer more begins alone, then both go together."""
    projection = torch.ops.vico.projection
    full_tiles, compressed_tiles = _tiles(plan)
    first, first_compressed = c.folded(_FULL, keeper), c.folded(_COMPRESSED, keeper)
    if first is not None and first_compressed is not None:
        compressed, _ = c.first(first_compressed, 4, compressed_tiles)
        full, compressed = c.first(first, 2, full_tiles, c.layer(_COMPRESSED[2], compressed))
    else:
        rows = c.layer(_COMPRESSED[1], c.normalized(_COMPRESSED[0], 4, compressed_tiles))
        _, compressed = call(projection, *_ABSENT, *rows, True, *c.dropout())
        rows = c.layer(_FULL[1], c.normalized(_FULL[0], 2, full_tiles))
        full, compressed = call(projection, *rows, *c.layer(_COMPRESSED[2], compressed), True, *c.dropout())
    last = (*c.layer(_FULL[2], full), *c.layer(_COMPRESSED[3], compressed))
    if destination is None:
        return call(torch.ops.vico.packed_projection, *last, plan.cu_tokens, plan.order)
    out, first_row = destination()
    names = ("full", "full_weight", "full_bias", "compressed", "compressed_weight", "compressed_bias")
    refuse_gradient(
        "destination is written in place", "a call without it", destination=out, **dict(zip(names, last, strict=True))
    )
    torch.ops.vico.packed_projection_(out, *last, first_row, plan.order)
    return out
