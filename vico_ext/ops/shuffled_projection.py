"""shuffle_statistics and shuffled_projection: fake kernels.

No gradient: functional.connector takes another way where one is wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vico_ext.ops.normalized_shuffle import sum_dtype
from vico_ext.ops.second_derivative import refuse_derivative


@torch.library.register_fake("vico::shuffle_statistics")
def _(
    tokens: Tensor,
    eps: float,
    grid_h: int,
    grid_w: int,
    rate: int,
    tile_index: Tensor | None = None,
    skip: int = 0,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    selected = tokens.shape[0] if tile_index is None else tile_index.shape[0]
    shape = (selected, (grid_h // rate) * (grid_w // rate))
    mean, rstd = (tokens.new_empty(shape, dtype=sum_dtype(tokens)) for _ in range(2))
    return mean, rstd


@torch.library.register_fake("vico::shuffled_projection")
def _(
    tokens: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    gain_sum: Tensor,
    bias: Tensor | None,
    grid_h: int,
    grid_w: int,
    rate: int,
    tile_index: Tensor | None,
    skip: int,
    transposed: bool,
    gelu: bool,
    x: Tensor | None = None,
    x_weight: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = tokens.new_empty(*mean.shape, weight.shape[0])
    if x is None or x_weight is None:
        return out, tokens.new_empty(0)
    return out, x.new_empty(*x.shape[:-1], x_weight.shape[0])


refuse_derivative(
    "there is none with the norm folded into the weight: functional.connector takes another way where a gradient is "
    "wanted, and normalized_shuffle and projection have gradients",
    "shuffle_statistics",
    "shuffled_projection",
)
