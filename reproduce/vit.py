"""Stage 0a: the ViT learns to see. Each patch names its glyphs, and a pooled query answers what needs no reading.

Only the ViT is kept. Without the glyphs a language model on top takes very long to find out that print can be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproduce.bank import GLYPHS, NO_GLYPH, TILE_KINDS, UNREAD, Bank
from reproduce.model import normalised
from reproduce.optim import Optimizers, cosine

__all__ = ["Heads", "features", "glyph_accuracy", "train_vit"]

_COARSE = ("kind", "color", "shape", "count", "switch 1", "switch 2")

_FINE, _LETTERS = ("fine", "sparse", "mixed"), ("title", "button", "medium")
_OTHERS = tuple(kind for kind in TILE_KINDS if kind not in (*_FINE, *_LETTERS))


def coarse_targets(bank: Bank) -> tuple[Tensor, list[int]]:
    """Answers ``[n, 6]`` to what needs no reading, -100 where it is not asked, and how many answers each has."""
    names: list[dict[str, int]] = [{} for _ in _COARSE]
    found = torch.full((len(bank), len(_COARSE)), -100)
    for tile, questions in enumerate(bank.questions):
        for q in questions:
            name = f"switch {q.text[-1]}" if q.skill == "switch" else q.skill
            if name in _COARSE:
                place = _COARSE.index(name)
                found[tile, place] = names[place].setdefault(q.answer, len(names[place]))
    return found, [max(1, len(own)) for own in names]


class Heads(nn.Module):
    """What reads the ViT while it learns, and is thrown away."""

    def __init__(self, width: int, answers: list[int]) -> None:
        super().__init__()
        self.glyphs = nn.Linear(width, 2 * (len(GLYPHS) + 1))
        self.query = nn.Parameter(torch.randn(len(answers), width) * width**-0.5)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.answers = nn.ModuleList(nn.Linear(width, n) for n in answers)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits ``[n, 64, 2, glyphs]`` and per question ``[n, answers]`` of patch tokens ``[n, 64, V]``."""
        glyphs = self.glyphs(tokens).unflatten(-1, (2, len(GLYPHS) + 1))
        pooled = F.scaled_dot_product_attention(
            self.query.expand(len(tokens), -1, -1), self.key(tokens), self.value(tokens)
        )
        return glyphs, [head(pooled[:, i]) for i, head in enumerate(self.answers)]


def train_vit(
    tower: Any,
    bank: Bank,
    steps: int,
    *,
    batch: int = 32,
    peak: float = 2e-3,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None],
    every: int = 50,
) -> Heads:
    """Trains the tower in place; gives back the heads that read it.

    Two fifths of a batch are tiles with fine print, three tenths have large letters.
    """
    answers, sizes = coarse_targets(bank)
    glyphs, pixels = torch.from_numpy(bank.glyphs).long(), torch.from_numpy(bank.pixels)
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = Heads(tower.config.hidden_size, sizes)
    optimizers = Optimizers([*tower.named_parameters(), *heads.named_parameters()], peak)
    fine, letters, other = (
        np.flatnonzero([kind in kinds for kind in bank.kinds]) for kinds in (_FINE, _LETTERS, _OTHERS)
    )
    shares = ((fine, batch * 2 // 5), (letters, batch * 3 // 10), (other, batch - batch * 2 // 5 - batch * 3 // 10))
    weight = torch.ones(len(GLYPHS) + 1)
    weight[NO_GLYPH] = 0.1  # most patches are empty
    tower.train()
    recent: list[tuple[float, ...]] = []
    for step in range(steps):
        chosen = torch.from_numpy(np.concatenate([rng.choice(tiles, number) for tiles, number in shares]))
        tokens = tower(pixel_values=normalised(pixels[chosen]))[0][:, 1:]
        read, said = heads(tokens)
        glyph_loss = F.cross_entropy(read.flatten(0, 2), glyphs[chosen].flatten(), weight, ignore_index=UNREAD)
        asked = answers[chosen]
        losses = [
            F.cross_entropy(logits, asked[:, i]) for i, logits in enumerate(said) if bool((asked[:, i] >= 0).any())
        ]
        loss = glyph_loss + torch.stack(losses).mean()
        optimizers.step(loss, cosine(step, steps, 50))
        truth, best = glyphs[chosen], read.argmax(-1)
        digit, letter = (truth >= 0) & (truth < 10), (truth >= 10) & (truth < NO_GLYPH)
        coarse = torch.cat([(x.argmax(-1) == asked[:, i])[asked[:, i] >= 0] for i, x in enumerate(said)])
        right = (x.float().mean().item() for x in ((best == truth)[digit], (best == truth)[letter], coarse))
        recent = [*recent[1 - every :], (loss.item(), *right)]
        if (step + 1) % every == 0 or step + 1 == steps:
            names = ("loss", "digits", "letters", "coarse")
            means = {
                name: round(float(np.nanmean(c)), 4) for name, c in zip(names, zip(*recent, strict=True), strict=True)
            }
            log({"stage": "0a", "step": step + 1, **means, "cpu_s": round(time.process_time(), 1)})
    return heads


@torch.no_grad()
def features(tower: Any, bank: Bank, batch: int = 256) -> Tensor:
    """The tower's last hidden state of every tile of a bank, ``[n, 1 + 64, V]`` in bfloat16."""
    tower.eval()
    pixels = torch.from_numpy(bank.pixels)
    parts = [tower(pixel_values=normalised(pixels[i : i + batch]))[0].bfloat16() for i in range(0, len(bank), batch)]
    return torch.cat(parts)


@torch.no_grad()
def glyph_accuracy(tower: Any, heads: Heads, bank: Bank, batch: int = 256) -> dict[str, float]:
    """Share of digits and of letters that the patches name right, by kind of tile."""
    tower.eval()
    pixels, glyphs = torch.from_numpy(bank.pixels), torch.from_numpy(bank.glyphs).long()
    best = torch.cat([
        heads(tower(pixel_values=normalised(pixels[i : i + batch]))[0][:, 1:])[0].argmax(-1)
        for i in range(0, len(bank), batch)
    ])  # fmt: skip
    known = (glyphs >= 0) & (glyphs < NO_GLYPH)
    found = {}
    for kind in sorted(set(bank.kinds)):
        own = known & torch.tensor([k == kind for k in bank.kinds])[:, None, None]
        if own.any():
            found[kind] = round((best == glyphs)[own].float().mean().item(), 4)
    return found
