"""The visual resolution router: absorbed attention pooling and the gating head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vico_ext._load import _C
from vico_ext.functional.autocast import cast_for_product
from vico_ext.ops.call import call

__all__ = ["attention_pool", "router_gate", "router_pool", "skinny_linear"]

# Most rows for which the own kernel runs instead of F.linear. It was measured for K and N in {1024, 3200, 4096, 12800}
# with AVX2: at every size up to these rows at least as fast as torch's GEMM in float32 (2 to 4 times at 4 rows, 1.0 to
# 1.5 times at 32) and float64. In 16 bits it was 3 to 4 times as fast at any number of rows; the bound is there for
# CPUs whose matrix units speak those types, which a GEMM of more rows can use. On an H100 cuBLAS is as fast at 32 rows.
_MOST_ROWS = {torch.float32: 32, torch.float64: 24, torch.bfloat16: 64, torch.float16: 64}

Attention = tuple[Tensor, Tensor, Tensor, Tensor]
Norm = tuple[Tensor, Tensor]
Block = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def attention_pool(tokens: Tensor, query: Tensor, *, has_cls: bool = True) -> Tensor:
    """Mean of a tile's tokens under each head's softmax over query . token.

    context[p, h] = sum_t softmax_t(query[p, h] . x[p, t]) x[p, t], over the N tokens x of tile p. With query =
    W_k^T q / sqrt(d) this is multi-head attention of one query, but for the value projection (which commutes with the
    mean) and the key bias (which the softmax cancels): the tokens are never projected. Sums are kept in float32, or
    float64 for float64 tokens, and neither the number of threads nor the other tiles change a bit of a tile's result.

    Args:
        tokens: ``[P, 1 + N, V]`` with the CLS token in front, or ``[P, N, V]``; any strides.
        query: ``[P, heads, V]``, scaled already, or one for all tiles: ``[1, heads, V]``.
        has_cls: whether a CLS token leads each tile; it is skipped.

    Returns:
        ``[P, heads, V]``, dtype of ``tokens``. Under autocast both inputs are cast to its dtype.

    Raises:
        ValueError: shapes that do not fit, or no tokens besides the CLS token.
    """
    if tokens.dim() != 3:
        raise ValueError(f"tokens must have shape [tiles, tokens, channels], got {list(tokens.shape)}")
    if tokens.shape[1] <= int(has_cls):
        raise ValueError(
            f"tokens must hold at least one token per tile{' after the CLS token' if has_cls else ''}, got shape "
            f"{list(tokens.shape)} with has_cls={has_cls}"
        )
    if query.dim() != 3 or query.shape[2] != tokens.shape[2] or query.shape[0] not in (1, tokens.shape[0]):
        raise ValueError(
            f"query must have shape [tiles or 1, heads, channels] = [{tokens.shape[0]} or 1, *, {tokens.shape[2]}], "
            f"got {list(query.shape)}"
        )
    return _attention_pool(cast_for_product(tokens), cast_for_product(query), int(has_cls))


def _attention_pool(tokens: Tensor, query: Tensor, skip: int) -> Tensor:
    return call(torch.ops.vico.attention_pool, tokens, query.expand(tokens.shape[0], -1, -1), skip)[0]


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` for few rows, where reading the weight once is what costs.

    Runs the own kernel up to 32 rows in float32, 24 in float64 and 64 in 16 bits on the CPU, else ``F.linear``. In the
    own kernel a row's result has the same bits whatever the other rows are.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]``, dtype of ``x``. Under autocast all inputs are cast to its dtype.

    Raises:
        ValueError: a weight or bias whose shape does not fit.
    """
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight must have shape [features, {x.shape[-1] if x.dim() else 1}] to fit x of shape {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    x, weight = cast_for_product(x), cast_for_product(weight)
    bias = bias if bias is None else cast_for_product(bias)
    rows = x.numel() // max(x.shape[-1], 1)
    if x.device.type != "cpu" or rows > _MOST_ROWS.get(x.dtype, 0):
        return F.linear(x, weight, bias)
    return call(torch.ops.vico.skinny_linear, x.reshape(rows, x.shape[-1]), weight, bias).view(
        *x.shape[:-1], weight.shape[0]
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The router's linear layers, x [P, K] or one map per head, x [P, heads, K] with weight [heads, N, K].

    NOTE: the own kernel at any P, also where F.linear would be a little faster: a tile's probability must not depend on
    how many other tiles the call has, and a GEMM chooses its order of summation by the shape.
    """
    return call(torch.ops.vico.skinny_linear, x, weight, bias)


def _as_one_call(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the CUDA kernels of a whole half of the router may run: they have no gradient and cast nothing.

    Launched one by one from Python, the router's kernels take less time than their launches.
    """
    return (
        (x.is_cuda or _C.cuda == "host")  # the test build, whose CUDA kernels take CPU tensors
        and not torch.is_autocast_enabled(x.device.type)
        and all(w.dtype == x.dtype for w in weights)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)))
    )


def _layer_norm(x: Tensor, norm: Norm, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm[0], norm[1], eps).to(x.dtype)


