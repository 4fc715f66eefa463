"""The projections' epilogue: bias, GELU and dropout in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from vico_ext.ops.call import call

__all__ = ["bias_gelu"]


def dropout_seed(dropout_p: float, training: bool, device: torch.device) -> Tensor | None:
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    if not training or dropout_p == 0:
        return None
    # From torch's default generator: torch.manual_seed governs it, and activation checkpointing restores it. On the
    # device of the tensors, so that a CUDA graph draws anew in every replay.
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, dropout_p: float = 0.0, training: bool = False) -> Tensor:
    """dropout(gelu(x + bias)) in one pass, with the exact GELU z Phi(z).

    Equivalent to ``F.dropout(F.gelu(x + bias), dropout_p, training)``; the mask is drawn by Philox4x32-10 and drawn
    again, not stored, for the backward pass.

    Args:
        x: ``[..., H]``.
        bias: ``[H]``, dtype of ``x``, or float32 beside 16-bit ``x``; or None.
        dropout_p: probability of an element becoming zero; the others are scaled by 1 / (1 - dropout_p).
        training: whether dropout is applied.

    Returns:
        Shape and dtype of ``x``, contiguous.

    Raises:
        ValueError: ``dropout_p`` is no probability.
    """
    seed = dropout_seed(dropout_p, training, x.device)
    return call(torch.ops.vico.bias_gelu, x, bias, seed, 0.0 if seed is None else dropout_p)


def bias_gelu_of_temporary(x: Tensor, bias: Tensor, dropout_p: float, training: bool) -> Tensor:
    """:func:`bias_gelu` of a tensor that nobody else holds: in place, unless a gradient needs its old values."""
    if torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad):
        return bias_gelu(x, bias, dropout_p=dropout_p, training=training)
    seed = dropout_seed(dropout_p, training, x.device)
    call(torch.ops.vico.bias_gelu_, x, bias, seed, 0.0 if seed is None else dropout_p)
    return x
