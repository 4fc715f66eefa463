"""How far two models' next-token distributions are apart, per answer token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["answer_divergence", "row_means"]


def answer_divergence(
    reference: Tensor, reference_head: Any, policy: Tensor, policy_head: Any, kind: str = "forward",
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """D(softmax(reference head) , softmax(policy head)) of each position: ``[N]`` float32 (float64 for float64).

    Args:
        reference: ``[N, H]`` hidden states; no gradient goes there.
        reference_head: its Linear to the vocabulary.
        policy: ``[N, H']`` hidden states.
        policy_head: its Linear to the vocabulary.
        kind: "forward" KL(ref, policy), "reverse" KL(policy, ref), or "jsd", the mean of both to their mixture.
        temperature: logits are divided by it.
    """
    with torch.autocast(policy.device.type, enabled=False):
        r = _log_probabilities(reference.detach(), reference_head, temperature).detach()
        p = _log_probabilities(policy, policy_head, temperature)
        if kind == "forward":
            return F.kl_div(p, r, reduction="none", log_target=True).sum(-1)
        if kind == "reverse":
            return F.kl_div(r, p, reduction="none", log_target=True).sum(-1)
        mixture = torch.logaddexp(r, p) - torch.tensor(2.0).log()
        halves = (F.kl_div(mixture, side, reduction="none", log_target=True).sum(-1) for side in (r, p))
        return sum(halves, start=torch.zeros((), device=p.device)) / 2


def _log_probabilities(hidden: Tensor, head: Any, temperature: float) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    bias = None if head.bias is None else head.bias.to(dtype)
    return (F.linear(hidden.to(dtype), head.weight.to(dtype), bias) / temperature).log_softmax(-1)


def row_means(values: Tensor, counts: Tensor) -> Tensor:
    """Means of consecutive runs of ``values`` [N], the b-th of length counts[b] ``[B]``; 0 for empty runs."""
    if not len(values):
        return values.sum() * counts.to(values.dtype)
    sums = torch.segment_reduce(values, "sum", lengths=counts)
    return sums / counts.clamp_min(1)
