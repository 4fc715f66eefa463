"""The specification: InternVL3.5-Flash's visual side in plain PyTorch, one function per op.

Everything else in this package is measured against these functions. They are written to be read, not to be fast, and
take any device and dtype; gradients come from autograd. Symbols: P tiles, N ViT tokens per tile (1024), V the ViT's
hidden size, H the language model's, T packed visual tokens.

Sources: ViCO (arXiv 2510.12793), InternVL3.5 (arXiv 2508.18265) and the released modelling code's behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt, log, log1p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "attention_pool",
    "compress_sequence",
    "connector",
    "connector_64",
    "connector_256",
    "consistency_loss",
    "merge_tokens",
    "normalized_shuffle",
    "pixel_shuffle",
    "plan_tokens",
    "released_route",
    "router_gate",
    "router_pool",
]

Weights = Mapping[str, Tensor]


def _square_grid(tokens: Tensor, skip: int) -> tuple[int, int]:
    side = isqrt(tokens.shape[1] - skip)
    return side, side


def pixel_shuffle(
    tokens: Tensor,
    rate: int,
    *,
    grid: tuple[int, int] | None = None,
    tile_index: Tensor | None = None,
    skip: int = 1,
    version: str = "v2",
) -> Tensor:
    """Space-to-depth on the token grid: [P, skip + N, V] -> [M, N / rate^2, rate^2 V].

    Output token (h', w') is the row-major concatenation over (i, j) in [0, rate)^2 of the ViT tokens
    x[rate h' + i, rate w' + j]. ``tile_index`` [M] selects tiles; ``version`` "v1" leaves the output grid transposed.
    """
    grid_h, grid_w = grid or _square_grid(tokens, skip)
    x = tokens[:, skip:] if tile_index is None else tokens[tile_index, skip:]
    x = x.reshape(len(x), grid_h // rate, rate, grid_w // rate, rate, tokens.shape[2])
    x = x.permute(0, 1, 3, 2, 4, 5) if version == "v2" else x.permute(0, 3, 1, 2, 4, 5)
    return x.reshape(len(x), (grid_h // rate) * (grid_w // rate), rate * rate * tokens.shape[2])


def normalized_shuffle(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    rate: int,
    *,
    eps: float = 1e-5,
    grid: tuple[int, int] | None = None,
    tile_index: Tensor | None = None,
    skip: int = 1,
    version: str = "v2",
) -> Tensor:
    """LayerNorm over the rate^2 V channels of :func:`pixel_shuffle`'s output."""
    x = pixel_shuffle(tokens, rate, grid=grid, tile_index=tile_index, skip=skip, version=version)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def connector_256(tokens: Tensor, weights: Weights, *, tile_index: Tensor | None = None, **shuffle: Any) -> Tensor:
    """``mlp1``: LayerNorm(4V) -> Linear(4V, H) -> GELU -> Linear(H, H); [P, 1 + N, V] -> [M, N / 4, H]."""
    w = weights
    x = normalized_shuffle(tokens, w["mlp1.0.weight"], w["mlp1.0.bias"], 2, tile_index=tile_index, **shuffle)
    x = F.gelu(F.linear(x, w["mlp1.1.weight"], w["mlp1.1.bias"]))
    return F.linear(x, w["mlp1.3.weight"], w["mlp1.3.bias"])


def connector_64(tokens: Tensor, weights: Weights, *, tile_index: Tensor | None = None, **shuffle: Any) -> Tensor:
    """``mlp2`` in evaluation mode: [P, 1 + N, V] -> [M, N / 16, H].

    LayerNorm(16V) -> Linear(16V, 2H) -> GELU -> Linear(2H, 2H) -> GELU -> Linear(2H, H); training drops out 0.1 after
    each GELU.
    """
    w = weights
    x = normalized_shuffle(tokens, w["mlp2.0.weight"], w["mlp2.0.bias"], 4, tile_index=tile_index, **shuffle)
    x = F.gelu(F.linear(x, w["mlp2.1.weight"], w["mlp2.1.bias"]))
    x = F.gelu(F.linear(x, w["mlp2.4.weight"], w["mlp2.4.bias"]))
    return F.linear(x, w["mlp2.7.weight"], w["mlp2.7.bias"])


def connector(tokens: Tensor, weights: Weights, compress: Tensor, **shuffle: Any) -> Tensor:
    """The released dual connector: both connectors on every tile, the chosen one kept; packed [T, H] in tile order."""
    full = connector_256(tokens, weights, **shuffle)
    small = connector_64(tokens, weights, **shuffle)
    chosen = [small[t] if compress[t] else full[t] for t in range(len(tokens))]
    return torch.cat(chosen) if chosen else full.new_empty(0, full.shape[-1])


def attention_pool(tokens: Tensor, query: Tensor, *, skip: int = 1) -> tuple[Tensor, Tensor]:
    """Mean of a tile's tokens x under each head's softmax: [P, skip + N, V], [P, h, V] -> [P, h, V], lse [P, h].

    s[p, h, t] = query[p, h] . x[p, t]; context[p, h] = sum_t softmax_t(s) x[p, t]; lse = logsumexp_t(s).
    """
    x = tokens[:, skip:]
    scores = query @ x.transpose(1, 2)
    return scores.softmax(-1) @ x, scores.logsumexp(-1)


