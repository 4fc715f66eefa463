"""pixel_shuffle: fake kernels and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vico_ext.ops.second_derivative import refuse_second_derivative


@torch.library.register_fake("vico::pixel_shuffle")
def _(
    tokens: Tensor,
    grid_h: int,
    grid_w: int,
    rate: int,
    tile_index: Tensor | None = None,
    skip: int = 0,
    transposed: bool = False,
) -> Tensor:
    selected = tokens.shape[0] if tile_index is None else tile_index.shape[0]
    return tokens.new_empty(selected, (grid_h // rate) * (grid_w // rate), rate * rate * tokens.shape[2])


@torch.library.register_fake("vico::pixel_shuffle_backward")
def _(
    grad_out: Tensor,
    tiles: int,
    grid_h: int,
    grid_w: int,
    rate: int,
    tile_index: Tensor | None = None,
    skip: int = 0,
    transposed: bool = False,
) -> Tensor:
    return grad_out.new_empty(tiles, skip + grid_h * grid_w, grad_out.shape[2] // (rate * rate))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, grid_h, grid_w, rate, tile_index, skip, transposed = inputs
    ctx.save_for_backward(tile_index)
    ctx.tiles = tokens.shape[0]
    ctx.grid = (grid_h, grid_w, rate)
    ctx.layout = (skip, transposed)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    (tile_index,) = ctx.saved_tensors
    grad_tokens = torch.ops.vico.pixel_shuffle_backward(grad_out, ctx.tiles, *ctx.grid, tile_index, *ctx.layout)
    return grad_tokens, None, None, None, None, None, None


torch.library.register_autograd("vico::pixel_shuffle", _backward, setup_context=_setup_context)
refuse_second_derivative("pixel_shuffle_backward")
