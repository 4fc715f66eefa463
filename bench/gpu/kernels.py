"""Single kernels that no case of ``bench/cases.py`` times alone: backward ops without autograd, and sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import PLACEHOLDER, Size, half_plan, inputs, no_grad
from interleaved import Contenders

import vico_ext
from vico_ext import functional as VF

__all__ = [
    "bias_gelu_backward",
    "compress_sequence",
    "keep_placeholders",
    "normalized_shuffle_backward",
    "shuffle_statistics",
    "tile_rows",
]


def normalized_shuffle_backward(rate: int) -> Callable[[Size, int], Contenders]:
    def build(size: Size, tiles: int) -> Contenders:
        tokens, channels = inputs(size, tiles).tokens, rate * rate * size.vit
        weight, bias = torch.randn(channels), torch.randn(channels)
        layout = (32, 32, rate, None, 1, False)
        out, mean, rstd = torch.ops.vico.normalized_shuffle(tokens, weight, bias, 1e-5, *layout)
        grad = torch.randn_like(out)
        arguments = (grad, tokens, weight, mean, rstd, *layout, True)
        return no_grad({"vico_ext": lambda: torch.ops.vico.normalized_shuffle_backward(*arguments)})

    return build


def shuffle_statistics(rate: int) -> Callable[[Size, int], Contenders]:
    def build(size: Size, tiles: int) -> Contenders:
        tokens = inputs(size, tiles).tokens
        return no_grad(
            {"vico_ext": lambda: torch.ops.vico.shuffle_statistics(tokens, 1e-5, 32, 32, rate, None, 1, False)}
        )

    return build


def bias_gelu_backward(size: Size, tiles: int) -> Contenders:
    x, grad = (torch.randn(256 * tiles, size.llm) for _ in range(2))
    bias = torch.randn(size.llm)
    return no_grad({"vico_ext": lambda: torch.ops.vico.bias_gelu_backward(grad, x, bias, None, 0.0)})


def keep_placeholders(size: Size, tiles: int) -> Contenders:
    ids, compress = inputs(size, tiles).input_ids[None], half_plan(tiles).compress
    return no_grad({"vico_ext": lambda: VF.keep_placeholders(ids, compress, placeholder_id=PLACEHOLDER)})


def compress_sequence(size: Size, tiles: int) -> Contenders:
    ids, plan = inputs(size, tiles).input_ids[None], half_plan(tiles)
    keep, _ = VF.keep_placeholders(ids, plan.compress, placeholder_id=PLACEHOLDER)
    length = ids.shape[1] - 192 * plan.compressed_tiles
    return no_grad({"vico_ext": lambda: VF.compress_positions(ids, keep, length, placeholder_id=PLACEHOLDER)})


def tile_rows(size: Size, tiles: int) -> Contenders:
    ids, plan = inputs(size, tiles).input_ids[None], half_plan(tiles)
    source = vico_ext.compress_sequence(ids, plan, placeholder_id=PLACEHOLDER).source.flatten()
    return no_grad({"vico_ext": lambda: VF.tile_rows(source, plan.cu_tokens, ids.numel())})
