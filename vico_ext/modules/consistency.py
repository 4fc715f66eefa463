"""The consistency loss as a module: its options, kept in one place."""

from __future__ import annotations

from torch import Tensor, nn

from vico_ext import functional as VF

__all__ = ["ConsistencyLoss"]


class ConsistencyLoss(nn.Module):
    """:func:`vico_ext.functional.consistency_loss` with its options fixed. No parameters.

    Args:
        divergence: "forward_kl" (ViCO's), "reverse_kl" or "jsd".
        beta: of "jsd", strictly between 0 and 1.
        temperature: positive; divides the logits of both models.
        reduction: "mean", "sum" or "none".
        ignore_index: the label of positions that do not count.
        block_tokens: tokens per block; by default as many as the workspace holds.

    Raises:
        ValueError: on the first call, an option out of range.
    """

    def __init__(
        self,
        divergence: str = "forward_kl",
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "mean",
        ignore_index: int = -100,
        block_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.divergence = divergence
        self.beta = beta
        self.temperature = temperature
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.block_tokens = block_tokens

    def extra_repr(self) -> str:
        return f"{self.divergence!r}, temperature={self.temperature}, reduction={self.reduction!r}"

    def forward(
        self,
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
    ) -> VF.ConsistencyLossOutput:
        """Loss of hidden ``[..., H]`` with head ``[vocabulary, H]`` against those of the reference.

        Arguments, result and errors as in :func:`vico_ext.functional.consistency_loss`.
        """
        return VF.consistency_loss(
            hidden,
            weight,
            ref_hidden,
            ref_weight,
            bias=bias,
            ref_bias=ref_bias,
            labels=labels,
            mask=mask,
            token_weights=token_weights,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            divergence=self.divergence,
            beta=self.beta,
            reduction=self.reduction,
            block_tokens=self.block_tokens,
        )
