"""Rows of visual tokens to and from the rows of ``inputs_embeds``, and the positions they take in the sequence.

R rows of embeddings (a batch [B, L, H] seen as [B * L, H]), T visual tokens, N output rows, H the LLM's width.

Nothing here makes the host wait for a device. What depends on values (indices, placeholders) is checked where they are:
on CUDA the kernel ends, and the error surfaces at the next call that waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vico_ext.ops.call import call, refuse_gradient

__all__ = [
    "compress_positions",
    "gather_tokens",
    "keep_placeholders",
    "merge_tokens",
    "renumber_positions",
    "scatter_tokens",
    "scatter_tokens_",
    "text_rows",
    "tile_rows",
]


def merge_tokens(embeds: Tensor, tokens: Tensor, source: Tensor) -> Tensor:
    """Lays out rows of ``embeds`` and ``tokens`` as ``source`` says: one read and one write per element.

    Equivalent to :func:`vico_ext.reference.merge_tokens`, bit for bit. Differentiable in both; a row that is used more
    than once gets the sum of its gradients, in ascending order of use.

    Args:
        embeds: ``[R, H]`` float32, float64, bfloat16 or float16.
        tokens: ``[T, H]``; cast to the dtype of ``embeds``.
        source: ``[N]`` int64: -1 is a zero row, [0, R) a row of ``embeds``, [R, R + T) a row of ``tokens``.

    Returns:
        ``[N, H]``, dtype of ``embeds``.

    Raises:
        RuntimeError: shapes, devices or dtypes do not fit, or an entry of ``source`` is out of range.
    """
    return call(torch.ops.vico.merge_tokens, embeds, tokens.to(embeds.dtype), source)


def text_rows(embeds: Tensor, source: Tensor, token_rows: int) -> Tensor:
    """:func:`merge_tokens` but for the rows of tokens, which are left to others to write; for inference.

    Args:
        embeds: ``[R, H]`` float32, float64, bfloat16 or float16.
        source: ``[N]`` int64: -1 is a zero row, [0, R) a row of ``embeds``, [R, R + T) one that is left.
        token_rows: T.

    Returns:
        ``[N, H]``, dtype of ``embeds``. What was in memory before is in the rows that are left.

    Raises:
        ValueError: a gradient would be lost.
        RuntimeError: shapes, devices or dtypes do not fit, or an entry of ``source`` is out of range.
    """
    refuse_gradient("text_rows leaves rows unwritten", "merge_tokens", embeds=embeds)
    return torch.ops.vico.text_rows(embeds, source, token_rows)


def tile_rows(source: Tensor, cu_tokens: Tensor, embed_rows: int) -> Tensor:
    """Where each tile's tokens begin among the rows that ``source`` lays out.

    Args:
        source: ``[N]`` int64 as of :func:`compress_positions`, flattened.
        cu_tokens: ``[P + 1]`` int64, the offsets of the tiles' tokens, ascending from 0.
        embed_rows: R, the first number of a token in ``source``.

    Returns:
        ``[P]`` int64, for each tile t the row i with source[i] == R + cu_tokens[t]; its other tokens follow there.

    Raises:
        RuntimeError: a tile's tokens are not in ``source`` one after another, or shapes, dtypes or devices do not fit.
    """
    return torch.ops.vico.tile_rows(source, cu_tokens, embed_rows)


def gather_tokens(embeds: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` of ``embeds``: the adjoint of :func:`scatter_tokens` into zeros.

    Args:
        embeds: ``[R, H]``.
        index: ``[T]`` int64 in [0, R), or -1 for a zero row.

    Returns:
        ``[T, H]``; the gradient of a row that is named more than once is summed in a fixed order.

    Raises:
        RuntimeError: an index is out of range.
    """
    return call(torch.ops.vico.merge_tokens, embeds, embeds.new_empty(0, embeds.shape[-1]), index)


