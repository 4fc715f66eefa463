"""bias_gelu: fake kernels and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vico_ext.ops.second_derivative import refuse_second_derivative


@torch.library.register_fake("vico::bias_gelu")
def _(x: Tensor, bias: Tensor | None = None, seed: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("vico::bias_gelu_")
def _(x: Tensor, bias: Tensor | None = None, seed: Tensor | None = None, dropout: float = 0.0) -> None:
    return None


@torch.library.register_fake("vico::bias_gelu_backward")
def _(grad_out: Tensor, x: Tensor, bias: Tensor | None, seed: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, seed, ctx.dropout = inputs
    ctx.save_for_backward(x, bias, seed)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, bias, seed = ctx.saved_tensors
    grad_x, grad_bias = torch.ops.vico.bias_gelu_backward(grad_out, x, bias, seed, ctx.dropout)
    return grad_x, None if bias is None else grad_bias, None, None


torch.library.register_autograd("vico::bias_gelu", _backward, setup_context=_setup_context)
refuse_second_derivative("bias_gelu_backward")
