"""How far two models' next-token distributions are apart, at the answer tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vico_ext import functional as VF

__all__ = ["answer_divergence", "row_means"]


def answer_divergence(
    reference: Tensor,
    reference_head: Any,
    policy: Tensor,
    policy_head: Any,
    *,
    weights: Tensor | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The weighted sum over answer tokens of the divergence of two models, and each token's part.

    :func:`vico_ext.functional.consistency_loss`, which holds no logits of all tokens, on a model's Linear heads.

    Args:
        reference: ``[N, H_ref]`` hidden states; no gradient goes there.
        reference_head: its Linear to the vocabulary.
        policy: ``[N, H]`` hidden states.
        policy_head: its Linear to the vocabulary.
        weights: ``[N]``, of the tokens; 1 where None.
        divergence: "forward_kl" KL(ref, policy), "reverse_kl" KL(policy, ref), or "jsd", the mean of both to their
            mixture.
        temperature: logits are divided by it.

    Returns:
        The sum, differentiable; and ``[N]`` without gradient. float32, or float64 for float64 hidden states.
    """
    out = VF.consistency_loss(
        policy,
        policy_head.weight,
        reference,
        reference_head.weight,
        bias=policy_head.bias,
        ref_bias=reference_head.bias,
        token_weights=weights,
        temperature=temperature,
        divergence=divergence,
        reduction="sum",
    )
    return out.loss, out.token_loss.detach()


def row_means(values: Tensor, counts: Tensor) -> Tensor:
    """Means of consecutive runs of ``values`` [N], the b-th of length counts[b] ``[B]``; 0 for empty runs."""
    sums = torch.segment_reduce(values, "sum", lengths=counts) if len(values) else values.new_zeros(len(counts))
    return sums / counts.clamp_min(1)
