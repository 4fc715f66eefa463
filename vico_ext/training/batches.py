"""Micro-batches: which lines, in which order, and the tensors made of them. Everything follows from seed and step."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vico_ext.tiling import UnreadableImageError
from vico_ext.training.chat import ChatEncoder, EncodedChat
from vico_ext.training.records import BadRecordError, Corpus, Problem, Tiling

__all__ = ["BatchOrder", "Draw", "MicroBatch", "Samples", "loader", "seed_of"]

_POOL = 32  # batches that are sorted by length together


def seed_of(*parts: Any) -> int:
    """A seed for each combination of values; the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


@dataclass(frozen=True)
class Draw:
    """One sample of a step: which item, and the seed of all that is random about it."""

    item: int
    seed: int


class BatchOrder:
    """Which items each step uses.

    An epoch is a shuffle of all items, of which the last incomplete batch is left out. With grouping by length, pools
    of 32 batches are sorted, cut into batches, and those are shuffled. Micro-batches of a step are sorted by length.

    Args:
        lengths: of all items.
        batch: samples of a step.
        micro_batch: samples of a micro-batch.
        seed: of the shuffles.
        by_length: whether items of similar length go together.

    Raises:
        ValueError: there are fewer items than one batch needs.
    """

    def __init__(self, lengths: Sequence[int], batch: int, micro_batch: int, seed: int, *, by_length: bool) -> None:
        if len(lengths) < batch:
            raise ValueError(f"the data has {len(lengths)} usable items, fewer than one batch of {batch}: lower batch")
        self.lengths, self.batch, self.micro_batch = lengths, batch, micro_batch
        self.seed, self.by_length = seed, by_length
        self.steps_per_epoch = len(lengths) // batch
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def step(self, step: int) -> list[list[Draw]]:
        """The micro-batches of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        draws = [Draw(item, seed_of(self.seed, step, slot)) for slot, item in enumerate(self._epoch[1][place])]
        return [draws[start : start + self.micro_batch] for start in range(0, self.batch, self.micro_batch)]

    def _batches(self, epoch: int) -> list[list[int]]:
        chance = random.Random(seed_of(self.seed, "epoch", epoch))
        order = list(range(len(self.lengths)))
        chance.shuffle(order)
        order = order[: self.steps_per_epoch * self.batch]
        if self.by_length:
            pool = _POOL * self.batch
            pools = [order[start : start + pool] for start in range(0, len(order), pool)]
            order = [item for own in pools for item in sorted(own, key=self.lengths.__getitem__)]
        batches = [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        chance.shuffle(batches)
        return [sorted(own, key=self.lengths.__getitem__) for own in batches]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Conversations that a device runs together: B rows of L positions, P tiles.

    Attributes:
        input_ids: ``[B, L]`` int64, padded on the right.
        attention_mask: ``[B, L]`` int64.
        predict: ``[B, L]`` bool, the positions whose next token belongs to an answer.
        targets: ``[B, L]`` int64, the next token.
        pixel_values: ``[P, 3, S, S]``, the tiles of all items in order.
        tiles: of each item.
        images: tiles of each image.
        item_of_row: of each row; several rows of an item share its tiles.
        lines: of each row.
        seeds: of each item.
        families: of each row.
        answers: of each row, the text of the last one.
        reference_hidden: ``[N, H]`` of the N positions of ``predict``, where they were cached.
        problems: of what should have been here too.
        blank: nothing usable was left; the tensors are a stand-in that counts for nothing, so that every process runs
            the same layers.
        vit_tokens: ``[P, 1 + N, V]``, where they were computed already.
        labels: ``[P]`` int64, the router's classes.
    """

    input_ids: Tensor
    attention_mask: Tensor
    predict: Tensor
    targets: Tensor
    pixel_values: Tensor
    tiles: tuple[int, ...]
    images: tuple[int, ...]
    item_of_row: tuple[int, ...]
    lines: tuple[int, ...]
    seeds: tuple[int, ...]
    families: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    reference_hidden: Tensor | None = None
    problems: tuple[Problem, ...] = ()
    blank: bool = False
    vit_tokens: Tensor | None = None
    labels: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of conversations."""
        return len(self.lines)

    @property
    def answer_tokens(self) -> Tensor:
        """Of each row ``[B]``."""
        return self.predict.sum(1)

    @property
    def tiles_of_item(self) -> list[range]:
        """Which tiles are of each item."""
        ends = [0, *accumulate(self.tiles)]
        return [range(start, end) for start, end in pairwise(ends)]

    @property
    def images_of_item(self) -> list[tuple[int, ...]]:
        """Tiles of each image, by item."""
        images, grouped = iter(self.images), []
        for tiles in self.tiles:
            own: list[int] = []
            while sum(own) < tiles:
                own.append(next(images))
            grouped.append(tuple(own))
        return grouped

    def to(self, device: torch.device) -> MicroBatch:
        """With its tensors on the device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Sample:
    """One item, loaded."""

    pixel_values: Tensor
    images: tuple[int, ...]
    chats: tuple[EncodedChat, ...]
    lines: tuple[int, ...]
    families: tuple[str, ...]
    answers: tuple[str, ...]
    seed: int
    problems: tuple[Problem, ...]
    reference_hidden: Tensor | None = None


