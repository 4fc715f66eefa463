"""Optimizers of stage 0: Muon for the layers' matrices halves the steps that AdamW takes until print is read."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["Optimizers", "cosine", "level"]

_INNER = (".layer.", ".layers.", "projector.linear_")


class Optimizers:
    """Muon for matrices inside the model, AdamW for embeddings, heads, norms and biases.

    Args:
        parameters: with their names.
        peak: learning rate, the same for both (Muon's updates are scaled to AdamW's size).
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], peak: float) -> None:
        named = list(parameters)
        self.peak = peak
        self.parameters = [parameter for _, parameter in named]
        inner = {name for name, parameter in named if parameter.dim() == 2 and any(part in name for part in _INNER)}
        matrices = [parameter for name, parameter in named if name in inner]
        others = [parameter for name, parameter in named if name not in inner]
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, peak, betas=(0.9, 0.98), weight_decay=0.01),
        )

    def step(self, loss: torch.Tensor, rate: float) -> None:
        """Backward, gradients clipped to norm 1, and a step at that share of the peak learning rate."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = self.peak * rate
            optimizer.step()
            optimizer.zero_grad()


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step counted from 0: up, then down to 2% along a cosine."""
    return min(1.0, (step + 1) / warmup) * (0.51 + 0.49 * math.cos(math.pi * min(1.0, step / steps)))


def level(step: int, end: int, warmup: int, cooldown: int) -> float:
    """Share of the peak at a step counted from 0: up, level, and down in a line over the last ``cooldown`` steps."""
    return min(1.0, (step + 1) / warmup) * min(1.0, (end - step) / cooldown)
