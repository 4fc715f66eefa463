"""pack_tokens: fake kernels and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vico_ext.ops.second_derivative import refuse_second_derivative


@torch.library.register_fake("vico::pack_tokens")
def _(
    full: Tensor,
    compressed: Tensor,
    full_bias: Tensor | None,
    compressed_bias: Tensor | None,
    cu_tokens: Tensor,
    order: Tensor,
) -> Tensor:
    rows = full.shape[0] * full.shape[1] + compressed.shape[0] * compressed.shape[1]
    return full.new_empty(rows, full.shape[2])


@torch.library.register_fake("vico::pack_tokens_")
def _(
    out: Tensor,
    full: Tensor,
    compressed: Tensor,
    full_bias: Tensor | None,
    compressed_bias: Tensor | None,
    first_row: Tensor,
    order: Tensor,
) -> None:
    return None


@torch.library.register_fake("vico::pack_tokens_backward")
def _(
    grad_out: Tensor, cu_tokens: Tensor, order: Tensor, full_tiles: int, full_tokens: int, compressed_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = grad_out.shape[1]
    sum_dtype = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    grad_full = grad_out.new_empty(full_tiles, full_tokens, hidden)
    grad_compressed = grad_out.new_empty(order.shape[0] - full_tiles, compressed_tokens, hidden)
    grad_full_bias, grad_compressed_bias = (grad_out.new_empty(hidden, dtype=sum_dtype) for _ in range(2))
    return grad_full, grad_compressed, grad_full_bias, grad_compressed_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    full, compressed, full_bias, compressed_bias, cu_tokens, order = inputs
    ctx.save_for_backward(cu_tokens, order)
    ctx.sizes = (full.shape[0], full.shape[1], compressed.shape[1])
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (full_bias, compressed_bias)]


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    cu_tokens, order = ctx.saved_tensors
    grad_full, grad_compressed, *bias_grads = torch.ops.vico.pack_tokens_backward(
        grad_out, cu_tokens, order, *ctx.sizes
    )
    grad_biases = (
        None if dtype is None else grad.to(dtype) for grad, dtype in zip(bias_grads, ctx.bias_dtypes, strict=True)
    )
    return grad_full, grad_compressed, *grad_biases, None, None


torch.library.register_autograd("vico::pack_tokens", _backward, setup_context=_setup_context)
refuse_second_derivative("pack_tokens_backward")
