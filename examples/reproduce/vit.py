"""Stage 0a: the ViT learns to see. Each patch names its glyph, where it is, and what the whole tile shows.

Only the ViT is kept. Without the glyphs a language model on top takes very long to find out that print can be read;
without row, column and tab, to find the patch that a question means.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproduce.bank import GLYPHS, NO_GLYPH, UNREAD, Bank
from reproduce.drawing import PATCH, SIDE, TABS
from reproduce.model import normalised
from reproduce.optim import Optimizers, cosine

__all__ = ["Heads", "features", "glyph_accuracy", "train_vit"]

_COARSE = ("kind", "color", "shape", "count", "switch 1", "switch 2")


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
    """What reads the ViT while it learns, and is thrown away: a linear layer, so that what patches hold lies open."""

    def __init__(self, width: int, answers: list[int]) -> None:
        super().__init__()
        side = SIDE // PATCH
        self.sizes = [len(GLYPHS) + 1, side, side, len(TABS), *answers]
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Logits ``[n, 64, classes]`` of patch tokens ``[n, 64, V]``: glyph, row, column, tab, and each question's."""
        return list(self.linear(tokens).split(self.sizes, -1))


def _per_patch(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of ``[n, 64, classes]`` and ``[n, 64]`` or ``[n, 1]``, -100 where nothing is asked."""
    truth = truth.expand(logits.shape[:2])
    total = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="sum")
    return total / (truth >= 0).sum().clamp(min=1)


def train_vit(
    tower: Any,
    bank: Bank,
    sheets: Bank,
    steps: int,
    *,
    batch: int = 32,
    share: float = 0.6,
    peak: float = 4e-3,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None],
    every: int = 50,
) -> Heads:
    """Trains the tower in place, on its device; gives back the heads that read it.

    Args:
        tower: an InternVL vision model.
        bank: tiles of pages.
        sheets: tiles full of print.
        steps: of the optimizer.
        batch: tiles of a step.
        share: of sheets among them.
        peak: learning rate.
        seed: of the heads and of which tiles.
        log: called every ``every`` steps with means over these.
    """
    device = next(tower.parameters()).device
    answers, sizes = coarse_targets(bank)
    glyphs, pixels = torch.from_numpy(bank.glyphs), torch.from_numpy(bank.pixels)
    sheet_glyphs, sheet_pixels = torch.from_numpy(sheets.glyphs), torch.from_numpy(sheets.pixels)
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = Heads(tower.config.hidden_size, sizes).to(device)
    optimizers = Optimizers([*tower.named_parameters(), *heads.named_parameters()], peak)
    on_sheets = round(batch * share)
    side = SIDE // PATCH
    places = torch.arange(side * side, device=device)[None]
    weight = torch.ones(len(GLYPHS) + 1, device=device)
    weight[NO_GLYPH] = 0.1  # most patches are empty
    tower.config._attn_implementation = "eager"
    tower.train()
    recent: list[tuple[float, ...]] = []
    for step in range(steps):
        chosen = torch.from_numpy(rng.integers(len(bank), size=batch - on_sheets))
        sheet = torch.from_numpy(rng.integers(len(sheets), size=on_sheets))
        shown = torch.cat([pixels[chosen], sheet_pixels[sheet]]).to(device)
        truth = torch.cat([glyphs[chosen], sheet_glyphs[sheet]]).long().to(device)
        asked = torch.cat([answers[chosen], torch.full((on_sheets, answers.shape[1]), -100)]).to(device)
        tabs = (torch.cat([chosen, sheet]) % len(TABS)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            tokens = tower(pixel_values=normalised(shown))[0][:, 1:]
        read, *said = heads(tokens.float())
        glyph_loss = F.cross_entropy(read.flatten(0, 1), truth.flatten(), weight, ignore_index=UNREAD)
        truths = (places // side, places % side, tabs[:, None])
        where = [_per_patch(logits, own) for logits, own in zip(said[:3], truths, strict=True)]
        coarse = [_per_patch(logits, asked[:, i, None]) for i, logits in enumerate(said[3:])]
        loss = glyph_loss + 0.3 * sum(where) + sum(coarse) / len(coarse)
        optimizers.step(loss, cosine(step, steps, 50))
        best = read.argmax(-1)
        digit, letter = (truth >= 0) & (truth < 10), (truth >= 10) & (truth < NO_GLYPH)
        told = torch.cat([(x.argmax(-1) == asked[:, i, None])[asked[:, i] >= 0] for i, x in enumerate(said[3:])])
        right = (x.float().mean().item() for x in ((best == truth)[digit], (best == truth)[letter], told))
        recent = [*recent[1 - every :], (loss.item(), float(torch.stack(where).sum().detach()), *right)]
        if (step + 1) % every == 0 or step + 1 == steps:
            names = ("loss", "where", "digits", "letters", "coarse")
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
    device = next(tower.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        parts = [
            tower(pixel_values=normalised(pixels[i : i + batch].to(device)))[0].bfloat16().cpu()
            for i in range(0, len(bank), batch)
        ]
    return torch.cat(parts)


@torch.no_grad()
def glyph_accuracy(tower: Any, heads: Heads, bank: Bank, batch: int = 256) -> dict[str, float]:
    """Share of digits and of letters that the patches name right, by kind of tile."""
    tower.eval()
    pixels, glyphs = torch.from_numpy(bank.pixels), torch.from_numpy(bank.glyphs).long()
    device = next(tower.parameters()).device
    best = torch.cat([
        heads(tower(pixel_values=normalised(pixels[i : i + batch].to(device)))[0][:, 1:])[0].argmax(-1).cpu()
        for i in range(0, len(bank), batch)
    ])  # fmt: skip
    known = (glyphs >= 0) & (glyphs < NO_GLYPH)
    found = {}
    for kind in sorted(set(bank.kinds)):
        own = known & torch.tensor([k == kind for k in bank.kinds])[:, None]
        if own.any():
            found[kind] = round((best == glyphs)[own].float().mean().item(), 4)
    return found
