"""compress_sequence: fake kernels. Integers only, so there are no gradients."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("vico::keep_placeholders")
def _(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    compress: Tensor,
    placeholder: int,
    full_tokens: int,
    compressed_tokens: int,
) -> tuple[Tensor, Tensor]:
    return input_ids.new_empty(input_ids.shape, dtype=torch.bool), input_ids.new_empty(input_ids.shape[0])


@torch.library.register_fake("vico::compress_sequence")
def _(input_ids: Tensor, keep: Tensor, placeholder: int, length: int, pad_left: bool) -> tuple[Tensor, Tensor]:
    rows = input_ids.shape[0]
    return input_ids.new_empty(rows, length), input_ids.new_empty(rows, length)


@torch.library.register_fake("vico::renumber_positions")
def _(position_ids: Tensor, position: Tensor) -> Tensor:
    return position.new_empty(position.shape)


@torch.library.register_fake("vico::tile_rows")
def _(source: Tensor, cu_tokens: Tensor, embed_rows: int) -> Tensor:
    return source.new_empty(cu_tokens.shape[0] - 1)
