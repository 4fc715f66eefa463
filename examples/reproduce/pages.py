"""Pages of a bank's tiles, the questions on them, and batches of their conversations."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reproduce.bank import FAMILIES, Bank
from reproduce.drawing import TABS, Question
from reproduce.tokens import IMAGE, PAD
from vico_ext.training.chat import ChatEncoder, EncodedChat, Turn

__all__ = ["READING", "Asked", "Chats", "Page", "PageBatch", "Pages", "answer_logits", "right_answers"]

READING = ("fine", "sparse", "medium", "title", "label")  # skills


@dataclass(frozen=True)
class Asked:
    """A question about one of a page's tiles, the place of its tab among all tabs."""

    place: int
    question: Question

    @property
    def text(self) -> str:
        return f"{list(TABS)[self.place]} tab {self.question.text}?"


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
        readable: share of tiles that are drawn from those with something to read; the others come as they are.

    Raises:
        ValueError: the bank has too few tiles of a style for a page of them.
    """

    def __init__(self, bank: Bank, seed: int, readable: float = 0.0) -> None:
        self.bank, self.readable = bank, readable
        self._reads = [any(q.skill in READING for q in own) for own in bank.questions]
        self.chance = random.Random(f"pages {bank.split} {seed}")
        self.groups: dict[str, dict[int, list[list[int]]]] = {family: {} for family in FAMILIES}
        for tile, (family, style, tab) in enumerate(zip(bank.families, bank.styles, bank.tabs, strict=True)):
            self.groups[family].setdefault(style, [[] for _ in TABS])[tab].append(tile)
        fewest = min(
            (len(own) for styles in self.groups.values() for tabs in styles.values() for own in tabs), default=0
        )
        if not fewest or not all(self.groups.values()):
            raise ValueError(
                f"a page takes a tile of each tab of one style, this bank of {len(bank)} lacks some: render more"
            )

    def draw(self, questions: int = 8, *, alone: bool = False) -> Page:
        """A page with a tile of each tab and at most so many questions, none twice.

        Args:
            questions: at most.
            alone: one tile only.
        """
        family = self.chance.choice(list(self.groups))
        own = self.groups[family][self.chance.choice(sorted(self.groups[family]))]
        chosen = [self._tile(tiles) for tiles in ([self.chance.choice(own)] if alone else own)]
        asked = [Asked(int(self.bank.tabs[tile]), q) for tile in chosen for q in self.bank.questions[tile]]
        self.chance.shuffle(asked)
        # Every tile's first question comes before any tile's second.
        seen: Counter[int] = Counter()
        turn = []
        for one in asked:
            turn.append(seen[one.place])
            seen[one.place] += 1
        kept = [asked[n] for n in sorted(range(len(asked)), key=turn.__getitem__)[:questions]]
        self.chance.shuffle(kept)
        return Page(family, tuple(chosen), tuple(kept))

    def _tile(self, tiles: list[int]) -> int:
        readable = [tile for tile in tiles if self._reads[tile]]
        return self.chance.choice(readable if readable and self.chance.random() < self.readable else tiles)


@dataclass(frozen=True, eq=False)
class PageBatch:
    """B pages, each a conversation with a turn per question, padded on the right.

    Attributes:
        tiles: ``[P]``, numbers in the bank, of all pages in order.
        input_ids: ``[B, L]``.
        predict: ``[B, L]`` bool, positions whose next token belongs to an answer.
        targets: ``[B, L]``, the next token.
        answer: ``[B, L]``, number of the answer that ``predict`` is of, among all answers of the batch.
        pages: which.
    """

    tiles: Tensor
    input_ids: Tensor
    predict: Tensor
    targets: Tensor
    answer: Tensor
    pages: tuple[Page, ...]

    def to(self, device: torch.device) -> PageBatch:
        """The same with its tensors there, but for the tiles' numbers."""
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "predict", "targets", "answer")}
        return replace(self, **moved)


class Chats:
    """Encodes pages as :class:`ChatEncoder` does their conversations, each pair of turns once.

    Args:
        encoder: of the model.
    """

    def __init__(self, encoder: ChatEncoder) -> None:
        self.encoder = encoder
        self._known: dict[tuple[int, str, str], EncodedChat] = {}

    def _pair(self, tiles: int, text: str, answer: str) -> EncodedChat:
        """A question, with the image in front where ``tiles`` is not 0, and its answer."""
        key = (tiles, text, answer)
        if key not in self._known:
            asked = f"<image>\n{text}" if tiles else text
            self._known[key] = self.encoder.encode(
                [Turn("user", asked), Turn("assistant", answer)], [tiles] * (tiles > 0)
            )
        return self._known[key]

    def batch(self, pages: Sequence[Page]) -> PageBatch:
        """The batch of these pages."""
        rows = [
            [self._pair(0 if n else len(page.tiles), one.text, one.question.answer) for n, one in enumerate(page.asked)]
            for page in pages
        ]
        length = max(sum(len(pair.input_ids) for pair in row) for row in rows)
        ids = torch.full((len(pages), length), PAD)
        answer = torch.full((len(pages), length), -1)
        number = 0
        for row, pairs in enumerate(rows):
            start = 0
            for pair in pairs:
                end = start + len(pair.input_ids)
                ids[row, start:end] = torch.tensor(pair.input_ids)
                answer[row, start:end] = torch.where(torch.tensor(pair.answer), number, -1)
                start, number = end, number + 1
        answer = answer.roll(-1, 1)
        tiles = torch.tensor([tile for page in pages for tile in page.tiles])
        return PageBatch(tiles, ids, answer >= 0, ids.roll(-1, 1), answer, tuple(pages))


def answer_logits(model: Any, batch: PageBatch, visual_tokens: Tensor) -> Tensor:
    """Logits ``[N, vocabulary]`` at the N positions of ``predict``, in reading order.

    Args:
        model: an InternVL of transformers.
        batch: of B pages of P tiles.
        visual_tokens: ``[P, 16, H]``.
    """
    inner = model.model
    embeds = inner.get_input_embeddings()(batch.input_ids)
    embeds = embeds.masked_scatter((batch.input_ids == IMAGE)[..., None], visual_tokens.to(embeds.dtype))
    hidden = inner.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return model.lm_head(hidden[batch.predict])


def right_answers(logits: Tensor, batch: PageBatch) -> list[tuple[Page, Asked, bool]]:
    """Of each question: its page, itself, and whether every token of its answer has the largest logit."""
    wrong = torch.zeros(int(batch.answer.max()) + 1, dtype=torch.bool, device=logits.device)
    missed = logits.argmax(-1) != batch.targets[batch.predict]
    wrong[batch.answer[batch.predict][missed]] = True
    asked = [(page, one) for page in batch.pages for one in page.asked]
    return [(page, one, not bad) for (page, one), bad in zip(asked, wrong.tolist(), strict=True)]
