"""Stage 0b: the 256-token connector and the language model learn to answer, on features of the frozen ViT.

Reading comes late and all at once, at a step that differs by seed: both parts stop on accuracy, within a limit.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reproduce.optim import Optimizers, level
from reproduce.pages import FINE, Page, PageBatch, Pages, Shared, answer_logits
from vico_ext import functional as VF

__all__ = ["Lesson", "evaluate", "train_reader", "visual_tokens"]


@dataclass(frozen=True)
class Lesson:
    """A part of the curriculum.

    Attributes:
        tiles: of a page.
        batch: pages of a step.
        questions: of a page at most.
        steps: at most.
        target: share of number questions answered right, averaged over the last steps, at which it ends.
        peak: learning rate; constant after its warm-up, and brought down over ``cooldown`` steps once the target is
            reached or the steps are nearly used.
        cooldown: steps.
    """

    tiles: int
    batch: int
    questions: int
    steps: int
    target: float
    peak: float = 2e-3
    cooldown: int = 100
    warmup: int = 40


def visual_tokens(model: Any, features: Tensor) -> Tensor:
    """``[n, 16, H]`` of features ``[n, 1 + 64, V]``, all tiles whole."""
    return model.model.multi_modal_projector(VF.pixel_shuffle(features, 2))


def right_answers(logits: Tensor, batch: PageBatch) -> list[tuple[Page, int, bool]]:
    """Of each question: its page, its number there, and whether every token of its answer has the largest logit."""
    wrong = torch.zeros_like(batch.predict)
    wrong[batch.predict] = logits.argmax(-1) != batch.targets[batch.predict]
    by_question = wrong[:, batch.prefix :].unflatten(1, (-1, batch.span))
    # The token that predicts the first one of an answer stands in the same span, since spans begin with the question.
    right = ~by_question.any(-1)
    return [
        (page, number, bool(right[row, number]))
        for row, page in enumerate(batch.pages)
        for number in range(len(page.asked))
    ]


def train_reader(
    model: Any,
    pages: Pages,
    features: Tensor,
    shared: Shared,
    lesson: Lesson,
    *,
    log: Callable[[dict[str, Any]], None],
    every: int = 25,
) -> bool:
    """One lesson; gives back whether its target was reached."""
    frozen = (".vision_tower.", ".vico.")
    trained = [(name, p) for name, p in model.named_parameters() if not any(part in name for part in frozen)]
    optimizers = Optimizers(trained, lesson.peak)
    model.train()
    step, ends, reached = 0, lesson.steps, False
    window: list[tuple[float, float, float]] = []
    while step < ends:
        rate = level(step, ends, lesson.warmup, lesson.cooldown)
        first = 1 + step % 4 if lesson.tiles == 1 else 1
        drawn = [
            pages.draw(lesson.tiles, lesson.questions, first=first, fine_only=lesson.tiles == 1 and number % 2 == 0)
            for number in range(lesson.batch)
        ]
        batch = shared.batch(drawn)
        logits = answer_logits(model, batch, visual_tokens(model, features[batch.tiles.flatten()].float()))
        loss = F.cross_entropy(logits, batch.targets[batch.predict])
        optimizers.step(loss, rate)
        step += 1
        answers = right_answers(logits.detach(), batch)
        numbers = [ok for page, n, ok in answers if page.asked[n].question.skill in FINE]
        others = [ok for page, n, ok in answers if page.asked[n].question.skill not in FINE]
        window.append((loss.item(), sum(numbers) / max(1, len(numbers)), sum(others) / max(1, len(others))))
        window = window[-every:]
        loss_mean, fine, coarse = (sum(column) / len(window) for column in zip(*window, strict=True))
        if not reached and len(window) == every and min(fine, coarse) >= lesson.target:
            reached, ends = True, min(ends, step + lesson.cooldown)
        if step % every == 0 or step == ends:
            log({
                "stage": f"0b, {lesson.tiles} tiles", "step": step, "loss": round(loss_mean, 4),
                "numbers": round(fine, 4), "others": round(coarse, 4), "rate": round(lesson.peak * rate, 6),
                "cpu_s": round(time.process_time(), 1),
            })  # fmt: skip
    return reached


@torch.no_grad()
def evaluate(
    model: Any, pages: Pages, features: Tensor, shared: Shared, count: int = 256, batch: int = 32
) -> dict[str, float]:
    """Share of questions answered right: all, per family of pages, per skill."""
    model.eval()
    found: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, count, batch):
        made = shared.batch([pages.draw() for _ in range(min(batch, count - start))])
        tokens = visual_tokens(model, features[made.tiles.flatten()].float())
        for page, number, ok in right_answers(answer_logits(model, made, tokens), made):
            for name in ("all", page.family, f"skill {page.asked[number].question.skill}"):
                found[name].append(ok)
    return {name: round(sum(own) / len(own), 4) for name, own in sorted(found.items())}
