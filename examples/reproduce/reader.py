"""Stage 0b: the 256-token connector and the language model learn to answer, on features of the frozen ViT.

Reading comes late and all at once, at a step that differs by seed: both parts stop on accuracy, within a limit.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reproduce.drawing import TABS
from reproduce.optim import Optimizers, level
from reproduce.pages import READING, Chats, Pages, answer_logits, right_answers
from vico_ext import functional as VF

__all__ = ["Lesson", "evaluate", "train_reader", "visual_tokens"]


@dataclass(frozen=True)
class Lesson:
    """How stage 0b goes.

    Attributes:
        batch: pages of four tiles a step; of one tile, twice as many.
        questions: of a page at most; of one tile, half as many.
        alone: steps over which the share of steps with one-tile pages falls from all to none.
        steps: at most.
        target: share of questions answered right over the last steps, of those to read and of the rest each, at which
            it ends.
        peak: learning rate; constant after its warm-up, and brought down over ``cooldown`` steps once the target is
            reached or the steps are nearly used.
        cooldown: steps.
        noise: that is added to the ViT's features, in their standard deviations: fonts that the model never saw look
            a little different to the ViT, and the reader should not mind.
        patience: steps after which a model that reads less than ``started`` is given up: whether reading sets in early
            depends on the weights that it starts from.
        started: share of questions to read that are answered right.
    """

    batch: int = 24
    questions: int = 10
    alone: int = 200
    steps: int = 1700
    target: float = 0.985
    peak: float = 6e-3
    cooldown: int = 300
    warmup: int = 40
    noise: float = 0.3
    patience: int = 600
    started: float = 0.15


def visual_tokens(model: Any, features: Tensor) -> Tensor:
    """``[n, 16, H]`` of features ``[n, 1 + 64, V]``, all tiles whole."""
    return model.model.multi_modal_projector(VF.pixel_shuffle(features, 2))


def train_reader(
    model: Any,
    pages: Pages,
    features: Tensor,
    chats: Chats,
    lesson: Lesson,
    *,
    seed: int,
    log: Callable[[dict[str, Any]], None],
    every: int = 25,
) -> bool | None:
    """One lesson; gives back whether its target was reached, or None where it was given up."""
    frozen = (".vision_tower.", ".vico.")
    trained = [(name, p) for name, p in model.named_parameters() if not any(part in name for part in frozen)]
    optimizers = Optimizers(trained, lesson.peak)
    for part in (model.model.vision_tower, model.model.language_model):
        part.config._attn_implementation = "eager"
    model.train()
    step, ends, reached = 0, lesson.steps, False
    chance = random.Random(seed)
    device = next(model.parameters()).device
    spread = lesson.noise * features[:1000].float().std((0, 1)).to(device)
    windows: dict[int, deque[tuple[float, float, float]]] = {n: deque(maxlen=every) for n in (1, len(TABS))}
    while step < ends:
        rate = level(step, ends, lesson.warmup, lesson.cooldown)
        alone = chance.random() >= step / lesson.alone
        count, questions = (2 * lesson.batch, lesson.questions // 2) if alone else (lesson.batch, lesson.questions)
        drawn = [pages.draw(questions, alone=alone) for _ in range(count)]
        batch = chats.batch(drawn).to(device)
        seen = features[batch.tiles].to(device).float()
        with torch.autocast(device.type, torch.bfloat16):
            logits = answer_logits(model, batch, visual_tokens(model, seen + spread * torch.randn_like(seen)))
        loss = F.cross_entropy(logits.float(), batch.targets[batch.predict])
        optimizers.step(loss, rate)
        step += 1
        answers = right_answers(logits.detach(), batch)
        reading = [ok for _, asked, ok in answers if asked.question.skill in READING]
        others = [ok for _, asked, ok in answers if asked.question.skill not in READING]
        if step > lesson.alone:
            windows[1].clear()  # there are no more of these, and old means would look like new ones
        windows[len(drawn[0].tiles)].append(
            (loss.item(), sum(reading) / max(1, len(reading)), sum(others) / max(1, len(others)))
        )
        means = {
            tiles: [sum(column) / len(own) for column in zip(*own, strict=True)]
            for tiles, own in windows.items()
            if own
        }
        if not reached and len(windows[len(TABS)]) == every and min(means[len(TABS)][1:]) >= lesson.target:
            reached, ends = True, min(ends, step + lesson.cooldown)
        if step == lesson.patience and means[len(TABS)][1] < lesson.started:
            return None
        if step % every == 0 or step == ends:
            found = {f"{tiles} tiles": [round(value, 4) for value in own] for tiles, own in means.items()}
            log({"stage": "0b", "step": step, **found, "cpu_s": round(time.process_time(), 1)})
    return reached


@torch.no_grad()
def evaluate(
    model: Any, pages: Pages, features: Tensor, chats: Chats, count: int = 256, batch: int = 32
) -> dict[str, float]:
    """Share of questions answered right: all, per family of pages, per skill."""
    model.eval()
    found: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, count, batch):
        made = chats.batch([pages.draw() for _ in range(min(batch, count - start))]).to(model.device)
        tokens = visual_tokens(model, features[made.tiles].to(model.device).float())
        for page, asked, ok in right_answers(answer_logits(model, made, tokens), made):
            for name in ("all", page.family, f"skill {asked.question.skill}"):
                found[name].append(ok)
    return {name: round(sum(own) / len(own), 4) for name, own in sorted(found.items())}
