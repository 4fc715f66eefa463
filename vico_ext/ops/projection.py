"""projection and its packed ops: fake kernels and gradients, composed of torch's products and the existing ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.register_fake("vico::projection")
def _(
    full: Tensor | None,
    full_weight: Tensor | None,
    full_bias: Tensor | None,
    compressed: Tensor | None,
    compressed_weight: Tensor | None,
    compressed_bias: Tensor | None,
    gelu: bool,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    like = full if full is not None else compressed
    assert like is not None

    def out(x: Tensor | None, weight: Tensor | None) -> Tensor:
        return like.new_empty(0) if x is None or weight is None else x.new_empty(*x.shape[:-1], weight.shape[0])

    return out(full, full_weight), out(compressed, compressed_weight)


@torch.library.register_fake("vico::packed_projection")
def _(
    full: Tensor,
    full_weight: Tensor,
    full_bias: Tensor | None,
    compressed: Tensor,
    compressed_weight: Tensor,
    compressed_bias: Tensor | None,
    cu_tokens: Tensor,
    order: Tensor,
) -> Tensor:
    rows = full.shape[0] * full.shape[1] + compressed.shape[0] * compressed.shape[1]
    return full.new_empty(rows, full_weight.shape[0])


@torch.library.register_fake("vico::packed_projection_")
def _(
    out: Tensor,
    full: Tensor,
    full_weight: Tensor,
    full_bias: Tensor | None,
    compressed: Tensor,
    compressed_weight: Tensor,
    compressed_bias: Tensor | None,
    first_row: Tensor,
    order: Tensor,
) -> None:
    return None


def _linear_grads(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight in x weight^T."""
    return grad @ weight, grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.gelu, seed, ctx.dropout = inputs
    ctx.save_for_backward(*tensors, seed)


def _backward(ctx: Any, *grad_outs: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    grads: list[Tensor | None] = []
    for i, grad in enumerate(grad_outs):
        x, weight, bias = tensors[3 * i : 3 * i + 3]
        if x is None or grad is None:
            grads += [None, None, None]
            continue
        if ctx.gelu:
            # The sums before GELU were never stored: one more product gives them back.
            dropout = ctx.dropout if i == 1 else 0.0
            grad, grad_bias = torch.ops.vico.bias_gelu_backward(grad, F.linear(x, weight), bias, seed, dropout)
        else:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        grads += [*_linear_grads(grad, x, weight), None if bias is None else grad_bias.to(bias.dtype)]
    return *grads, None, None, None


def _setup_packed_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _packed_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    full, full_weight, full_bias, compressed, compressed_weight, compressed_bias, cu_tokens, order = ctx.saved_tensors
    grad_full, grad_compressed, *bias_grads = torch.ops.vico.pack_tokens_backward(
        grad_out, cu_tokens, order, full.shape[0], full.shape[1], compressed.shape[1]
    )
    grad_biases = [
        None if bias is None else grad.to(bias.dtype)
        for bias, grad in zip((full_bias, compressed_bias), bias_grads, strict=True)
    ]
    return (
        *_linear_grads(grad_full, full, full_weight),
        grad_biases[0],
        *_linear_grads(grad_compressed, compressed, compressed_weight),
        grad_biases[1],
        None,
        None,
    )


torch.library.register_autograd("vico::projection", _backward, setup_context=_setup_context)
torch.library.register_autograd("vico::packed_projection", _packed_backward, setup_context=_setup_packed_context)
