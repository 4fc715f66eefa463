"""How far two models' next-token distributions are apart, at the answer tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    with torch.autocast(policy.device.type, enabled=False):
        r = _log_probabilities(reference.detach(), reference_head, temperature).detach()
        p = _log_probabilities(policy, policy_head, temperature)
        if divergence == "forward_kl":
            loss = F.kl_div(p, r, reduction="none", log_target=True).sum(-1)
        elif divergence == "reverse_kl":
            loss = F.kl_div(r, p, reduction="none", log_target=True).sum(-1)
        else:
            mixture = torch.logaddexp(r, p) - torch.tensor(2.0).log()
            halves = [F.kl_div(mixture, side, reduction="none", log_target=True).sum(-1) for side in (r, p)]
            loss = (halves[0] + halves[1]) / 2
        if weights is not None:
            loss = loss * weights
    return loss.sum(), loss.detach()


def _log_probabilities(hidden: Tensor, head: Any, temperature: float) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    bias = None if head.bias is None else head.bias.to(dtype)
    return (F.linear(hidden.to(dtype), head.weight.to(dtype), bias) / temperature).log_softmax(-1)


def row_means(values: Tensor, counts: Tensor) -> Tensor:
    """Means of consecutive runs of ``values`` [N], the b-th of length counts[b] ``[B]``; 0 for empty runs."""
    sums = torch.segment_reduce(values, "sum", lengths=counts) if len(values) else values.new_zeros(len(counts))
    return sums / counts.clamp_min(1)
