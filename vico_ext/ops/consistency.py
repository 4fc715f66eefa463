"""consistency_loss: the op composed of torch's matrix products and the compiled kernels; fake kernels and gradient.

Tokens are taken in blocks, the vocabulary in chunks. A block's logits of both models live in one workspace of bounded
size. Round one multiplies a chunk of both heads and takes the logits, still in cache, into the tokens' running
log-sum-exps and divergence; the last round turns each chunk of policy logits into dL/dlogits in place and multiplies
it back. So every product of eager PyTorch is computed once and none twice: two for the logits, one for the gradient of
the hidden states, one for the head's where it is wanted.

Gradients. A token's loss depends on its own hidden state alone, so ``grad_hidden`` holds dL_t/dh_t, unscaled, and
backward multiplies row t by whatever arrives for token t: right for any reduction. The head's gradient is a sum over
tokens, whose coefficients must be known when it is taken: ``grad_weight`` is that of ``total`` = sum_t w_t L_t, and
backward scales it. If a gradient arrives for the per-token losses instead, backward runs the op once more with the
coefficients that arrived as token weights: two products more, in the same bounded memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_FIELDS = 6  # of a token's running state: ConsistencyRow in csrc/consistency/consistency.h
# Words in a chunk. On the CPU a block's logits of a chunk stay in cache, and threads have few chunks to wait for.
_CHUNK_WORDS = {"cpu": 8192, "cuda": 32768}
# Bytes for a block's logits. A GPU needs more tokens in a block before reading the heads is not what it waits for: 1024
# of Qwen3's 151,936 words.
_WORKSPACE = {"cpu": 256 << 20, "cuda": 1200 << 20}
_MOST_BLOCK_TOKENS = 1024
# A block of a GPU is whole tiles of its matrix products: 820 tokens take as long as 896.
_TILE_TOKENS = {"cpu": 1, "cuda": 128}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _accumulate(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _block_size(tokens: int, words: int, itemsize: int, wanted: int, device: str = "cpu") -> int:
    """Tokens per block: as asked, or as many as the workspace holds; blocks are of about one size, whole tiles."""
    most = wanted or max(16, min(_MOST_BLOCK_TOKENS, _WORKSPACE[device] // max(1, 2 * words * itemsize)))
    tile = 1 if wanted or most < _TILE_TOKENS[device] else _TILE_TOKENS[device]
    most -= most % tile
    blocks = -(-tokens // most)
    block = -(-tokens // max(1, blocks))
    return min(tokens, -(-block // tile) * tile)


def _operand(t: Tensor) -> Tensor:
    """The tensor as matrix products take it: on the CPU 16-bit operands would give 16-bit logits."""
    return t.to(_accumulate(t)) if t.device.type == "cpu" else t


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b; 16-bit operands, on a GPU, have float32 products."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, with a rounded to the type of b: to 16 bits on a GPU, as eager PyTorch rounds its gradients."""
    if b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a.to(b.dtype), b, out_dtype=total.dtype, out=total)  # on CUDA a often is of that dtype


class _Chunk(NamedTuple):
    """A chunk of the vocabulary: rows of both heads, and the workspace for a block's logits."""

    weight: Tensor  # [words, H]
    ref_weight: Tensor  # [words, H_ref]
    bias: Tensor | None
    ref_bias: Tensor | None
    logits: Tensor  # [block, words]
    ref_logits: Tensor
    gradient: Tensor | None  # [block, words], the chunks' one place for dL/dlogits; None: that of the logits


def _chunks(
    weight: Tensor,
    bias: Tensor | None,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    block: int,
    dtype: torch.dtype,
    rounded: bool,
) -> list[_Chunk]:
    size = _CHUNK_WORDS[weight.device.type]
    # Rounded as the products take it, once and by the kernel that computes it.
    gradient = weight.new_empty(block * min(size, len(weight))) if rounded else None

    def split(t: Tensor | None) -> tuple[Tensor, ...] | list[None]:
        return [None] * count if t is None else t.to(dtype).contiguous().split(size)

    weights = weight.split(size)
    count = len(weights)

    def logits(words: int) -> Tensor:
        return weight.new_empty(block, words, dtype=dtype)

    def of_gradient(words: int) -> Tensor | None:
        return None if gradient is None else gradient[: block * words].view(block, words)

    return [
        _Chunk(w, ref_w, b, ref_b, logits(len(w)), logits(len(w)), of_gradient(len(w)))
        for w, ref_w, b, ref_b in zip(weights, ref_weight.split(size), split(bias), split(ref_bias), strict=True)
    ]


