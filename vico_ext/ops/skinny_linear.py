"""skinny_linear: fake kernel and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.register_fake("vico::skinny_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[-2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _grad_weight(grad_y: Tensor, x: Tensor) -> Tensor:
    """sum over rows of grad_y[row, (group,) n] x[row, (group,) k]."""
    if x.dim() == 2:
        return grad_y.t() @ x
    # On the CPU in float: torch's batched product of 16-bit matrices is orders of magnitude slower there.
    wide = x.dtype if x.is_cuda or x.dtype == torch.float64 else torch.float32
    return torch.bmm(grad_y.to(wide).permute(1, 2, 0), x.to(wide).transpose(0, 1)).to(x.dtype)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, *need_bias = ctx.needs_input_grad  # of the arguments that were given
    return (
        torch.ops.vico.skinny_linear(grad_y, weight.transpose(-1, -2)) if need_x else None,
        _grad_weight(grad_y, x) if need_weight else None,
        grad_y.sum(0) if any(need_bias) else None,
    )


torch.library.register_autograd("vico::skinny_linear", _backward, setup_context=_setup_context)