def router_pool(tokens: Tensor, weights: Weights, *, num_heads: int = 16, skip: int = 1, eps: float = 1e-5) -> Tensor:
    """``pooling_before_gating``: [P, skip + N, V] -> [P, V].

    Four rounds of multi-head attention of one query over the tile's tokens, each output LayerNormed and used as the
    next round's query, without residual. Round 1 uses attn1 and norm1; rounds 2, 3 and 4 all use attn2 and norm2.
    """
    # NOTE: contiguous, or torch multiplies 1024 small matrices where the weights need no gradient, at half the speed
    keys = tokens[:, skip:].transpose(0, 1).contiguous()
    tiles, channels = tokens.shape[0], tokens.shape[2]
    query = weights["pooling_before_gating.query_token"].to(tokens).expand(tiles, channels)
    for name in ("1", "2", "2", "2"):
        attn = f"pooling_before_gating.attn{name}"
        out, _ = F.multi_head_attention_forward(
            query[None],
            keys,
            keys,
            channels,
            num_heads,
            weights[f"{attn}.in_proj_weight"],
            weights[f"{attn}.in_proj_bias"],
            None,
            None,
            False,
            0.0,
            weights[f"{attn}.out_proj.weight"],
            weights[f"{attn}.out_proj.bias"],
            need_weights=False,
        )
        norm = f"pooling_before_gating.norm{name}"
        query = F.layer_norm(out[0], (channels,), weights[f"{norm}.weight"], weights[f"{norm}.bias"], eps)
    return query


def router_gate(pooled: Tensor, weights: Weights, *, eps: float = 1e-5) -> Tensor:
    """``gating`` in evaluation mode: [P, V] -> class probabilities [P, 2]; class 0 means 64 tokens are enough.

    Four blocks x + LN(Linear(GELU(Linear(x)))), then LN -> Linear(V, 2) -> softmax.
    """
    x = pooled
    for block in (f"gating.block{i}" for i in range(1, 5)):
        h = F.gelu(F.linear(x, weights[f"{block}.0.weight"], weights[f"{block}.0.bias"]))
        h = F.linear(h, weights[f"{block}.3.weight"], weights[f"{block}.3.bias"])
        x = x + F.layer_norm(h, h.shape[-1:], weights[f"{block}.5.weight"], weights[f"{block}.5.bias"], eps)
    x = F.layer_norm(x, x.shape[-1:], weights["gating.gate.0.weight"], weights["gating.gate.0.bias"], eps)
    return F.linear(x, weights["gating.gate.1.weight"], weights["gating.gate.1.bias"]).softmax(-1)


def released_route(
    p: Tensor, relative: float, absolute: float, *, tiles_per_image: Sequence[int] | None = None
) -> Tensor:
    """Tiles to compress [P]: p > quantile(p, relative) and p >= absolute; p [P] is the probability of class 0.

    The quantile is over all tiles of the call, as released, or within each image where ``tiles_per_image`` is given.
    """
    groups = p.split(list(tiles_per_image)) if tiles_per_image is not None else (p,)
    chosen = [(g > torch.quantile(g, relative)) & (g >= absolute) for g in groups if len(g)]
    return torch.cat(chosen) if chosen else p.new_empty(0, dtype=torch.bool)


def plan_tokens(compress: Tensor, full_tokens: int = 256, compressed_tokens: int = 64) -> tuple[Tensor, Tensor]:
    """Offsets of each tile's tokens in the packed order, and the tiles ordered by connector.

    Returns ``cu_tokens`` [P + 1] int64 and ``order`` [P] int64: the tiles that stay whole, ascending, then those that
    are compressed, ascending.
    """
    tokens = torch.where(compress, compressed_tokens, full_tokens)
    return F.pad(tokens.cumsum(0), (1, 0)), compress.to(torch.uint8).argsort(stable=True)


def merge_tokens(embeds: Tensor, tokens: Tensor, source: Tensor) -> Tensor:
    """Rows [len(source), H]: zero where source is -1, else row ``source`` of embeds [R, H] then tokens [T, H]."""
    rows = torch.cat([embeds, tokens, embeds.new_zeros(1, embeds.shape[1])])
    return rows[source]


def compress_sequence(
    input_ids: Tensor, compress: Tensor, placeholder: int, *, full_tokens: int = 256, compressed_tokens: int = 64
) -> Tensor:
    """Positions to keep [B, L]: all but the last full_tokens - compressed_tokens placeholders of each compressed tile.

    Each tile owns ``full_tokens`` consecutive placeholders, tiles in reading order over the rows of ``input_ids``.
    """
    flat = input_ids.flatten()
    keep = torch.ones_like(flat, dtype=torch.bool)
    positions = (flat == placeholder).nonzero()[:, 0]
    owned = positions.split(full_tokens) if len(compress) else ()
    for tile, own in enumerate(owned):
        if compress[tile]:
            keep[own[compressed_tokens:]] = False
    return keep.view_as(input_ids)


def consistency_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    beta: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence of the policy's next-token distribution q from the reference's p, per token: [T], and both lse [T].

    z = (hidden weight^T + bias) / temperature, q = softmax(z), lse = logsumexp(z); likewise p, from ref_hidden
    [T, H_ref] and ref_weight [vocabulary, H_ref]. ``beta`` 0: the forward KL(p || q) that ViCO minimises; 1: the
    reverse KL(q || p); between: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.
    """
    z = F.linear(hidden, weight, bias) / temperature
    ref_z = F.linear(ref_hidden, ref_weight, ref_bias) / temperature
    log_q, log_p = z.log_softmax(-1), ref_z.log_softmax(-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if beta == 0:
        loss = kl(log_p, log_q)
    elif beta == 1:
        loss = kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p + log(beta), log_q + log1p(-beta))
        loss = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return loss, z.logsumexp(-1), ref_z.logsumexp(-1)
