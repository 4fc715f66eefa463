"""Pixel shuffle, alone and with LayerNorm in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from vico_ext.ops.call import call

__all__ = ["normalized_shuffle", "pixel_shuffle"]


def _grid_of(tokens: Tensor, grid: tuple[int, int] | None, has_cls: bool, rate: int) -> tuple[int, int]:
    """The token grid, checked: `grid` itself, or the square that the number of tokens makes."""
    if tokens.dim() != 3:
        raise ValueError(f"tokens must have shape [tiles, tokens, channels], got {list(tokens.shape)}")
    if rate < 1:
        raise ValueError(f"rate must be at least 1, got {rate}")
    if grid is not None and (not isinstance(grid, (tuple, list)) or len(grid) != 2):
        raise ValueError(f"grid must be two numbers, rows and columns of the token grid, got {grid!r}")
    patches = tokens.shape[1] - int(has_cls)
    if grid is None:
        side = round(patches**0.5)  # not math.isqrt: patches may be symbolic under torch.compile
        if side * side != patches:
            raise ValueError(
                f"tokens must hold a square grid{' after the CLS token' if has_cls else ''}, got {patches} tokens per "
                f"tile (shape {list(tokens.shape)}): pass grid=(rows, columns), or check has_cls={has_cls}"
            )
        grid = (side, side)
    if grid[0] * grid[1] != patches:
        raise ValueError(
            f"grid {tuple(grid)} needs {grid[0] * grid[1]} tokens per tile{' after the CLS token' if has_cls else ''}, "
            f"got {patches} (shape {list(tokens.shape)})"
        )
    if grid[0] % rate or grid[1] % rate or grid[0] < 1:
        raise ValueError(f"grid {tuple(grid)} must be divisible by the rate {rate} in both directions")
    return grid


def _is_transposed(ps_version: str) -> bool:
    if ps_version not in ("v1", "v2"):
        raise ValueError(f"ps_version must be 'v1' or 'v2', got {ps_version!r}")
    return ps_version == "v1"


def pixel_shuffle(
    tokens: Tensor,
    rate: int = 2,
    *,
    grid: tuple[int, int] | None = None,
    tile_index: Tensor | None = None,
    has_cls: bool = True,
    ps_version: str = "v2",
) -> Tensor:
    """Merges rate x rate neighbouring ViT tokens into one: space-to-depth on the token grid.

    Output token (h', w') is the concatenation over (i, j) in [0, rate)^2, row-major, of tokens
    x[rate h' + i, rate w' + j, :]. Equivalent to :func:`vico_ext.reference.pixel_shuffle`, bit for bit.

    Args:
        tokens: ``[P, 1 + N, V]`` with the CLS token in front, or ``[P, N, V]``; any strides.
        rate: neighbours merged in each direction: 2 gives N / 4 tokens, 4 gives N / 16.
        grid: rows and columns of the token grid; by default the square of N tokens.
        tile_index: ``[M]`` int64, the tiles wanted, in any order; by default all.
        has_cls: whether a CLS token leads each tile; it is skipped.
        ps_version: "v2", or "v1" of older models, which leaves the output grid transposed.

    Returns:
        ``[M, N / rate^2, rate^2 V]``, contiguous, dtype of ``tokens``.

    Raises:
        ValueError: the tokens do not fill the grid, or the rate, at least 1, does not divide it.
    """
    grid = _grid_of(tokens, grid, has_cls, rate)
    transposed = _is_transposed(ps_version)
    return call(torch.ops.vico.pixel_shuffle, tokens, *grid, rate, tile_index, int(has_cls), transposed)


def normalized_shuffle(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    rate: int = 2,
    *,
    eps: float = 1e-5,
    grid: tuple[int, int] | None = None,
    tile_index: Tensor | None = None,
    has_cls: bool = True,
    ps_version: str = "v2",
) -> Tensor:
    """LayerNorm over the rate^2 V channels of :func:`pixel_shuffle`'s output, without the shuffled tensor in between.

    With x a shuffled row: (x - mean(x)) / sqrt(var(x) + eps) * weight + bias. Equivalent to
    :func:`vico_ext.reference.normalized_shuffle`.

    Args:
        tokens: ``[P, 1 + N, V]`` with the CLS token in front, or ``[P, N, V]``; any strides.
        weight: ``[rate^2 V]``, dtype of ``tokens``, or float32 beside 16-bit tokens.
        bias: like ``weight``.
        rate: neighbours merged in each direction.
        eps: added to the variance.
        grid: rows and columns of the token grid; by default the square of N tokens.
        tile_index: ``[M]`` int64, the tiles wanted, in any order; by default all.
        has_cls: whether a CLS token leads each tile; it is skipped.
        ps_version: "v2", or "v1" of older models, which leaves the output grid transposed.

    Returns:
        ``[M, N / rate^2, rate^2 V]``, contiguous, dtype of ``tokens``. The statistics are kept in float32 (float64 for
        float64), whatever the dtype; under autocast the dtype stays that of ``tokens`` too.

    Raises:
        ValueError: the tokens do not fill the grid, or the rate, at least 1, does not divide it.
    """
    grid = _grid_of(tokens, grid, has_cls, rate)
    transposed = _is_transposed(ps_version)
    out, _mean, _rstd = call(
        torch.ops.vico.normalized_shuffle, tokens, weight, bias, eps, *grid, rate, tile_index, int(has_cls), transposed
    )
    return out
