"""Hypothesis strategies that several test files share: shapes, strides and dtypes as users have them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def shuffle_problems(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of the shuffles: tokens of any strides and dtype, gathered in any order, some tiles repeatedly."""
    torch.manual_seed(draw(st.integers(0, 99)))
    rate = draw(st.sampled_from([1, 2, 3, 4]))
    grid = (rate * draw(st.integers(1, 4)), rate * draw(st.integers(1, 4)))
    tiles, channels = draw(st.integers(0, 4)), draw(st.integers(1, 19))
    has_cls = draw(st.booleans())
    tokens = torch.randn(tiles, has_cls + grid[0] * grid[1], channels, dtype=torch.float32)
    index = draw(st.none() | st.lists(st.integers(0, max(tiles - 1, 0)), max_size=6 if tiles else 0))
    tokens = draw(st.sampled_from([lambda t: t, strided, transposed_storage, offset]))(tokens)
    return {
        "tokens": tokens.to(draw(st.sampled_from(DTYPES))),
        "rate": rate,
        "grid": grid,
        "tile_index": None if index is None else torch.tensor(index, dtype=torch.long),
        "has_cls": has_cls,
        "ps_version": draw(st.sampled_from(["v1", "v2"])),
    }


def strided(tokens: Tensor) -> Tensor:
    """A view into a wider buffer: every stride is larger than dense."""
    tiles, count, channels = tokens.shape
    wide = torch.full((tiles, count + 2, channels + 3), torch.nan)
    wide[:, 1:-1, 2:-1] = tokens
    return wide[:, 1:-1, 2:-1]


def transposed_storage(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).contiguous().transpose(1, 2)


def offset(tokens: Tensor) -> Tensor:
    return torch.cat([tokens.new_full((1,), torch.nan), tokens.flatten()])[1:].view_as(tokens)
