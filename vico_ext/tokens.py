"""Visual tokens in the language model's sequence: fewer placeholders, the visual tokens in their place.

Symbols: B rows, L positions before and L' after compression, P tiles, T packed visual tokens, H the LLM's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from vico_ext import functional
from vico_ext.functional.sync import size_on_host
from vico_ext.modules import FusedConnector
from vico_ext.routing import RoutingPlan

__all__ = ["CompressedSequence", "compress_sequence", "connect_visual_tokens", "merge_visual_tokens"]


@dataclass(frozen=True, eq=False)
class CompressedSequence:
    """A batch after compression, ready for the language model; of one dimension less where the input was.

    Attributes:
        input_ids: ``[B, L']`` int64.
        attention_mask: ``[B, L']``, 0 at padding; the dtype of the mask that was given, int64 where none was.
        position: ``[B, L']`` int64, the flat position (row * L + column) that each position comes from, -1 at padding.
        source: ``[B, L']`` int64 for :func:`vico_ext.functional.merge_tokens`: as ``position``, but B * L plus the
            running number at visual tokens.
        keep_mask: ``[B, L]`` bool, the positions of the input that stayed.
        labels: ``[B, L']``, or None.
        position_ids: ``[B, L']``, or None.
        inputs_embeds: ``[B, L', H]``, or None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position: Tensor
    source: Tensor
    keep_mask: Tensor
    labels: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None

    def take(self, values: Tensor, fill: int = 0) -> Tensor:
        """Of one value per position of the input, those of the positions that stayed.

        Args:
            values: ``[B, L]``.
            fill: the value at padding.

        Returns:
            ``[B, L']``, dtype of ``values``.
        """
        return _take(values, self.position, fill)

    def merge(self, inputs_embeds: Tensor, visual_tokens: Tensor) -> Tensor:
        """Rows of `inputs_embeds` [B, L, H] that stayed, `visual_tokens` [T, H] at the placeholders, zeros at padding.

        Differentiable in both. Returns ``[B, L', H]`` in the dtype of ``inputs_embeds``.
        """
        _check_embeds(inputs_embeds, self.keep_mask)
        hidden = inputs_embeds.shape[-1]
        rows = functional.merge_tokens(inputs_embeds.reshape(-1, hidden), visual_tokens, self.source.flatten())
        return rows.view(*self.source.shape, hidden)

    def tile_rows(self, plan: RoutingPlan) -> Tensor:
        """Where each tile's visual tokens begin: ``[P]`` int64, rows of ``inputs_embeds.view(-1, H)``.

        Tile t has as many rows from there on as the plan gives it tokens. ``plan`` is the one of this sequence; another
        is a RuntimeError where tiles are not found, on an accelerator at the next call that waits for the device.
        """
        return functional.tile_rows(self.source.flatten(), plan.cu_tokens, self.keep_mask.numel())


torch.export.register_dataclass(CompressedSequence, serialized_type_name="vico_ext.CompressedSequence")
torch.serialization.add_safe_globals([CompressedSequence])


def _check_embeds(inputs_embeds: Tensor, like_ids: Tensor) -> None:
    if inputs_embeds.shape[:-1] != like_ids.shape or inputs_embeds.dim() != like_ids.dim() + 1:
        raise ValueError(
            f"inputs_embeds must have shape {[*like_ids.shape, 'H']} like input_ids, got {list(inputs_embeds.shape)}"
        )


def _check_like_ids(t: Tensor | None, input_ids: Tensor, name: str, *, one_row: bool = False) -> None:
    if t is None or t.shape == input_ids.shape or (one_row and t.shape == (1, *input_ids.shape[1:])):
        return
    raise ValueError(f"{name} must have the shape of input_ids, {list(input_ids.shape)}, got {list(t.shape)}")


def _check_arguments(
    input_ids: Tensor,
    plan: RoutingPlan,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    position_ids: Tensor | None,
    padding_side: str,
) -> None:
    if not isinstance(plan, RoutingPlan):
        raise TypeError(f"plan must be a RoutingPlan (see plan_routing), got {type(plan).__name__}")
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must have shape [rows, length] or [length], got {list(input_ids.shape)}")
    _check_like_ids(attention_mask, input_ids, "attention_mask")
    _check_like_ids(labels, input_ids, "labels")
    _check_like_ids(position_ids, input_ids, "position_ids", one_row=input_ids.dim() == 2)
    if attention_mask is not None and attention_mask.is_floating_point():
        raise ValueError(f"attention_mask must be bool or int, 1 where a token is, got {attention_mask.dtype}")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")


def _take(values: Tensor, position: Tensor, fill: int, *, padded: bool = True) -> Tensor:
    """values.flatten()[position], `fill` where position is -1; not `padded`: it is nowhere."""
    if not padded:
        return values.reshape(-1)[position]
    if values.numel() == 0:  # rows of no length, padded
        return values.new_full(position.shape, fill)
    return values.reshape(-1)[position.clamp_min(0)].masked_fill(position < 0, fill)


def _first_row(sequence: CompressedSequence) -> CompressedSequence:
    values = {f.name: getattr(sequence, f.name) for f in fields(sequence)}
    rows: dict[str, Any] = {name: None if value is None else value[0] for name, value in values.items()}
    return CompressedSequence(**rows)


def compress_sequence(
    input_ids: Tensor,
    plan: RoutingPlan,
    *,
    placeholder_id: int,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    padding_side: str = "left",
    pad_token_id: int = 0,
    label_pad: int = -100,
    length: int | None = None,
) -> CompressedSequence:
    """Takes the placeholders of compressed tiles out of a batch, and pads what is left again.

    Each tile owns ``plan.tokens[0]`` consecutive placeholders of one row, tiles in reading order over the rows; a
    compressed tile keeps its first ``plan.tokens[1]``. Rows may hold any number of images, or none. Padding that came
    in is taken off both ends of a row.

    L' is the longest row after compression, which takes one host sync on an accelerator; none with a single row
    without ``attention_mask``, nor where ``length`` is given: then it can be captured in a CUDA graph. Under
    ``torch.compile(fullgraph=True)`` give ``length`` for several rows, or set
    ``torch._dynamo.config.capture_scalar_outputs``.

    Args:
        input_ids: ``[B, L]`` int64, or ``[L]``: then everything else and the results have no row dimension either.
        plan: the plan of the batch's P tiles.
        placeholder_id: the token id of a visual token's place (``<IMG_CONTEXT>``).
        attention_mask: ``[B, L]`` bool or int; zeros at either end of a row are padding.
        labels: ``[B, L]``.
        position_ids: ``[B, L]`` or ``[1, L]`` int64. They come out consecutive where they were consecutive, and start
            again where they did (packed sequences).
        padding_side: "left" or "right", where shorter rows are padded.
        pad_token_id: the id written there.
        label_pad: the label written there.
        length: L', by default the longest row.

    Raises:
        TypeError: ``plan`` is not a plan.
        ValueError: shapes do not fit, or ``padding_side`` is neither.
        RuntimeError: the batch does not hold the placeholders of the plan's tiles, those of a tile are interrupted or
            not of one row, a row is longer than ``length``, or dtypes or devices do not fit. On an accelerator what
            depends on values surfaces later, as a CUDA error at the next call that waits for the device.
    """
    _check_arguments(input_ids, plan, attention_mask, labels, position_ids, padding_side)
    one_row = input_ids.dim() == 1
    if one_row:
        input_ids = input_ids[None]
        attention_mask, labels, position_ids = (
            None if t is None else t[None] for t in (attention_mask, labels, position_ids)
        )
    full, compressed = plan.tokens
    mask = attention_mask if attention_mask is None or attention_mask.dtype == torch.bool else attention_mask != 0
    keep, counts = functional.keep_placeholders(
        input_ids,
        plan.compress,
        placeholder_id=placeholder_id,
        attention_mask=mask,
        full_tokens=full,
        compressed_tokens=compressed,
    )
    rows, before = input_ids.shape
    padded = True
    if length is None:
        if rows == 1 and attention_mask is None:
            length, padded = before - plan.compressed_tiles * (full - compressed), False
        else:
            length = size_on_host(counts.max()) if rows else 0
    position, source = functional.compress_positions(
        input_ids, keep, length, placeholder_id=placeholder_id, padding_side=padding_side
    )
    if position_ids is not None:
        position_ids = functional.renumber_positions(position_ids.expand(rows, before), position)
    if attention_mask is not None:
        attention_mask = _take(attention_mask, position, 0)
    else:
        attention_mask = (position >= 0).long() if padded else torch.ones_like(position)
    sequence = CompressedSequence(
        input_ids=_take(input_ids, position, pad_token_id, padded=padded),
        attention_mask=attention_mask,
        position=position,
        source=source,
        keep_mask=keep,
        labels=None if labels is None else _take(labels, position, label_pad, padded=padded),
        position_ids=position_ids,
    )
    return _first_row(sequence) if one_row else sequence


def merge_visual_tokens(
    inputs_embeds: Tensor,
    visual_tokens: Tensor,
    input_ids: Tensor,
    plan: RoutingPlan,
    *,
    placeholder_id: int,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    padding_side: str = "left",
    pad_token_id: int = 0,
    label_pad: int = -100,
    length: int | None = None,
) -> CompressedSequence:
    """:func:`compress_sequence`, with the visual tokens written over the placeholders that stay.

    The released semantics for any batch: text rows of ``inputs_embeds`` and the packed visual tokens go to their final
    place in one pass. Differentiable in ``inputs_embeds`` and ``visual_tokens``.

    Args:
        inputs_embeds: ``[B, L, H]``, or ``[L, H]`` with ``input_ids`` [L]; its rows at placeholders are not read.
        visual_tokens: ``[T, H]``, packed in tile order as the connector gives them; cast to the dtype of
            ``inputs_embeds``.
        input_ids: see :func:`compress_sequence`, as for all that follows.
        plan: T is its ``total_tokens``.

    Returns:
        The batch with ``inputs_embeds`` ``[B, L', H]``, zeros at padding.

    Raises:
        ValueError: the shapes of ``inputs_embeds`` or ``visual_tokens`` do not fit ``input_ids`` or ``plan``, and
            whatever :func:`compress_sequence` raises.
        RuntimeError: their widths H differ, or dtypes or devices do not fit.
    """
    _check_arguments(input_ids, plan, attention_mask, labels, position_ids, padding_side)
    _check_embeds(inputs_embeds, input_ids)
    if visual_tokens.dim() != 2 or visual_tokens.shape[0] != plan.total_tokens:
        raise ValueError(
            f"visual_tokens must have shape [{plan.total_tokens}, H], the plan's total_tokens ({plan.full_tiles} tiles "
            f"of {plan.tokens[0]}, {plan.compressed_tiles} of {plan.tokens[1]}), got {list(visual_tokens.shape)}"
        )
    sequence = compress_sequence(
        input_ids,
        plan,
        placeholder_id=placeholder_id,
        attention_mask=attention_mask,
        labels=labels,
        position_ids=position_ids,
        padding_side=padding_side,
        pad_token_id=pad_token_id,
        label_pad=label_pad,
        length=length,
    )
    return replace(sequence, inputs_embeds=sequence.merge(inputs_embeds, visual_tokens))


def connect_visual_tokens(
    inputs_embeds: Tensor,
    vit_tokens: Tensor,
    connector: Callable[[Tensor, RoutingPlan], Tensor],
    input_ids: Tensor,
    plan: RoutingPlan,
    *,
    placeholder_id: int,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    padding_side: str = "left",
    pad_token_id: int = 0,
    label_pad: int = -100,
    length: int | None = None,
) -> CompressedSequence:
    """:func:`merge_visual_tokens` of ``connector(vit_tokens, plan)``, without the packed tensor between the two.

    For inference: the connector's last layer writes its rows straight into the new ``inputs_embeds``, which saves one
    write and one read of all visual tokens. The result is the same, bit for bit. Where a gradient is recorded, the
    dtype of ``inputs_embeds`` is not the connector's, or ``connector`` is not a plain :class:`FusedConnector` (its
    layers may be replaced, but it is no subclass, compiled wrapper or module with hooks of its own), it takes the two
    steps.

    Args:
        inputs_embeds: ``[B, L, H]``, or ``[L, H]`` with ``input_ids`` [L]; its rows at placeholders are not read.
        vit_tokens: ``[P, 1 + N, V]`` with the CLS token in front, or ``[P, N, V]``, as the connector takes them.
        connector: called with ``vit_tokens`` and ``plan``; gives the visual tokens ``[T, H]``, packed in tile order.
        input_ids: see :func:`compress_sequence`, as for all that follows.
        plan: the plan of these P tiles.

    Returns:
        The batch with ``inputs_embeds`` ``[B, L', H]`` in the dtype of ``inputs_embeds``, zeros at padding.

    Raises:
        TypeError: ``plan`` is not a plan, and whatever the connector raises.
        ValueError: the shapes of ``inputs_embeds`` or ``vit_tokens`` do not fit ``input_ids`` or ``plan``, and whatever
            :func:`compress_sequence` and the connector raise.
        RuntimeError: the widths H differ, or dtypes or devices do not fit.
    """
    options: dict[str, Any] = {
        "placeholder_id": placeholder_id,
        "attention_mask": attention_mask,
        "labels": labels,
        "position_ids": position_ids,
        "padding_side": padding_side,
        "pad_token_id": pad_token_id,
        "label_pad": label_pad,
        "length": length,
    }
    _check_arguments(input_ids, plan, attention_mask, labels, position_ids, padding_side)
    _check_embeds(inputs_embeds, input_ids)
    if not (isinstance(connector, FusedConnector) and connector.writes_rows(vit_tokens, inputs_embeds)):
        return merge_visual_tokens(inputs_embeds, connector(vit_tokens, plan), input_ids, plan, **options)
    made: list[CompressedSequence] = []

    def destination() -> tuple[Tensor, Tensor]:
        sequence = compress_sequence(input_ids, plan, **options)
        rows = inputs_embeds.reshape(-1, inputs_embeds.shape[-1])
        text = functional.text_rows(rows, sequence.source.flatten(), plan.total_tokens)
        made.append(sequence)
        return text, sequence.tile_rows(plan)

    rows = connector(vit_tokens, plan, destination=destination)
    (sequence,) = made
    return replace(sequence, inputs_embeds=rows.view(*sequence.source.shape, rows.shape[-1]))
