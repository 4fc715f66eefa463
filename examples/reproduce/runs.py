"""What an evaluation left in a run's folder: the seeds, their figures, and intervals over pages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

__all__ = [
    "DRAWS",
    "REFERENCE",
    "ROUNDING",
    "SPEED",
    "Gaps",
    "Range",
    "Run",
    "Seed",
    "bootstrap",
    "figure",
    "is_figure",
    "read_lines",
]

GROUPS = ("all-256", "all-64 before", "all-64", "router", "random", "edges", "oracle")
REFERENCE, SPEED = "reference", "first_token_prompts_per_s"
DRAWS = 2000
ROUNDING = 1e-9  # 0.9 - 0.8 is a little less than 0.1


@dataclass(frozen=True)
class Range:
    """A figure and what it lies between: the seeds' least and largest, or the ends of its 95% interval."""

    value: float
    low: float
    high: float

    @staticmethod
    def over(values: Iterable[float]) -> Range | None:
        """Mean, least and largest; None of no values."""
        known = list(values)
        return Range(math.fsum(known) / len(known), min(known), max(known)) if known else None


Gaps = dict[str, dict[str, Range | None]]  # what is compared, then the seed or "pooled"


@dataclass(frozen=True)
class Seed:
    """One seed's evaluation: Q questions, T tiles.

    Attributes:
        number: of the seed.
        results: ``results.json``.
        outcomes: per routing ``[Q]``, 1 where the answer is right.
        page: ``[Q]``, the page of each question.
        decisions: per routing ``[T]`` bool, True where compressed; four tiles per page in reading order.
        logs: lines of stages "1" and "2".
    """

    number: int
    results: dict[str, Any]
    outcomes: dict[str, np.ndarray]
    page: np.ndarray
    decisions: dict[str, np.ndarray]
    logs: dict[str, list[dict[str, Any]]]

    @staticmethod
    def read(folder: Path) -> Seed:
        """Reads ``seed-<n>``."""
        path = folder / "results.json"
        results = json.loads(path.read_text(encoding="utf-8"))
        routings = results.get("routings", {})
        for name in (REFERENCE, results.get("chosen", {}).get("routing")):
            if name not in routings:
                raise ValueError(f"{path}: wanted routings with {REFERENCE!r} and the chosen one, got {list(routings)}")
        for name, entry in routings.items():
            got = {key: entry.get(key) for key in ("group", "tokens_kept", "score")}
            if got["group"] not in GROUPS or not all(map(is_figure, (got["tokens_kept"], got["score"]))):
                raise ValueError(f"{path}, {name!r}: wanted figures and a group of {GROUPS}, got {got}")
        outcomes, decisions = load_file(folder / "outcomes.safetensors"), folder / "decisions.safetensors"
        shapes = {name: tensor.shape for name, tensor in outcomes.items()}
        if "page" not in shapes or len(set(shapes.values())) > 1:
            raise ValueError(f"{folder / 'outcomes.safetensors'}: wanted 'page' and all [questions], got {shapes}")
        logs = {stage: read_lines(folder / f"stage{stage}" / "metrics.jsonl") for stage in "12"}
        known = load_file(decisions) if decisions.is_file() else {}
        return Seed(int(folder.name[5:]), results, outcomes, outcomes.pop("page"), known, logs)