@dataclass
class Samples(Dataset):
    """Items as samples. A sample without usable lines stands for its problems.

    Attributes:
        corpus: the lines.
        tiling: how images are cut.
        encoder: of conversations.
        max_length: longest conversation in tokens.
        cache: hidden states of the reference by line, where they were computed already.
    """

    corpus: Corpus
    tiling: Tiling
    encoder: ChatEncoder
    max_length: int
    cache: Any = None

    def __getitem__(self, draw: Draw) -> Sample | list[Problem]:
        with torch.device("cpu"):  # whatever the default device: worker processes may not use another
            return self._load(draw)

    def _load(self, draw: Draw) -> Sample | list[Problem]:
        item = self.corpus.items[draw.item]
        try:
            records = self.corpus.read(item)
            tiles = [self.tiling.cut(self.corpus.image_root / image) for image in records[0].images]
        except UnreadableImageError as error:
            return [Problem("image", line, str(error)) for line in item.lines]
        except BadRecordError as error:
            return [Problem("record", item.lines[0], f"the file changed while it was read: {error}")]
        images = tuple(len(own) for own in tiles)
        problems: list[Problem] = []
        chats, kept = [], []
        for index, (line, record) in enumerate(zip(item.lines, records, strict=True)):
            try:
                chats.append(self._encoded(record.turns, images))
                kept.append(index)
            except ValueError as error:
                problems.append(Problem("record", line, str(error)))
        if not chats:
            return problems
        lines = tuple(item.lines[i] for i in kept)
        return Sample(
            torch.cat(tiles),
            images,
            tuple(chats),
            lines,
            tuple(records[i].family for i in kept),
            tuple(records[i].answer for i in kept),
            draw.seed,
            tuple(problems),
            None if self.cache is None else torch.cat([self.cache.read(line) for line in lines]),
        )

    def _encoded(self, turns: Any, images: tuple[int, ...]) -> EncodedChat:
        chat = self.encoder.encode(turns, images)
        if len(chat.input_ids) > self.max_length:
            raise ValueError(f"{len(chat.input_ids)} tokens, more than max_length, {self.max_length}")
        return chat

    def collate(self, loaded: Sequence[Sample | list[Problem]]) -> MicroBatch:
        """The micro-batch of some items."""
        with torch.device("cpu"):
            return self._collated(loaded)

    def _collated(self, loaded: Sequence[Sample | list[Problem]]) -> MicroBatch:
        samples = [one for one in loaded if isinstance(one, Sample)]
        problems = [p for one in loaded for p in (one.problems if isinstance(one, Sample) else one)]
        if not samples:
            blank = MicroBatch(**_padded([self._stand_in()]), problems=tuple(problems), blank=True)
            return replace(blank, predict=torch.zeros_like(blank.predict))
        cached = [one.reference_hidden for one in samples if one.reference_hidden is not None]
        made = MicroBatch(**_padded(samples), problems=tuple(problems))
        return replace(made, reference_hidden=torch.cat(cached)) if cached else made

    def _stand_in(self) -> Sample:
        side = self.tiling.tile_size
        ids = [self.encoder.image_token_id] * self.encoder.tokens_per_tile
        chat = EncodedChat([*self.encoder.tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"], *ids], [])
        return Sample(torch.zeros(1, 3, side, side), (1,), (chat,), (0,), ("",), ("",), 0, ())


def _padded(samples: Sequence[Sample]) -> dict[str, Any]:
    """The fields of a micro-batch."""
    chats = [chat for sample in samples for chat in sample.chats]
    length = max(len(chat.input_ids) for chat in chats)
    ids = torch.zeros(len(chats), length, dtype=torch.int64)
    mask, answer = torch.zeros_like(ids), torch.zeros(len(chats), length, dtype=torch.bool)
    for row, chat in enumerate(chats):
        ids[row, : len(chat.input_ids)] = torch.tensor(chat.input_ids)
        mask[row, : len(chat.input_ids)] = 1
        answer[row, : len(chat.answer)] = torch.tensor(chat.answer, dtype=torch.bool)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "predict": answer.roll(-1, 1),  # nothing answers at position 0, so nothing wraps
        "targets": ids.roll(-1, 1),
        "pixel_values": torch.cat([sample.pixel_values for sample in samples]),
        "tiles": tuple(len(sample.pixel_values) for sample in samples),
        "images": tuple(tiles for sample in samples for tiles in sample.images),
        "item_of_row": tuple(i for i, sample in enumerate(samples) for _ in sample.chats),
        "lines": tuple(line for sample in samples for line in sample.lines),
        "seeds": tuple(sample.seed for sample in samples),
        "families": tuple(family for sample in samples for family in sample.families),
        "answers": tuple(answer for sample in samples for answer in sample.answers),
    }


def loader(samples: Samples, groups: Iterator[list[Draw]] | Sequence[list[Draw]], workers: int) -> Any:
    """Micro-batches of the groups, in their order, loaded by that many processes."""
    return DataLoader(
        samples,
        batch_sampler=groups,
        collate_fn=samples.collate,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
    )
