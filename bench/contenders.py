"""Whom vico_ext is compared with: the released semantics, and the best plain PyTorch that a skilled user would write.

Both compute what ``vico_ext`` computes for the whole visual side after the ViT: router, plan, connectors, and the
visual tokens written over the kept placeholders of the shortened sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vico_ext import reference

Weights = Mapping[str, Tensor]
NUM_HEADS = 16
RELATIVE = 0.5  # the call-wide median: half of the tiles are compressed


@dataclass(frozen=True)
class Inputs:
    """One call: ViT tokens [P, 1 + N, V], a prompt [L] with 256 placeholders per tile, its embeddings [L, H]."""

    tokens: Tensor
    input_ids: Tensor
    embeds: Tensor
    placeholder: int


# ---- released: both connectors on every tile, keys and values of all tokens projected in each of four rounds


def released_visual_side(x: Inputs, w: Weights, *, parts: ReleasedParts | None = None) -> Tensor:
    """The released order of things, per-tile loop included."""
    parts = parts or ReleasedParts()
    with torch.no_grad():  # a decision has no gradient
        p = parts.route(x.tokens, w)[:, 0]
    compress = reference.released_route(p.float(), RELATIVE, 0.0)
    full, small = parts.connectors(x.tokens, w)
    visual = torch.cat([small[t] if compress[t] else full[t] for t in range(len(compress))])
    keep = reference.compress_sequence(x.input_ids, compress, x.placeholder)
    ids, embeds = x.input_ids[keep], x.embeds[keep]
    embeds[ids == x.placeholder] = visual
    return embeds


class ReleasedParts:
    """The heavy parts of the released code, replaceable by their compiled twins."""

    def __init__(self, wrap: Callable[[Callable], Callable] = lambda fn: fn) -> None:
        self.route = wrap(_released_router)
        self.connectors = wrap(_released_connectors)


def _released_router(tokens: Tensor, w: Weights) -> Tensor:
    return reference.router_gate(reference.router_pool(tokens, w, num_heads=NUM_HEADS), w)


def _released_connectors(tokens: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    return reference.connector_256(tokens, w), reference.connector_64(tokens, w)


# ---- routed: what a skilled user writes in plain PyTorch: chosen connector only, absorbed attention pooling


def routed_visual_side(x: Inputs, w: Weights) -> Tensor:
    with torch.no_grad():
        p = routed_router(x.tokens, w)[:, 0]
    compress = (p > torch.quantile(p.float(), RELATIVE)) & (p >= 0.0)
    visual = routed_connector(x.tokens, w, compress)
    return routed_merge(x.embeds, x.input_ids, visual, compress, x.placeholder)


def routed_router(tokens: Tensor, w: Weights) -> Tensor:
    return reference.router_gate(routed_pool(tokens, w), w)


def routed_pool(tokens: Tensor, w: Weights) -> Tensor:
    """Absorbed attention pooling with batched matrix products."""
    x = tokens[:, 1:]
    tiles, channels = x.shape[0], x.shape[2]
    head = channels // NUM_HEADS
    query = w["pooling_before_gating.query_token"].expand(tiles, channels)
    for name in ("1", "2", "2", "2"):
        attn, norm = f"pooling_before_gating.attn{name}", f"pooling_before_gating.norm{name}"
        w_q, w_k, w_v = w[f"{attn}.in_proj_weight"].chunk(3)
        b_q, _, b_v = w[f"{attn}.in_proj_bias"].chunk(3)
        q = F.linear(query, w_q, b_q).view(tiles, NUM_HEADS, head).transpose(0, 1) * head**-0.5
        absorbed = torch.bmm(q, w_k.view(NUM_HEADS, head, channels)).transpose(0, 1)
        weights = torch.bmm(absorbed, x.transpose(1, 2)).softmax(-1)
        context = torch.bmm(weights, x)
        value = torch.bmm(context.transpose(0, 1), w_v.view(NUM_HEADS, head, channels).transpose(1, 2))
        value = value.transpose(0, 1).reshape(tiles, channels) + b_v
        out = F.linear(value, w[f"{attn}.out_proj.weight"], w[f"{attn}.out_proj.bias"])
        query = F.layer_norm(out, (channels,), w[f"{norm}.weight"], w[f"{norm}.bias"])
    return query


def routed_connector(tokens: Tensor, w: Weights, compress: Tensor) -> Tensor:
    """Only the chosen connector on each tile, scattered to packed rows."""
    full_index, small_index = (~compress).nonzero()[:, 0], compress.nonzero()[:, 0]
    full = reference.connector_256(tokens, w, tile_index=full_index)
    small = reference.connector_64(tokens, w, tile_index=small_index)
    counts = torch.where(compress, small.shape[1], full.shape[1])
    start = F.pad(counts.cumsum(0), (1, 0))
    out = tokens.new_empty(full.shape[0] * full.shape[1] + small.shape[0] * small.shape[1], full.shape[2])
    rows = (start[full_index, None] + torch.arange(full.shape[1], device=full.device)).flatten()
    out = out.index_copy(0, rows, full.flatten(0, 1))
    rows = (start[small_index, None] + torch.arange(small.shape[1], device=small.device)).flatten()
    return out.index_copy(0, rows, small.flatten(0, 1))


def routed_merge(embeds: Tensor, input_ids: Tensor, visual: Tensor, compress: Tensor, placeholder: int) -> Tensor:
    """The kept rows of [L, H], visual tokens over the kept placeholders, without a loop over tiles."""
    is_visual = input_ids == placeholder
    rank = is_visual.cumsum(0) - 1
    drop = is_visual & compress[(rank // 256).clamp(0, len(compress) - 1)] & (rank % 256 >= 64)
    keep = ~drop
    kept, is_visual = embeds[keep], is_visual[keep]
    return kept.masked_scatter(is_visual[:, None], visual)