def is_figure(value: Any) -> bool:
    """Whether it can be reckoned with."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Entries of a JSONL file, none where there is none; a half line, which a kill leaves, is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


@dataclass(frozen=True)
class Run:
    """All seeds of a run.

    Attributes:
        out: its folder.
        seeds: at least one, all of the same questions.
        reference_log: lines of stage 0.
        lines: the test questions in the outcomes' order, or none.
        chosen: name of the routing that the bar is about.
        notes: what a reader must know: what is missing, and where files say different things.
    """

    out: Path
    seeds: list[Seed]
    reference_log: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    chosen: str
    notes: list[str]

    @staticmethod
    def read(out: Path) -> Run:
        """Reads OUT.

        Raises:
            ValueError: no seed was evaluated, or files do not belong together.
        """
        folders = sorted((p for p in out.glob("seed-*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
        done = [folder for folder in folders if (folder / "results.json").is_file()]
        if not done:
            raise ValueError(f"out: wanted {out}/seed-<n>/results.json, which an evaluation writes, found none")
        seeds = [Seed.read(folder) for folder in done]
        page, chosen = seeds[0].page, {seed.results["chosen"]["routing"] for seed in seeds}
        if len(chosen) > 1 or any(not np.array_equal(seed.page, page) for seed in seeds):
            raise ValueError(f"{out}: wanted the same questions and chosen name in all seeds, got {sorted(chosen)}")
        lines = read_lines(out / "test" / "data.jsonl")
        starts = [a["image"] != b["image"] for a, b in pairwise(lines)]
        if lines and not np.array_equal(np.cumsum([0, *starts]), page):
            raise ValueError(
                f"{out / 'test' / 'data.jsonl'}: wanted {len(page)} lines on {page.max() + 1} pages, those of the "
                f"outcomes, got {len(lines)} lines on {sum(starts) + 1}"
            )
        notes = [f"{p.name} has no results.json and is left out." for p in folders if p not in done]
        if len(seeds) == 1:
            notes.append("One seed only: there is no spread over seeds.")
        run = Run(out, seeds, read_lines(out / "reference" / "log.jsonl"), lines, chosen.pop(), notes)
        for seed in seeds:
            notes += [f"Seed {seed.number}: {text}" for text in run._doubts(seed)]
        return run

    def _doubts(self, seed: Seed) -> list[str]:
        """What a seed's files lack, or say differently."""
        routings, found = seed.results["routings"], []
        for name, entry in routings.items():
            told, kept = entry["score"], entry["tokens_kept"]
            seen = float(seed.outcomes[name].mean()) if name in seed.outcomes else None
            if seen is None:
                found.append(f"{name} has no outcomes, so no intervals.")
            elif abs(seen - told) > 5e-4:
                found.append(f"**contradiction** for {name}: results.json {figure(told)}, outcomes {figure(seen)}.")
            own = routings[self.chosen]["tokens_kept"]
            if name.endswith(f" as {self.chosen}") and abs(kept - own) > 0.005:
                found.append(f"**not the same budget**: {name} keeps {figure(kept)} of tokens, not {figure(own)}.")
        return found

    def names(self, *groups: str) -> list[str]:
        """Routings of these groups, or all: the reference, then group by group, by tokens kept."""
        listed = {name: entry["group"] for seed in self.seeds for name, entry in seed.results["routings"].items()}
        kept = {name: Range.over(self.values(name, "tokens_kept").values()) for name in listed}
        order = {name: (name != REFERENCE, GROUPS.index(listed[name]), r.value, name) for name, r in kept.items() if r}
        return [name for name in sorted(order, key=order.__getitem__) if listed[name] in (groups or GROUPS)]

    def rival(self, group: str) -> str:
        """Who chooses otherwise at the chosen routing's budget."""
        return f"{group} as {self.chosen}"

    def shown(self) -> list[str]:
        """What is set side by side: the reference, every tile compressed, the chosen routing and its rivals."""
        wanted = [REFERENCE, *self.names("all-64 before", "all-64"), self.chosen, *map(self.rival, ("random", "edges"))]
        return [name for name in wanted if name in self.names()]

    def whole(self) -> str | None:
        """The policy with every tile whole."""
        return next((name for name in self.names("all-256") if name != REFERENCE), None)

    def values(self, name: str | None, *keys: str, of: str | None = None) -> dict[int, float]:
        """By seed the figure at ``keys`` of a routing, or its ratio to another's; only where there is one."""
        found = {}
        for seed in self.seeds:
            entry: Any = seed.results["routings"].get(name)
            for key in keys:
                entry = entry.get(key) if isinstance(entry, dict) else None
            if is_figure(entry):
                found[seed.number] = float(entry)
        if of is None:
            return found
        other = self.values(of, *keys)
        return {seed: value / other[seed] for seed, value in found.items() if other.get(seed)}

    def spread(self, name: str, *keys: str, of: str | None = None) -> Range | None:
        """The same over seeds."""
        return Range.over(self.values(name, *keys, of=of).values())

    def keys(self, part: str) -> list[str]:
        """Keys of the routings' dictionaries of that name, in order of appearance."""
        entries = (entry.get(part) or {} for seed in self.seeds for entry in seed.results["routings"].values())
        return list(dict.fromkeys(key for entry in entries for key in entry))

    def compare(self, other: str, ratio: bool = False) -> dict[str, Range | None]:
        """Bootstrap of the chosen routing against another, per seed and pooled; None where outcomes are missing."""

        def between(seeds: list[Seed]) -> Range | None:
            if any(name not in seed.outcomes for seed in seeds for name in (self.chosen, other)):
                return None
            ours, theirs = (np.stack([seed.outcomes[name] for seed in seeds]) for name in (self.chosen, other))
            return bootstrap(ours, theirs, seeds[0].page, ratio=ratio)

        found = {f"seed {seed.number}": between([seed]) for seed in self.seeds}
        return {**found, "pooled": between(self.seeds)} if len(found) > 1 else found

    def gaps(self) -> Gaps:
        """The comparisons that the report shows."""
        found = {f"{self.chosen} minus {group}": self.compare(self.rival(group)) for group in ("random", "edges")}
        return {**found, f"{self.chosen}, share of the reference's score": self.compare(REFERENCE, ratio=True)}


def bootstrap(
    right: np.ndarray, other: np.ndarray, page: np.ndarray, *, ratio: bool = False, draws: int = DRAWS, seed: int = 0
) -> Range | None:
    """Paired bootstrap over whole pages: a page is drawn with all its questions, of both routings and all seeds.

    Args:
        right: ``[..., Q]``, 1 where a routing's answer is right; leading dimensions are seeds.
        other: the same of the routing it is compared with.
        page: ``[Q]``, the page of each question.
        ratio: of the scores, rather than their difference.
        draws: resamples.
        seed: of the draws; the same pages are drawn in every comparison.

    Returns:
        None where a ratio is not defined: in some draw ``other`` has nothing right.
    """
    numbers, place = np.unique(page, return_inverse=True)
    a, b, ones = (
        np.bincount(place, np.reshape(x, (-1, len(page))).sum(0, dtype=np.float64), len(numbers))
        for x in (right, other, np.ones_like(right))
    )
    times = np.random.default_rng(seed).multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), size=draws)
    times = np.concatenate([np.ones_like(times[:1]), times])  # first the pages as they are
    over = times @ (b if ratio else ones)
    if not over.all():
        return None
    value, *drawn = (times @ (a if ratio else a - b)) / over
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Range(float(value), float(low), float(high))


def figure(value: float | Range | None, digits: int = 2, scale: float = 100, unit: str = "%") -> str:
    """As 12.34%, with its range in brackets where there is one; a dash where there is nothing."""
    if value is None:
        return "–"
    known = value if isinstance(value, Range) else Range(value, value, value)
    mean, low, high = (f"{scale * x:.{digits}f}" for x in (known.value, known.low, known.high))
    return f"{mean}{unit}" + (f" [{low}..{high}]" if low != high else "")
