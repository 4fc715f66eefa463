"""merge_tokens: fake kernels and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vico_ext.ops.second_derivative import refuse_second_derivative


@torch.library.register_fake("vico::merge_tokens")
def _(embeds: Tensor, tokens: Tensor, source: Tensor) -> Tensor:
    return embeds.new_empty(source.shape[0], embeds.shape[1])


@torch.library.register_fake("vico::text_rows")
def _(embeds: Tensor, source: Tensor, token_rows: int) -> Tensor:
    return embeds.new_empty(source.shape[0], embeds.shape[1])


@torch.library.register_fake("vico::merge_tokens_backward")
def _(
    grad_out: Tensor, source: Tensor, embed_rows: int, token_rows: int, need_embeds: bool, need_tokens: bool
) -> tuple[Tensor, Tensor]:
    hidden = grad_out.shape[1]
    return (
        grad_out.new_empty(embed_rows if need_embeds else 0, hidden),
        grad_out.new_empty(token_rows if need_tokens else 0, hidden),
    )


@torch.library.register_fake("vico::scatter_tokens_")
def _(embeds: Tensor, index: Tensor, tokens: Tensor) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    embeds, tokens, source = inputs
    ctx.save_for_backward(source)
    ctx.rows = (embeds.shape[0], tokens.shape[0])


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    (source,) = ctx.saved_tensors
    need_embeds, need_tokens = ctx.needs_input_grad[:2]
    grad_embeds, grad_tokens = torch.ops.vico.merge_tokens_backward(
        grad_out, source, *ctx.rows, need_embeds, need_tokens
    )
    return grad_embeds if need_embeds else None, grad_tokens if need_tokens else None, None


torch.library.register_autograd("vico::merge_tokens", _backward, setup_context=_setup_context)
refuse_second_derivative("merge_tokens_backward")
