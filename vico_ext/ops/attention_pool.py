"""attention_pool: fake kernels and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vico_ext.ops.second_derivative import refuse_second_derivative


@torch.library.register_fake("vico::attention_pool")
def _(tokens: Tensor, query: Tensor, skip: int = 0) -> tuple[Tensor, Tensor]:
    shape = (tokens.shape[0], query.shape[1])
    statistics = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    return tokens.new_empty(*shape, tokens.shape[2]), tokens.new_empty(shape, dtype=statistics)


@torch.library.register_fake("vico::attention_pool_backward")
def _(
    grad_context: Tensor,
    tokens: Tensor,
    query: Tensor,
    context: Tensor,
    lse: Tensor,
    skip: int,
    need_grad_tokens: bool,
) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape if need_grad_tokens else (0,)), query.new_empty(query.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, query, skip = inputs
    context, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(tokens, query, context, lse)
    ctx.skip = skip


def _backward(ctx: Any, grad_context: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    need_grad_tokens = ctx.needs_input_grad[0]
    grad_tokens, grad_query = torch.ops.vico.attention_pool_backward(
        grad_context, *ctx.saved_tensors, ctx.skip, need_grad_tokens
    )
    return grad_tokens if need_grad_tokens else None, grad_query, None


torch.library.register_autograd("vico::attention_pool", _backward, setup_context=_setup_context)
refuse_second_derivative("attention_pool_backward")