def _consistency_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    token_weights: Tensor | None,
    temperature: float,
    beta: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    block_tokens: int = 0,
) -> tuple[Tensor, ...]:
    _check(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, token_weights)
    _check_numbers(temperature, beta, block_tokens)
    dtype, device = _accumulate(hidden), hidden.device.type
    # Fails here, and not after the first products, where there are no kernels for this device.
    torch.ops.vico.consistency_result(hidden.new_empty(0, _FIELDS, dtype=torch.float64), beta)
    tokens, words = hidden.shape[0], weight.shape[0]
    active = None
    if token_weights is not None and device == "cpu":
        # Tokens of weight 0 are not computed at all.
        active = token_weights.nonzero()[:, 0]
        active = None if len(active) == tokens else active
    elif token_weights is not None:
        # Which they are, the host could only learn by waiting for the device: they are computed, from zeros.
        counts = (token_weights != 0)[:, None]
        hidden, ref_hidden = torch.where(counts, hidden, 0), torch.where(counts, ref_hidden, 0)
    count = tokens if active is None else len(active)
    loss, lse, ref_lse = (hidden.new_zeros(tokens, dtype=dtype) for _ in range(3))
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=dtype)
    grad_weight = weight.new_zeros(weight.shape if need_weight else (0,), dtype=dtype)
    grad_bias = weight.new_zeros(words if need_bias else 0, dtype=dtype)
    block = _block_size(count, words, dtype.itemsize, block_tokens, device)
    rounded = device == "cuda" and hidden.dtype.itemsize == 2 and (need_hidden or need_weight) and not need_bias
    chunks = _chunks(weight, bias, ref_weight, ref_bias, block, dtype, rounded) if count else []
    with torch.autocast(device, enabled=False):
        for begin in range(0, count, max(block, 1)):
            rows: Any = slice(begin, min(begin + block, count))
            if active is not None:
                rows = active[rows]
            h = _operand(hidden[rows])
            state = _logits(chunks, h, _operand(ref_hidden[rows]), beta, temperature)
            block_weights = h.new_ones(len(h), dtype=dtype) if token_weights is None else token_weights[rows]
            result = [r.to(dtype) for r in torch.ops.vico.consistency_result(state, beta)]
            loss[rows], lse[rows], ref_lse[rows] = result[0] * block_weights, *result[1:]
            if need_hidden or need_weight or need_bias:
                block_grad = _gradients(
                    chunks,
                    h,
                    block_weights,
                    state,
                    beta,
                    temperature,
                    need_hidden,
                    grad_weight.split(_CHUNK_WORDS[device]) if need_weight else None,
                    grad_bias.split(_CHUNK_WORDS[device]) if need_bias else None,
                )
                if need_hidden:
                    grad_hidden[rows] = block_grad
        if token_weights is not None and active is None:
            lse, ref_lse = (torch.where(token_weights != 0, t, 0) for t in (lse, ref_lse))
    return loss.sum(), loss, lse, ref_lse, grad_hidden, grad_weight, grad_bias


def _logits(chunks: list[_Chunk], h: Tensor, ref_h: Tensor, beta: float, temperature: float) -> Tensor:
    """Leaves the block's scaled logits in the chunks; the tokens' state."""
    state = h.new_zeros(len(h), _FIELDS, dtype=torch.float64)
    state[:, 0:4:2] = -torch.inf  # the maxima of no words
    for c in chunks:
        z, ref_z = c.logits[: len(h)], c.ref_logits[: len(h)]
        _product(h, _operand(c.weight).t(), z)
        _product(ref_h, _operand(c.ref_weight).t(), ref_z)
        torch.ops.vico.consistency_statistics_(z, ref_z, state, c.bias, c.ref_bias, beta, temperature)
    if 0 < beta < 1:
        for c in chunks:
            torch.ops.vico.consistency_mixture_(c.logits[: len(h)], c.ref_logits[: len(h)], state, beta)
    return state


