"""The consistency loss of ViCO's first training stage, from hidden states and language-model heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vico_ext.functional.autocast import cast_for_product

__all__ = ["ConsistencyLossOutput", "consistency_loss"]

_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
_REDUCTIONS = ("mean", "sum", "none")


class ConsistencyLossOutput(NamedTuple):
    """What :func:`consistency_loss` returns; float32, or float64 for float64 hidden states.

    Leading dimensions ``...`` are those of the hidden states.
    """

    loss: Tensor
    """``[]``, or ``[...]`` for reduction "none": the reduced loss. Differentiable."""
    token_loss: Tensor
    """``[...]``: each token's divergence times its weight, 0 for ignored tokens. Differentiable."""
    lse: Tensor
    """``[...]``: log-sum-exp of the policy's logits / temperature; 0 for ignored tokens. No gradient."""
    ref_lse: Tensor
    """``[...]``: likewise of the reference."""


def consistency_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    reduction: str = "mean",
    block_tokens: int | None = None,
) -> ConsistencyLossOutput:
    """Divergence of a policy's next-token distribution q from a frozen reference's p, without the logits of all tokens.

    With z = (hidden weight^T + bias) / temperature, q = softmax(z), and p likewise, token t's loss L_t is

    - "forward_kl": KL(p || q) = sum_v p_v (log p_v - log q_v), what ViCO's first stage minimises,
    - "reverse_kl": KL(q || p),
    - "jsd": beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    There is no factor temperature^2. Equivalent to :func:`vico_ext.reference.consistency_loss`, whose beta is 0, 1 and
    ``beta`` for the three. Tokens are taken in blocks and the vocabulary in chunks, with running log-sum-exps: memory
    holds the logits of one block, at most 256 MiB for both models together, 1.2 GiB on a GPU (or of ``block_tokens``
    tokens), however many tokens there are. Logits, sums and gradients are computed in float32 from 16-bit inputs.

    Gradients go to ``hidden``, ``weight`` and ``bias``. All that are wanted are computed in the forward pass, beside
    the loss, and backward scales them. Only where a gradient for the head arrives through ``token_loss`` (or reduction
    "none"), whose coefficients the forward pass could not know, backward computes the logits once more. What is held
    until then is float32: ``[T, H]``, and for a head that trains ``[vocabulary, H]``. There is no second derivative.

    Args:
        hidden: ``[..., H]``, the policy's last hidden states at T positions in all, any strides.
        weight: ``[vocabulary, H]``, the policy's head, dtype of ``hidden``.
        ref_hidden: ``[..., H_ref]``, the reference's at the same positions; no gradient.
        ref_weight: ``[vocabulary, H_ref]``, dtype of ``ref_hidden``; no gradient. That dtype may be another than the
            policy's, but float64 goes only with float64.
        bias: ``[vocabulary]`` or None, dtype of ``hidden`` or float32.
        ref_bias: likewise for the reference; no gradient.
        labels: ``[...]``, the token that each position predicts (already shifted); positions with ``ignore_index`` are
            ignored. Values besides that do not matter.
        mask: ``[...]`` bool, False for ignored positions. The hidden states of an ignored position, NaN included,
            change nothing. On the CPU it also costs nothing; on a GPU it is computed like the others, because only a
            wait for the device could tell which they are: select the positions that count beforehand if many do not.
        token_weights: ``[...]``, factor of each token's loss; 0 is the same as ignored. No gradient.
        ignore_index: the label of ignored positions.
        temperature: positive; divides the logits of both models.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: of "jsd", strictly between 0 and 1.
        reduction: "mean" is sum_t w_t L_t / sum_t w_t over the tokens that count (0 if none does), "sum" its numerator,
            "none" the tokens' w_t L_t.
        block_tokens: tokens per block; by default as many as the workspace holds.

    Returns:
        :class:`ConsistencyLossOutput`. Under autocast hidden states, heads and biases are cast to its dtype.

    Raises:
        ValueError: shapes or devices that do not go together (the vocabularies must be equal), or an option out of
            range.
        TypeError: dtypes that do not go together.
    """
    if divergence not in _DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(_DIVERGENCES)}, got {divergence!r}")
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must lie strictly between 0 and 1, got {beta}: its limits are the two KL divergences")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if block_tokens is not None and block_tokens < 1:
        raise ValueError(f"block_tokens must be at least 1, got {block_tokens}")
    tensors = {"weight": weight, "bias": bias, "ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    for name, t in {**tensors, "labels": labels, "mask": mask, "token_weights": token_weights}.items():
        if t is not None and t.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {t.device}")
    if hidden.dim() < 1 or ref_hidden.shape[:-1] != hidden.shape[:-1] or ref_hidden.dim() != hidden.dim():
        raise ValueError(
            f"hidden [..., H] and ref_hidden [..., H_ref] must hold the same positions, got shapes "
            f"{list(hidden.shape)} and {list(ref_hidden.shape)}"
        )
    weights = _weights(hidden, labels, mask, token_weights, ignore_index)
    positions = hidden.shape[:-1]
    hidden, weight, bias = (
        cast_for_product(hidden),
        cast_for_product(weight),
        None if bias is None else cast_for_product(bias),
    )
    ref_hidden, ref_weight = cast_for_product(ref_hidden.detach()), cast_for_product(ref_weight.detach())
    ref_bias = None if ref_bias is None else cast_for_product(ref_bias.detach())
    train = torch.is_grad_enabled()
    total, token_loss, lse, ref_lse, *_ = torch.ops.vico.consistency_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        ref_hidden.reshape(-1, ref_hidden.shape[-1]),
        ref_weight,
        ref_bias,
        weights,
        temperature,
        {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": beta}[divergence],
        train and hidden.requires_grad,
        train and weight.requires_grad and reduction != "none",
        train and bias is not None and bias.requires_grad and reduction != "none",
        block_tokens or 0,
    )
    token_loss, lse, ref_lse = (t.view(positions) for t in (token_loss, lse, ref_lse))
    if reduction == "none":
        return ConsistencyLossOutput(token_loss, token_loss, lse, ref_lse)
    if reduction == "mean":
        count = total.new_tensor(token_loss.numel()) if weights is None else weights.sum()
        total = total / torch.where(count == 0, 1, count)
    return ConsistencyLossOutput(total, token_loss, lse, ref_lse)


def _weights(
    hidden: Tensor, labels: Tensor | None, mask: Tensor | None, token_weights: Tensor | None, ignore_index: int
) -> Tensor | None:
    """The weight of each position, flat, in the dtype of the sums: 0 where it is ignored; None if all are 1."""
    positions = hidden.shape[:-1]
    for name, t in (("labels", labels), ("mask", mask), ("token_weights", token_weights)):
        if t is not None and t.shape != positions:
            raise ValueError(
                f"{name} must have the shape of hidden but its last dimension, {list(positions)}, got {list(t.shape)}"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if labels is not None and labels.is_floating_point():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    counts = [] if mask is None else [mask]
    if labels is not None:
        counts.append(labels != ignore_index)
    if not counts and token_weights is None:
        return None
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weights = hidden.new_ones(positions, dtype=dtype) if token_weights is None else token_weights.detach().to(dtype)
    for counted in counts:
        weights = torch.where(counted, weights, 0)  # not a product: what is ignored may have any weight, even NaN
    return weights.flatten()