def router_pool(
    tokens: Tensor,
    query_token: Tensor,
    attn1: Attention,
    norm1: Norm,
    attn2: Attention,
    norm2: Norm,
    num_heads: int,
    *,
    has_cls: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    """Four rounds of one query attending to a tile's tokens: [P, 1 + N, V] -> [P, V].

    Each round's output is LayerNormed and is the next round's query, without residual. Round 1 uses attn1 and norm1 and
    a query that is the same for all tiles; rounds 2, 3 and 4 use attn2 and norm2. Equivalent to
    :func:`vico_ext.reference.router_pool`, with keys and values absorbed (:func:`attention_pool`).

    Args:
        tokens: ``[P, 1 + N, V]`` with the CLS token in front, or ``[P, N, V]``; any strides.
        query_token: ``[1, V]``.
        attn1, attn2: in_proj_weight ``[3V, V]``, in_proj_bias ``[3V]``, out_proj.weight ``[V, V]`` and
            out_proj.bias ``[V]``.
        norm1, norm2: weight ``[V]``, bias ``[V]``.
        num_heads: divides V.
        has_cls: whether a CLS token leads each tile; it is skipped.
        eps: of the LayerNorms.

    Returns:
        ``[P, V]``, dtype of ``tokens``, or autocast's. A tile's row has the same bits whatever the other tiles are.

    Raises:
        ValueError: shapes that do not fit, or heads that do not divide V.
        TypeError: tokens and weights of different dtypes.
    """
    channels = query_token.shape[-1]
    if tokens.dim() != 3 or tokens.shape[2] != channels or tokens.shape[1] <= int(has_cls):
        raise ValueError(
            f"tokens must have shape [tiles, {'1 + ' if has_cls else ''}tokens, channels] with {channels} channels and "
            f"at least one token per tile, got {list(tokens.shape)} with has_cls={has_cls}"
        )
    if channels % num_heads:
        raise ValueError(f"num_heads must divide the channels, got {num_heads} heads for {channels} channels")
    tokens, query = cast_for_product(tokens), cast_for_product(query_token)
    if tokens.dtype != query.dtype:
        raise TypeError(
            f"tokens must have the dtype of the router's weights, {query.dtype}, got {tokens.dtype}: cast the tokens "
            "or the router, or use autocast"
        )
    first, later_round = [*attn1, *norm1], [*attn2, *norm2]
    if _as_one_call(tokens, [query, *first, *later_round]):
        return torch.ops.vico.router_pool(tokens, query, first, later_round, num_heads, int(has_cls), eps)
    head = channels // num_heads
    attention, norm = _absorbed(attn1, num_heads), norm1
    later = _absorbed(attn2, num_heads)
    for _ in range(4):
        w_query, b_query, w_key, w_value, b_value, w_out, b_out = attention
        q = _linear(query, w_query, b_query) * head**-0.5
        context = _attention_pool(tokens, _linear(q.view(-1, num_heads, head), w_key), int(has_cls))
        out = _linear(_linear(context, w_value, b_value).flatten(1), w_out, b_out)
        query = _layer_norm(out, norm, eps)
        attention, norm = later, norm2
    return query


def _absorbed(attn: Attention, heads: int) -> tuple[Tensor, ...]:
    """W_q [V, V], b_q [V], and per head W_k^T [heads, V, d], W_v [heads, d, V], b_v [heads, d]; W_out, b_out."""
    in_weight, in_bias, out_weight, out_bias = (cast_for_product(t) for t in attn)
    w_query, w_key, w_value = in_weight.chunk(3)
    b_query, _, b_value = in_bias.chunk(3)
    # Not unflatten: torch 2.11 cannot compile it where a default device is set.
    w_key = w_key.reshape(heads, -1, w_key.shape[1]).transpose(1, 2)
    w_value, b_value = w_value.reshape(heads, -1, w_value.shape[1]), b_value.reshape(heads, -1)
    return w_query, b_query, w_key, w_value, b_value, out_weight, out_bias


def router_gate(
    pooled: Tensor,
    blocks: Sequence[Block],
    gate: Attention,
    *,
    dropout: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
    probability: bool = False,
) -> Tensor:
    """The gating head: blocks x + LN(dropout(W2 dropout(GELU(W1 x + b1)) + b2)), then LN -> Linear(V, 2).

    Args:
        pooled: ``[P, V]``.
        blocks: of each block W1 ``[4V, V]``, b1, W2 ``[V, 4V]``, b2, and its LayerNorm's weight and bias ``[V]``.
        gate: the last LayerNorm's weight and bias ``[V]``, and the classifier's weight ``[2, V]`` and bias ``[2]``.
        dropout: probability, in training only.
        training: whether to drop.
        eps: of the LayerNorms.
        probability: whether the softmax's class 0 is wanted and not the logits.

    Returns:
        Logits ``[P, 2]``, dtype of ``pooled`` or autocast's; class 0 means that 64 tokens are enough. Or its
        probability ``[P]``, float32, float64 for float64: :func:`vico_ext.reference.router_gate`.
    """
    layers = [t for block in blocks for t in block]
    if (dropout == 0 or not training) and _as_one_call(pooled, [*layers, *gate]):
        return torch.ops.vico.router_gate(pooled, layers, list(gate), eps, probability)
    x = cast_for_product(pooled)
    for w1, b1, w2, b2, *norm in blocks:
        h = F.dropout(F.gelu(_linear(x, cast_for_product(w1), cast_for_product(b1))), dropout, training)
        h = F.dropout(_linear(h, cast_for_product(w2), cast_for_product(b2)), dropout, training)
        x = x + _layer_norm(h, (norm[0], norm[1]), eps)
    logits = _linear(_layer_norm(x, gate[:2], eps), cast_for_product(gate[2]), cast_for_product(gate[3]))
    if not probability:
        return logits
    return logits.softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)[:, 0]