def _gradients(
    chunks: list[_Chunk],
    h: Tensor,
    block_weights: Tensor,
    state: Tensor,
    beta: float,
    temperature: float,
    need_hidden: bool,
    grad_weight: tuple[Tensor, ...] | None,
    grad_bias: tuple[Tensor, ...] | None,
) -> Tensor:
    """Adds to the chunks' ``grad_weight`` and ``grad_bias``; the unscaled gradient of ``h``. Consumes the logits."""
    grad_h = torch.zeros_like(h, dtype=block_weights.dtype)
    weighted = (h * block_weights[:, None]).to(h.dtype)
    for i, c in enumerate(chunks):
        z, out = c.logits[: len(h)], None if c.gradient is None else c.gradient[: len(h)]
        torch.ops.vico.consistency_gradient_(z, c.ref_logits[: len(h)], state, beta, temperature, out)
        grad = z if out is None else out
        if need_hidden:
            _add_product(grad_h, grad, _operand(c.weight))
        if grad_weight is not None:
            _add_product(grad_weight[i], grad.t(), weighted)
        if grad_bias is not None:
            grad_bias[i].addmv_(grad.t(), block_weights)
    return grad_h


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    token_weights: Tensor | None,
) -> None:
    """Raises ValueError or TypeError for tensors that do not go together; reads no values."""
    sums = _accumulate(hidden)
    models = (("", hidden, weight, bias), ("ref_", ref_hidden, ref_weight, ref_bias))
    for prefix, h, w, b in models:
        if h.dtype not in _DTYPES:
            raise TypeError(f"{prefix}hidden must be float32, float64, bfloat16 or float16, got {h.dtype}")
        if w.dtype != h.dtype:
            raise TypeError(f"{prefix}weight must have the dtype of {prefix}hidden, {h.dtype}, got {w.dtype}")
        if b is not None and b.dtype not in (h.dtype, _accumulate(h)):
            raise TypeError(f"{prefix}bias must be {h.dtype} like {prefix}hidden, or {_accumulate(h)}, got {b.dtype}")
    if _accumulate(ref_hidden) != sums:
        raise TypeError(
            f"hidden and ref_hidden must both be float64 or neither, got {hidden.dtype} and {ref_hidden.dtype}"
        )
    if token_weights is not None and token_weights.dtype != sums:
        raise TypeError(f"token_weights must be {sums} beside hidden of {hidden.dtype}, got {token_weights.dtype}")
    for prefix, h, w, b in models:
        if h.dim() != 2:
            raise ValueError(f"{prefix}hidden must have shape [tokens, width], got {list(h.shape)}")
        if w.dim() != 2 or w.shape[1] != h.shape[1]:
            raise ValueError(
                f"{prefix}weight must have shape [vocabulary, {h.shape[1]}] to fit {prefix}hidden of shape "
                f"{list(h.shape)}, got {list(w.shape)}"
            )
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(f"{prefix}bias must have shape [{w.shape[0]}], got {list(b.shape)}")
    if ref_hidden.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"hidden and ref_hidden must hold the same tokens, got {hidden.shape[0]} and {ref_hidden.shape[0]}"
        )
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"weight and ref_weight must have one vocabulary, got {weight.shape[0]} and {ref_weight.shape[0]} words"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight must hold at least one word, got an empty vocabulary")
    if token_weights is not None and token_weights.shape != hidden.shape[:1]:
        raise ValueError(f"token_weights must have shape [{hidden.shape[0]}], got {list(token_weights.shape)}")


def _check_numbers(temperature: float, beta: float, block_tokens: int) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    if block_tokens < 0:
        raise ValueError(f"block_tokens must be positive, or 0 for automatic, got {block_tokens}")


for _key in ("CPU", "CUDA"):
    torch.library.impl("vico::consistency_loss", _key, _consistency_loss)


@torch.library.register_fake("vico::consistency_loss")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    token_weights: Tensor | None,
    temperature: float,
    beta: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    block_tokens: int = 0,
) -> tuple[Tensor, ...]:
    dtype = _accumulate(hidden)
    per_token = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))
    return (
        hidden.new_empty((), dtype=dtype),
        *per_token,
        hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if need_weight else (0,), dtype=dtype),
        weight.new_empty(weight.shape[0] if need_bias else 0, dtype=dtype),
    )


@torch.library.register_fake("vico::consistency_statistics_")
def _(
    policy: Tensor,
    reference: Tensor,
    state: Tensor,
    policy_bias: Tensor | None,
    reference_bias: Tensor | None,
    beta: float,
    temperature: float,
) -> None:
    return None


@torch.library.register_fake("vico::consistency_mixture_")
def _(policy: Tensor, reference: Tensor, state: Tensor, beta: float) -> None:
    return None


@torch.library.register_fake("vico::consistency_gradient_")
def _(
    policy: Tensor, reference: Tensor, state: Tensor, beta: float, temperature: float, out: Tensor | None = None
) -> None:
    return None


@torch.library.register_fake("vico::consistency_result")
def _(state: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    loss, lse, ref_lse = (state.new_empty(state.shape[0]) for _ in range(3))
    return loss, lse, ref_lse


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.beta, need_hidden, need_weight, need_bias, ctx.block_tokens = inputs
    ctx.held = (need_hidden, need_weight, need_bias)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[4:])


def _backward(ctx: Any, grad_total: Tensor | None, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    if not any(wanted) or (grad_total is None and grad_loss is None):
        return (None,) * 13
    if torch.is_grad_enabled():
        raise NotImplementedError("consistency_loss has first derivatives only: call backward without create_graph")
    *tensors, token_weights, grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
    hidden, weight, bias = tensors[:3]
    # What arrived for each token's unweighted loss.
    arrived: Any = sum(g for g in (grad_total, grad_loss) if g is not None)
    arrived = arrived.expand(len(hidden)) if token_weights is None else arrived * token_weights
    held = ctx.held if grad_loss is None else (ctx.held[0], False, False)
    missing = [want and not have for want, have in zip(wanted, held, strict=True)]
    if any(missing):
        *_, new_hidden, new_weight, new_bias = torch.ops.vico.consistency_loss(
            *tensors, arrived.contiguous(), ctx.temperature, ctx.beta, *missing, ctx.block_tokens
        )
    grads: list[Tensor | None] = [None] * 13
    if wanted[0]:
        grads[0] = ((new_hidden if missing[0] else grad_hidden) * arrived[:, None]).to(hidden.dtype)
    if wanted[1]:
        grads[1] = (new_weight if missing[1] else grad_weight * grad_total).to(weight.dtype)
    if wanted[2]:
        grads[2] = (new_bias if missing[2] else grad_bias * grad_total).to(bias.dtype)
    return tuple(grads)


torch.library.register_autograd("vico::consistency_loss", _backward, setup_context=_setup_context)
