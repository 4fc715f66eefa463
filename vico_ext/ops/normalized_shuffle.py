"""normalized_shuffle: fake kernels and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vico_ext.ops.second_derivative import refuse_second_derivative


def sum_dtype(tokens: Tensor) -> torch.dtype:
    return torch.float64 if tokens.dtype == torch.float64 else torch.float32


@torch.library.register_fake("vico::normalized_shuffle")
def _(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    grid_h: int,
    grid_w: int,
    rate: int,
    tile_index: Tensor | None = None,
    skip: int = 0,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    selected = tokens.shape[0] if tile_index is None else tile_index.shape[0]
    shape = (selected, (grid_h // rate) * (grid_w // rate))
    out = tokens.new_empty(*shape, rate * rate * tokens.shape[2])
    mean, rstd = (tokens.new_empty(shape, dtype=sum_dtype(tokens)) for _ in range(2))
    return out, mean, rstd


@torch.library.register_fake("vico::normalized_shuffle_backward")
def _(
    grad_out: Tensor,
    tokens: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grid_h: int,
    grid_w: int,
    rate: int,
    tile_index: Tensor | None,
    skip: int,
    transposed: bool,
    need_grad_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_tokens = tokens.new_empty(tokens.shape if need_grad_tokens else (0,))
    grad_weight, grad_bias = (weight.new_empty(weight.shape) for _ in range(2))
    return grad_tokens, grad_weight, grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, weight, _bias, _eps, grid_h, grid_w, rate, tile_index, skip, transposed = inputs
    _out, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tokens, weight, mean, rstd, tile_index)
    ctx.grid = (grid_h, grid_w, rate)
    ctx.layout = (skip, transposed)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 10
    tokens, weight, mean, rstd, tile_index = ctx.saved_tensors
    need_tokens, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_tokens, grad_weight, grad_bias = torch.ops.vico.normalized_shuffle_backward(
        grad_out, tokens, weight, mean, rstd, *ctx.grid, tile_index, *ctx.layout, need_tokens
    )
    return (
        grad_tokens if need_tokens else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
        *(None,) * 7,
    )


torch.library.register_autograd("vico::normalized_shuffle", _backward, setup_context=_setup_context)
refuse_second_derivative("normalized_shuffle_backward")