def scatter_tokens(embeds: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
    """A copy of ``embeds`` with ``tokens`` written over its rows ``index``; differentiable in both.

    Args:
        embeds: ``[R, H]``.
        index: ``[T]`` int64 in [0, R), no row twice, in any order.
        tokens: ``[T, H]``; cast to the dtype of ``embeds``.

    Returns:
        ``[R, H]``.

    Raises:
        RuntimeError: an index is out of range or named twice, or shapes do not fit.
    """
    rows = torch.arange(embeds.shape[0] + tokens.shape[0], device=index.device)
    source, visual = rows[: embeds.shape[0]].clone(), rows[embeds.shape[0] :]
    torch.ops.vico.scatter_tokens_(source[:, None], index, visual[:, None])
    return merge_tokens(embeds, tokens, source)


def scatter_tokens_(embeds: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
    """Writes ``tokens`` over the rows ``index`` of ``embeds``, in place, and returns ``embeds``; for inference.

    Args:
        embeds: ``[R, H]``, a view of any row stride: for instance ``inputs_embeds.view(-1, H)``.
        index: ``[T]`` int64 in [0, R), no row twice, in any order.
        tokens: ``[T, H]``; cast to the dtype of ``embeds``; shares no memory with it.

    Raises:
        ValueError: a gradient would be lost.
        RuntimeError: an index is out of range or named twice, or shapes do not fit.
    """
    refuse_gradient("scatter_tokens_ writes in place", "scatter_tokens", embeds=embeds, tokens=tokens)
    torch.ops.vico.scatter_tokens_(embeds, index, tokens.to(embeds.dtype))
    return embeds


def keep_placeholders(
    input_ids: Tensor,
    compress: Tensor,
    *,
    placeholder_id: int,
    attention_mask: Tensor | None = None,
    full_tokens: int = 256,
    compressed_tokens: int = 64,
) -> tuple[Tensor, Tensor]:
    """Which positions of a batch stay when the tiles ``compress`` are compressed.

    Each tile owns ``full_tokens`` consecutive placeholders of one row, tiles in reading order over the rows; a
    compressed tile keeps its first ``compressed_tokens``. What ``attention_mask`` leaves out at either end of a row is
    padding: it does not stay, and is not looked at.

    Args:
        input_ids: ``[B, L]`` int64.
        compress: ``[P]`` bool.
        placeholder_id: the token id of a visual token's place.
        attention_mask: ``[B, L]`` bool.
        full_tokens: placeholders per tile.
        compressed_tokens: placeholders that a compressed tile keeps.

    Returns:
        ``keep`` ``[B, L]`` bool and ``counts`` ``[B]`` int64, the positions kept in each row.

    Raises:
        RuntimeError: there are not P * full_tokens placeholders, or those of a tile are interrupted or not of one row.
    """
    return torch.ops.vico.keep_placeholders(
        input_ids, attention_mask, compress, placeholder_id, full_tokens, compressed_tokens
    )


def compress_positions(
    input_ids: Tensor, keep: Tensor, length: int, *, placeholder_id: int, padding_side: str = "left"
) -> tuple[Tensor, Tensor]:
    """Where each position of the shorter batch comes from.

    Args:
        input_ids: ``[B, L]`` int64.
        keep: ``[B, L]`` bool, as of :func:`keep_placeholders`.
        length: L', at least the positions that any row keeps.
        placeholder_id: the token id of a visual token's place.
        padding_side: "left" or "right", where shorter rows are padded.

    Returns:
        ``position`` ``[B, L']`` int64, the flat position (row * L + column) that each position comes from, -1 for
        padding; and ``source`` ``[B, L']`` int64 for :func:`merge_tokens`, which differs at visual tokens: B * L plus
        their running number.

    Raises:
        ValueError: ``padding_side`` is neither.
        RuntimeError: a row keeps more than ``length`` positions.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    return torch.ops.vico.compress_sequence(input_ids, keep, placeholder_id, length, padding_side == "left")


def renumber_positions(position_ids: Tensor, position: Tensor) -> Tensor:
    """Position ids of the shorter batch, consecutive where they were.

    From each kept position's id the number of positions dropped before it is subtracted, counted since the row's last
    reset (where position_ids does not go up by one: packed sequences). Padding in front of a row does not count.

    Args:
        position_ids: ``[B, L]`` int64.
        position: ``[B, L']`` int64, as of :func:`compress_positions`.

    Returns:
        ``[B, L']`` int64, 0 at padding.

    Raises:
        RuntimeError: ``position`` is not ascending within its row.
    """
    return torch.ops.vico.renumber_positions(position_ids, position)
