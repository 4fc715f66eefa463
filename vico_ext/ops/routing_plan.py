"""routing_plan: fake kernels. No gradients: a decision has none."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("vico::checked_probabilities")
def _(p: Tensor) -> Tensor:
    return p.new_empty(p.shape, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)


@torch.library.register_fake("vico::quantile_route")
def _(p: Tensor, cu_tiles: Tensor | None, relative: float, absolute: float) -> Tensor:
    return p.new_empty(p.shape, dtype=torch.bool)


@torch.library.register_fake("vico::budget_route")
def _(p: Tensor, count: int) -> Tensor:
    return p.new_empty(p.shape, dtype=torch.bool)


@torch.library.register_fake("vico::plan_tokens")
def _(compress: Tensor, full_tokens: int, compressed_tokens: int) -> tuple[Tensor, Tensor]:
    tiles = compress.shape[0]
    return compress.new_empty(tiles + 1, dtype=torch.int64), compress.new_empty(tiles, dtype=torch.int64)
