"""Pages of a bank's tiles, the questions on them, and batches in which a page's questions share its visual tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reproduce.bank import FAMILIES, Bank
from reproduce.drawing import Question
from reproduce.tokens import IMAGE, PAD, TILES
from vico_ext.training.chat import ChatEncoder, Turn

__all__ = ["FINE", "Asked", "Page", "PageBatch", "Pages", "Shared"]

FINE = ("fine", "sparse", "medium")  # skills that take reading numbers


@dataclass(frozen=True)
class Asked:
    """A question about a tile of a page, counted from 1."""

    place: int
    question: Question

    @property
    def text(self) -> str:
        return f"tile {self.place} {self.question.text}?"


@dataclass(frozen=True)
class Page:
    """Tiles of one family and style, by their numbers in the bank, in reading order."""

    family: str
    tiles: tuple[int, ...]
    asked: tuple[Asked, ...]


class Pages:
    """Draws pages from a bank, endlessly and repeatably.

    Args:
        bank: the tiles.
        seed: of what is drawn.
        fine: share of questions that take reading numbers, where a page has as many.

    Raises:
        ValueError: the bank has too few tiles of a style for a page of them.
    """

    def __init__(self, bank: Bank, seed: int, fine: float = 0.5) -> None:
        self.bank, self.fine = bank, fine
        self.chance = random.Random(f"pages {bank.split} {seed}")
        self.groups: dict[str, dict[int, list[int]]] = {family: {} for family in FAMILIES}
        for tile, (family, style) in enumerate(zip(bank.families, bank.styles, strict=True)):
            self.groups[family].setdefault(style, []).append(tile)
        fewest = min((len(own) for styles in self.groups.values() for own in styles.values()), default=0)
        if fewest < TILES:
            raise ValueError(
                f"a page takes {TILES} tiles of one style, this bank of {len(bank)} has {fewest} of some: render more"
            )

    def draw(self, tiles: int = TILES, questions: int = 8, *, first: int = 1, fine_only: bool = False) -> Page:
        """A page with at most so many questions.

        Args:
            tiles: of the page.
            questions: at most; no question twice.
            first: place of the first tile, so that single tiles can practise every place.
            fine_only: the first tile is one with numbers to read.
        """
        family = self.chance.choice(list(self.groups))
        own = self.groups[family][self.chance.choice(sorted(self.groups[family]))]
        chosen = self.chance.sample(own, tiles)
        if fine_only:
            readable = [tile for tile in own if any(q.skill in FINE for q in self.bank.questions[tile])]
            if readable:
                chosen[0] = self.chance.choice(readable)
        asked = [Asked(first + n, q) for n, tile in enumerate(chosen) for q in self.bank.questions[tile]]
        self.chance.shuffle(asked)
        fine = [one for one in asked if one.question.skill in FINE]
        other = [one for one in asked if one.question.skill not in FINE]
        take = min(len(fine), max(round(self.fine * questions), questions - len(other)))
        kept = [*fine[:take], *other[: questions - take]]
        return Page(family, tuple(chosen), tuple(kept))


@dataclass(frozen=True, eq=False)
class PageBatch:
    """B pages of P tiles, each with a row of the prefix and N questions, which see the prefix and themselves.

    Attributes:
        tiles: ``[B, P]``, numbers in the bank.
        input_ids: ``[B, L]``, L = prefix + N * S; every question has S positions, padded on the right.
        position_ids: ``[1, L]``; each question goes on from the prefix.
        mask: ``[1, 1, L, L]`` bool, True where the row may look.
        predict: ``[B, L]`` bool, positions whose next token belongs to an answer.
        targets: ``[B, L]``, the next token.
        pages: which.
    """

    tiles: Tensor
    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    predict: Tensor
    targets: Tensor
    pages: tuple[Page, ...]
    prefix: int
    span: int


class Shared:
    """Encodes pages so that the model sees, per question, just what :class:`ChatEncoder` makes of a conversation.

    Args:
        encoder: of the model.
    """

    def __init__(self, encoder: ChatEncoder) -> None:
        self.encoder = encoder
        self._known: dict[tuple[str, str], tuple[list[int], list[bool]]] = {}

    def _suffix(self, text: str, answer: str) -> tuple[list[int], list[bool]]:
        """What follows the image, and of which positions the next token is learned."""
        if (text, answer) not in self._known:
            chat = self.encoder.encode([Turn("user", f"<image>\n{text}"), Turn("assistant", answer)], [1])
            start = self._prefix_length(1)
            ids, learned = chat.input_ids[start:], chat.answer[start:]
            last = max(place for place, one in enumerate(learned) if one)  # the newline behind it teaches nothing
            self._known[text, answer] = ids[: last + 1], learned[: last + 1]
        return self._known[text, answer]

    def _prefix(self, tiles: int) -> list[int]:
        ids = self.encoder.encode([Turn("user", "<image>\n"), Turn("assistant", "x")], [tiles]).input_ids
        return ids[: self._prefix_length(tiles)]

    def _prefix_length(self, tiles: int) -> int:
        return 2 + 1 + tiles * self.encoder.tokens_per_tile + 1 + 1  # start, "user\n", <img>, ..., </img>, newline

    def batch(self, pages: Sequence[Page]) -> PageBatch:
        """The batch of pages that have the same number of tiles."""
        prefix = self._prefix(len(pages[0].tiles))
        suffixes = [[self._suffix(one.text, one.question.answer) for one in page.asked] for page in pages]
        count, span = max(map(len, suffixes)), max(len(ids) for own in suffixes for ids, _ in own)
        length = len(prefix) + count * span
        ids = torch.full((len(pages), length), PAD)
        learned = torch.zeros(len(pages), length + 1, dtype=torch.bool)
        ids[:, : len(prefix)] = torch.tensor(prefix)
        for row, own in enumerate(suffixes):
            for number, (suffix, answer) in enumerate(own):
                start = len(prefix) + number * span
                ids[row, start : start + len(suffix)] = torch.tensor(suffix)
                learned[row, start : start + len(suffix)] = torch.tensor(answer)
        question = torch.cat([torch.zeros(len(prefix)), torch.arange(1, count + 1).repeat_interleave(span)])
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        mask &= (question[None] == 0) | (question[None] == question[:, None])
        positions = torch.cat([torch.arange(len(prefix)), len(prefix) + torch.arange(span).repeat(count)])
        return PageBatch(
            torch.tensor([page.tiles for page in pages]),
            ids,
            positions[None],
            mask[None, None],
            learned[:, 1:],
            ids.roll(-1, 1),
            tuple(pages),
            len(prefix),
            span,
        )


def answer_logits(model: Any, batch: PageBatch, visual_tokens: Tensor) -> Tensor:
    """Logits ``[N, vocabulary]`` at the N positions of ``predict``, in reading order.

    Args:
        model: an InternVL of transformers.
        batch: of B pages of P tiles.
        visual_tokens: ``[B * P, 16, H]``.
    """
    inner = model.model
    embeds = inner.get_input_embeddings()(batch.input_ids)
    embeds = embeds.masked_scatter((batch.input_ids == IMAGE)[..., None], visual_tokens)
    hidden = inner.language_model(
        inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[batch.predict])
