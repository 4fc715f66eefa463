"""Both connectors' tokens in one sequence, or straight at their places in ``inputs_embeds``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vico_ext.ops.call import call, refuse_gradient
from vico_ext.routing import RoutingPlan

__all__ = ["Destination", "pack_tokens", "pack_tokens_"]

# Gives the ``out`` and ``first_row`` of pack_tokens_ when they are needed: what makes them can be launched behind the
# layers that come before, which take the device longer than the host.
Destination = Callable[[], tuple[Tensor, Tensor]]


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


def check_destination(destination: Destination | None, plan: RoutingPlan | None) -> None:
    """Raises ValueError unless ``destination`` and ``plan`` of :func:`vico_ext.functional.connector` go together."""
    if destination is not None and plan is None:
        raise ValueError("destination needs a plan, whose tiles' rows it places, got None")


def place_tokens(
    full: Tensor,
    compressed: Tensor,
    plan: RoutingPlan,
    place: tuple[Tensor, Tensor] | None,
    full_bias: Tensor | None = None,
    compressed_bias: Tensor | None = None,
) -> Tensor:
    """:func:`pack_tokens`, or :func:`pack_tokens_` where there is a place: ``out`` and ``first_row``."""
    if place is None:
        return pack_tokens(full, compressed, plan, full_bias, compressed_bias)
    out, first_row = place
    return pack_tokens_(out, full, compressed, plan, first_row, full_bias, compressed_bias)
