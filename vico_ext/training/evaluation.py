"""Score, divergence and cost of routings of a model: all tiles whole, all compressed, router policies, random."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vico_ext import functional as VF
from vico_ext.routing import RoutingPlan, RoutingPolicy, decide
from vico_ext.training.batches import Draw, MicroBatch, Samples, loader
from vico_ext.training.forward import Reference, answer_hidden, both_rates, vision_features, visual_tokens
from vico_ext.training.losses import answer_divergence, row_means
from vico_ext.training.models import tokens_per_tile
from vico_ext.training.options import EvalOptions
from vico_ext.training.records import Problem

__all__ = ["ALL_COMPRESSED", "ALL_WHOLE", "Evaluation", "Tally", "random_like"]

ALL_WHOLE, ALL_COMPRESSED = "all-256", "all-64"
Decisions = dict[str, Tensor]  # by routing, [tiles of the whole data] bool


@dataclass
class Tally:
    """Sums over conversations."""

    rows: int = 0
    exact: int = 0
    loss: float = 0.0
    kl: float = 0.0

    def add(self, exact: Tensor, loss: Tensor, kl: Tensor) -> None:
        """One value per conversation each."""
        self.rows += len(exact)
        self.exact += int(exact.sum())
        self.loss += float(loss.double().sum())
        self.kl += float(kl.double().sum())

    def means(self) -> dict[str, float]:
        """Means over conversations."""
        rows = max(self.rows, 1)
        return {"rows": self.rows, "score": self.exact / rows, "loss": self.loss / rows, "kl": self.kl / rows}


@dataclass
class _Routing:
    """What became of the data under one routing."""

    tiles: int = 0
    compressed: int = 0
    all: Tally = field(default_factory=Tally)
    families: dict[str, Tally] = field(default_factory=dict)
    prompts_per_s: dict[str, float] = field(default_factory=dict)


def random_like(compress: Tensor, seed: int) -> Tensor:
    """As many tiles, chosen at random from all."""
    order = torch.randperm(len(compress), generator=torch.Generator().manual_seed(seed), device="cpu")
    return compress[order.to(compress.device)]


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool, device="cpu")


class Evaluation:
    """Runs a model over data under several routings.

    A conversation is a call: a policy decides about its tiles alone, whatever else is in the batch. Random routings
    choose as many tiles as a policy did, from all of the data. After :meth:`run`, ``decisions`` has each routing's
    decision about all tiles in order, ``[T]`` bool, and ``outcomes`` which conversations it answered exactly, ``[C]``
    bool.

    Args:
        model: a patched model with Flash weights, on its device, in evaluation mode.
        reference: the model that KL is taken to.
        samples: the data.
        policies: by name.
        options: of the evaluation.
        progress: called with each micro-batch's number of items and the number of all.
        routings: further decisions by name, ``[T]`` bool each, about all tiles of the data in order: what else to
            compare the policies with.

    Raises:
        ValueError: from :meth:`run`, a routing of another number of tiles, or of a name that a policy has.
    """

    def __init__(
        self, model: Any, reference: Reference, samples: Samples, policies: Mapping[str, RoutingPolicy],
        options: EvalOptions, progress: Callable[[str, int, int], None] = lambda *_: None,
        routings: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.reference, self.samples = model, reference, samples
        self.policies, self.options, self.progress = policies, options, progress
        self.routings = dict(routings or {})
        self.decisions: Decisions = {}
        self._exact: dict[str, list[Tensor]] = {}
        self.device = next(model.parameters()).device
        self.problems: list[Problem] = list(samples.corpus.problems)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=options.precision == "bf16")

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """The report's part on routings, by name."""
        self.decisions = decisions = self._decisions()
        self._exact = {name: [] for name in decisions}
        routings = {name: _Routing() for name in decisions}
        start = 0
        for batch in self._batches("answers"):
            tiles = sum(batch.tiles)
            with self.autocast:
                self._answers(batch, {k: d[start : start + tiles] for k, d in decisions.items()}, routings)
            start += tiles
        for name in (ALL_WHOLE, ALL_COMPRESSED, *self.policies):
            for size in self.options.throughput_batches if self.options.throughput_seconds else ():
                with self.autocast:
                    routings[name].prompts_per_s[str(size)] = self._throughput(name, size)
        return {name: self._entry(routing) for name, routing in routings.items()}

    @property
    def outcomes(self) -> Decisions:
        """Which conversations each routing answered exactly, ``[C]`` bool, in the order of the data."""
        return {name: _joined(own) for name, own in self._exact.items()}

    def _batches(self, name: str) -> Iterator[MicroBatch]:
        items, size = len(self.samples.corpus.items), self.options.micro_batch
        groups = [[Draw(i, 0) for i in range(start, min(start + size, items))] for start in range(0, items, size)]
        seen: set[Problem] = set(self.problems)
        for done, batch in enumerate(loader(self.samples, groups, self.options.workers), 1):
            self.problems += [problem for problem in batch.problems if problem not in seen]
            if not batch.blank:
                yield batch.to(self.device)
            self.progress(name, done, len(groups))

    def _decisions(self) -> Decisions:
        """Each routing's decision about all tiles, in order."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.policies}
        tiles = 0
        for batch in self._batches("router"):
            with self.autocast:
                p = self.model.model.vico.probabilities(self._vit(batch))
            for own, images in zip(p.split(batch.tiles), batch.images_of_item, strict=True):
                for name, policy in self.policies.items():
                    parts[name].append(self._decide(own, policy, images))
            tiles += len(p)
        decisions: Decisions = {ALL_WHOLE: torch.zeros(tiles, dtype=torch.bool, device="cpu")}
        decisions[ALL_COMPRESSED] = ~decisions[ALL_WHOLE]
        for name, own in parts.items():
            decisions[name] = _joined(own)
            decisions[f"random as {name}"] = random_like(decisions[name], self.options.seed)
        for name, given in self.routings.items():
            if name in decisions:
                raise ValueError(f"routings must have names of their own, got {name!r}")
            if given.dtype != torch.bool or given.shape != (tiles,):
                raise ValueError(
                    f"routing {name!r} must be [{tiles}] bool, a decision for each tile of the data, got "
                    f"{list(given.shape)} {str(given.dtype).removeprefix('torch.')}"
                )
            decisions[name] = given.cpu()
        return decisions

    def _decide(self, p: Tensor, policy: RoutingPolicy, images: tuple[int, ...]) -> Tensor:
        counts = torch.tensor(images, device=p.device)
        return decide(p, policy, counts, tokens_per_tile(self.model.config)).cpu()

    def _vit(self, batch: MicroBatch) -> Tensor:
        return vision_features(self.model.model.vision_tower, batch.pixel_values)

    def _answers(self, batch: MicroBatch, decisions: Decisions, routings: dict[str, _Routing]) -> None:
        """Adds a micro-batch's answers under all routings; features and connectors run once."""
        config = self.model.config
        vit_tokens = self._vit(batch)
        whole, small = both_rates(self.model, vit_tokens)
        reference = self.reference.hidden(batch, vit_tokens)
        targets, counts = batch.targets[batch.predict], batch.answer_tokens
        for name, compress in decisions.items():
            plan = RoutingPlan.from_compress(compress.to(self.device), tokens_per_tile(config))
            full, rest = plan.order[: plan.full_tiles], plan.order[plan.full_tiles :]
            visual = VF.pack_tokens(whole[full], small[rest].to(whole.dtype), plan)
            given = (plan, batch.input_ids, batch.attention_mask, batch.predict, config.image_token_id)
            hidden = answer_hidden(self.model.model.language_model, visual, *given)
            logits = self.model.lm_head(hidden).float()
            right = (logits.argmax(-1) == targets).float()
            exact = row_means(right, counts) == 1
            loss = row_means(F.cross_entropy(logits, targets, reduction="none"), counts)
            _, kl_of_token = answer_divergence(reference, self.reference.head, hidden, self.model.lm_head)
            kl = row_means(kl_of_token, counts)
            self._exact[name].append(exact.cpu())
            routing = routings[name]
            routing.tiles += plan.tiles
            routing.compressed += plan.compressed_tiles
            routing.all.add(exact, loss, kl)
            for family in sorted(set(batch.families) - {""}):
                own = torch.tensor([f == family for f in batch.families], device=self.device)
                routing.families.setdefault(family, Tally()).add(exact[own], loss[own], kl[own])

    def _entry(self, routing: _Routing) -> dict[str, Any]:
        full, compressed = tokens_per_tile(self.model.config)
        before = routing.tiles * full
        kept = before - routing.compressed * (full - compressed)
        return {
            **routing.all.means(),
            "visual_tokens": kept,
            "tokens_kept": kept / before if before else 1.0,
            "tiles": routing.tiles,
            "tiles_compressed": routing.compressed / routing.tiles if routing.tiles else 0.0,
            "first_token_prompts_per_s": routing.prompts_per_s,
            "families": {name: tally.means() for name, tally in sorted(routing.families.items())},
        }

    def _throughput(self, name: str, size: int) -> float:
        """Prompts per second to the first token: ViT, router, connectors, language model; median over runs."""
        items = len(self.samples.corpus.items)
        groups = [[Draw(i % items, 0) for i in range(size)]]
        batch = next(iter(loader(self.samples, groups, 0))).to(self.device)
        if batch.blank:
            raise ValueError("the first conversations cannot be read: there is nothing to time")
        first = batch.predict.int().argmax(1)
        length = int(first.max()) + 1
        places = torch.arange(length, device=self.device)
        ids, mask = batch.input_ids[:, :length], (places <= first[:, None]).long()
        predict = places == first[:, None]

        def run() -> None:
            vit_tokens = self._vit(batch)
            if name in self.policies:
                p = self.model.model.vico.probabilities(vit_tokens)
                own = zip(p.split(batch.tiles), batch.images_of_item, strict=True)
                compress = torch.cat([self._decide(part, self.policies[name], images) for part, images in own])
            else:
                compress = torch.full((len(vit_tokens),), name == ALL_COMPRESSED, device=self.device)
            plan = RoutingPlan.from_compress(compress.to(self.device), tokens_per_tile(self.model.config))
            visual = visual_tokens(self.model, vit_tokens, plan)
            given = (visual, plan, ids, mask, predict, self.model.config.image_token_id)
            self.model.lm_head(answer_hidden(self.model.model.language_model, *given)).argmax(-1).cpu()

        run()
        times: list[float] = []
        while sum(times) < self.options.throughput_seconds or len(times) < 3:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return batch.rows / statistics.median(times)
