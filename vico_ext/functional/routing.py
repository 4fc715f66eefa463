"""Routing decisions and the packed layout that follows from them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["budget_route", "checked_probabilities", "plan_tokens", "released_route"]


def checked_probabilities(p: Tensor) -> Tensor:
    """The probabilities `p`, checked and in a dtype that decisions are made in; detached.

    Args:
        p: ``[P]``, any floating dtype.

    Returns:
        ``[P]`` float64 for float64, float32 for all else.

    Raises:
        RuntimeError: a value is NaN or outside [0, 1]; the message names the first such tile. On CUDA the kernel
            checks: the error surfaces at the next call that waits for the device.
    """
    return torch.ops.vico.checked_probabilities(p.detach())


def budget_route(p: Tensor, count: int) -> Tensor:
    """The `count` tiles of highest p; of equal ones those of lower index.

    Equivalent to the first ``count`` entries of a stable descending sort, without the sort.

    Args:
        p: ``[P]`` probability that the smaller number of tokens is enough.
        count: how many tiles to compress, from 0 to P.

    Returns:
        ``[P]`` bool.

    Raises:
        RuntimeError: a value of ``p`` is NaN (on CUDA it surfaces as above), or ``count`` is out of range.
    """
    return torch.ops.vico.budget_route(p.detach(), count)


def released_route(p: Tensor, relative: float, absolute: float, *, tiles_per_image: Tensor | None = None) -> Tensor:
    """Tiles to compress: p > quantile(p, relative) and p >= absolute.

    Equivalent to :func:`vico_ext.reference.released_route`, bit for bit: the quantile is torch.quantile's, linearly
    interpolated in the dtype of ``p``; 16-bit ``p`` are taken to float32 first, as the released code does.

    Args:
        p: ``[P]`` probability that the smaller number of tokens is enough.
        relative: the quantile, in [0, 1].
        absolute: the least probability.
        tiles_per_image: ``[images]`` int64 with sum P: quantiles within each image. By default over the whole call.

    Returns:
        ``[P]`` bool.

    Raises:
        RuntimeError: a value of ``p`` is NaN, or the images do not add up to P tiles; on CUDA it surfaces as above.
    """
    cu_tiles = None if tiles_per_image is None else torch.nn.functional.pad(tiles_per_image.cumsum(0), (1, 0))
    return torch.ops.vico.quantile_route(p.detach(), cu_tiles, relative, absolute)


def plan_tokens(compress: Tensor, full_tokens: int = 256, compressed_tokens: int = 64) -> tuple[Tensor, Tensor]:
    """Offsets of each tile's tokens in the packed order, and the tiles ordered by connector.

    Equivalent to :func:`vico_ext.reference.plan_tokens`.

    Args:
        compress: ``[P]`` bool.
        full_tokens: tokens of a tile that stays whole.
        compressed_tokens: tokens of a compressed tile; positive and fewer.

    Returns:
        ``cu_tokens`` ``[P + 1]`` int64, and ``order`` ``[P]`` int64: the tiles that stay whole, ascending, then those
        that are compressed, ascending.
    """
    return torch.ops.vico.plan_tokens(compress, full_tokens, compressed_tokens)
