"""The visual resolution router (ViR): which tiles can do with 64 tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vico_ext import functional as VF

__all__ = ["VisualResolutionRouter"]

_ROUNDS = range(1, 5)


class _Pooling(nn.Module):
    """Parameters of ``pooling_before_gating`` under their released names."""

    attn1: nn.MultiheadAttention
    attn2: nn.MultiheadAttention
    attn3: nn.MultiheadAttention
    attn4: nn.MultiheadAttention
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    norm3: nn.LayerNorm
    norm4: nn.LayerNorm

    def __init__(
        self, width: int, heads: int, eps: float, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.randn(1, width, device=device, dtype=dtype))
        for i in _ROUNDS:
            setattr(self, f"attn{i}", nn.MultiheadAttention(width, heads, device=device, dtype=dtype))
            setattr(self, f"norm{i}", nn.LayerNorm(width, eps=eps, device=device, dtype=dtype))
        # In the checkpoint, but no round uses them: DDP would wait for their gradients.
        for unused in (self.attn3, self.attn4, self.norm3, self.norm4):
            unused.requires_grad_(False)


class _Gating(nn.Module):
    """Parameters of ``gating`` under their released names."""

    def __init__(
        self, width: int, dropout: float, eps: float, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        for i in _ROUNDS:
            block = nn.Sequential(
                nn.Linear(width, 4 * width, device=device, dtype=dtype),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(4 * width, width, device=device, dtype=dtype),
                nn.Dropout(dropout),
                nn.LayerNorm(width, eps=eps, device=device, dtype=dtype),
            )
            setattr(self, f"block{i}", block)
        self.gate = nn.Sequential(
            nn.LayerNorm(width, eps=eps, device=device, dtype=dtype), nn.Linear(width, 2, device=device, dtype=dtype)
        )


class VisualResolutionRouter(nn.Module):
    """Probability of each tile that 64 visual tokens are enough (ViCO, arXiv 2510.12793).

    Four rounds of attention pooling (:func:`vico_ext.functional.router_pool`) and a gating head
    (:func:`vico_ext.functional.router_gate`). ``state_dict`` has the released keys, ``pooling_before_gating.*`` and
    ``gating.*``; attn3, attn4, norm3 and norm4 are among them, are never used, and do not require gradients.

    On the CPU a tile's probability has the same bits whatever the other tiles of the call are.

    Args:
        vit_hidden: V, width of the ViT.
        num_heads: divides V.
        dropout: after each GELU and second Linear of the gating blocks, in training only.
        layer_norm_eps: of all LayerNorms.
        has_cls: whether a CLS token leads each tile's tokens; it is skipped.
        device, dtype: of the parameters.

    Raises:
        ValueError: num_heads does not divide vit_hidden, or dropout is no probability below 1.
    """

    def __init__(
        self,
        vit_hidden: int,
        num_heads: int = 16,
        *,
        dropout: float = 0.1,
        layer_norm_eps: float = 1e-5,
        has_cls: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if vit_hidden <= 0 or num_heads <= 0 or vit_hidden % num_heads:
            raise ValueError(
                f"vit_hidden must be a positive multiple of num_heads, got vit_hidden={vit_hidden} and "
                f"num_heads={num_heads}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.vit_hidden = vit_hidden
        self.num_heads = num_heads
        self.dropout = dropout
        self.layer_norm_eps = layer_norm_eps
        self.has_cls = has_cls
        self.pooling_before_gating = _Pooling(vit_hidden, num_heads, layer_norm_eps, device, dtype)
        self.gating = _Gating(vit_hidden, dropout, layer_norm_eps, device, dtype)

    def extra_repr(self) -> str:
        return f"vit_hidden={self.vit_hidden}, num_heads={self.num_heads}, has_cls={self.has_cls}"

    def logits(self, vit_tokens: Tensor) -> Tensor:
        """Class logits ``[P, 2]`` of vit_tokens ``[P, 1 + N, V]``; class 0 means that 64 tokens are enough.

        Raises:
            ValueError: tokens of another width, or none per tile.
            TypeError: tokens of another dtype than the parameters, without autocast.
        """
        return self._run(vit_tokens, probability=False)

    def forward(self, vit_tokens: Tensor) -> Tensor:
        """Probability ``[P]`` that 64 tokens are enough, of vit_tokens ``[P, 1 + N, V]`` (``[P, N, V]`` without CLS).

        float32, or float64 for float64 tokens. Raises as :meth:`logits`.
        """
        return self._run(vit_tokens, probability=True)

    def _run(self, vit_tokens: Tensor, probability: bool) -> Tensor:
        pooling, gating = self.pooling_before_gating, self.gating
        rounds: Any = pooling._modules
        pooled = VF.router_pool(
            vit_tokens,
            pooling.query_token,
            _attention(rounds["attn1"]),
            _affine(rounds["norm1"]),
            _attention(rounds["attn2"]),
            _affine(rounds["norm2"]),
            self.num_heads,
            has_cls=self.has_cls,
            eps=self.layer_norm_eps,
        )
        parts: Any = gating._modules
        norm, classifier = _layers(parts["gate"])
        return VF.router_gate(
            pooled,
            [_block(parts[f"block{i}"]) for i in _ROUNDS],
            _affine(norm) + _affine(classifier),
            dropout=self.dropout,
            training=self.training,
            eps=self.layer_norm_eps,
            probability=probability,
        )


def _parameter(module: Any, name: str) -> Tensor:
    """``module.name``, found at once: nn.Module's own search, 38 times, takes as long as kernels do.

    A parametrisation, or sharding, may have put something else in its place.
    """
    parameters = module._parameters
    if name in parameters:
        parameter = parameters[name]  # not get: a library that shards parameters may have its own []
        if parameter is not None:
            return parameter
    return getattr(module, name)


def _layers(sequential: Any) -> list[Any]:
    """The layers of an nn.Sequential, or of what wraps one and can be indexed."""
    plain = type(sequential) is nn.Sequential
    return list(sequential._modules.values()) if plain else list(sequential)


def _affine(module: Any) -> tuple[Tensor, Tensor]:
    return _parameter(module, "weight"), _parameter(module, "bias")


def _attention(attn: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _parameter(attn, "in_proj_weight"),
        _parameter(attn, "in_proj_bias"),
        *_affine(attn.out_proj),
    )


def _block(block: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    first, _, _, second, _, norm = _layers(block)
    return *_affine(first), *_affine(second), *_affine(norm)
