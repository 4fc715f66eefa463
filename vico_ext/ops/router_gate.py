"""router_gate: fake kernel. No gradient: functional.router_gate composes the layers where one is wanted."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("vico::router_gate")
def _(pooled: Tensor, blocks: list[Tensor], gate: list[Tensor], eps: float, probability: bool = False) -> Tensor:
    if probability:
        dtype = torch.float64 if pooled.dtype == torch.float64 else torch.float32
        return pooled.new_empty(pooled.shape[0], dtype=dtype)
    return pooled.new_empty(pooled.shape[0], gate[2].shape[0])
