"""router_pool: fake kernel. No gradient: functional.router_pool composes the rounds where one is wanted."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("vico::router_pool")
def _(
    tokens: Tensor, query_token: Tensor, first: list[Tensor], later: list[Tensor], heads: int, skip: int, eps: float
) -> Tensor:
    return tokens.new_empty(tokens.shape[0], tokens.shape[2])
