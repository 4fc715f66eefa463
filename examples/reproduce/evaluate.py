"""What a seed's model answers under every routing. Thresholds are chosen on validation pages; figures are of test."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reproduce.stages import TILES
from vico_ext._files import replacing
from vico_ext.routing import ThresholdPolicy
from vico_ext.training.batches import Draw, MicroBatch, Samples, loader
from vico_ext.training.evaluation import ALL_COMPRESSED, ALL_WHOLE, Evaluation, random_like
from vico_ext.training.forward import Reference, vision_features
from vico_ext.training.models import average_connector, load_model, tokens_per_tile
from vico_ext.training.options import EvalOptions, RouterOptions
from vico_ext.training.router import RouterModule
from vico_ext.training.setup import load_reference, read_data

__all__ = ["BUDGETS", "KEPT", "edge_density", "evaluate", "kept_share", "threshold_for"]

BUDGETS = (0.35, 0.4, 0.45, 0.48, 0.55, 0.7)  # shares of the visual tokens that are kept
KEPT = 0.998  # of the score with all tiles whole that the chosen threshold must keep on validation pages
RULE = (
    f"the fewest tokens, of budgets {', '.join(f'{b:.0%}' for b in BUDGETS)}, that keep {KEPT:.1%} of the score with "
    "all tiles whole on validation pages; at most 50%"
)


@dataclass(frozen=True)
class Pages:
    """Pages with their tiles' figures, in order.

    Attributes:
        samples: a conversation per question.
        lines: of the JSONL file, one per question.
        page: of each question. [C]
        p: that the tile is compressed, as the router says. [4 * pages]
        edges: see :func:`edge_density`. [4 * pages]
    """

    samples: Samples
    lines: list[dict[str, Any]]
    page: Tensor
    p: Tensor
    edges: Tensor

    def per_question(self, compress: Tensor) -> Tensor:
        """Decisions about pages' tiles ``[4 * pages]`` as decisions about each question's ``[4 * C]``."""
        return compress.view(-1, 4)[self.page].flatten()


def edge_density(pixel_values: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels of tiles ``[P, 3, S, S]``: what print has much of. [P]"""
    grey = pixel_values.mean(1)
    return grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))


def threshold_for(p: Tensor, budget: float, tokens: tuple[int, int]) -> float:
    """The threshold that keeps that share of the tokens of tiles with these p ``[P]``, compressed where p >= it."""
    full, small = tokens
    compressed = min(len(p), round(len(p) * (1 - budget) * full / (full - small)))
    return float(p.sort(descending=True).values[max(compressed, 1) - 1])


def kept_share(compress: Tensor, tokens: tuple[int, int]) -> float:
    """The share of visual tokens that are left of tiles ``[P]`` of which these are compressed."""
    full, small = tokens
    return 1 - float(compress.double().mean()) * (full - small) / full


def _fewest_first(values: Tensor, compressed: int) -> Tensor:
    """The tiles with the smallest values are compressed, so many. [P] bool"""
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.argsort()[:compressed]] = True
    return chosen


def _options(kind: type[Any], model: Path, data: Path, **more: Any) -> Any:
    return kind(model=str(model), data=str(data), out="-", workers=0, **TILES, **more)


def _batches(samples: Samples, size: int) -> list[MicroBatch]:
    items = len(samples.corpus.items)
    groups = [[Draw(i, 0) for i in range(start, min(start + size, items))] for start in range(0, items, size)]
    return list(loader(samples, groups, 0))


@torch.no_grad()
def read_pages(model: Any, folder: Path, data: Path) -> Pages:
    """Pages of a JSONL file, a conversation per question."""
    samples = read_data(_options(EvalOptions, folder, data), model.config, measure=False)
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    images = list(dict.fromkeys(line["image"] for line in lines))
    grouped = read_data(_options(RouterOptions, folder, data), model.config, questions=99, measure=False)
    p, edges = [], []
    for batch in _batches(grouped, 32):
        pixel_values = batch.pixel_values.to(model.device)
        p.append(model.model.vico.probabilities(vision_features(model.model.vision_tower, pixel_values)).cpu())
        edges.append(edge_density(batch.pixel_values))
    page = torch.tensor([images.index(line["image"]) for line in lines])
    return Pages(samples, lines, page, torch.cat(p), torch.cat(edges))


@torch.no_grad()
def loss_ratios(model: Any, reference: Reference, folder: Path, data: Path) -> Tensor:
    """What each tile's compression does to the loss of its page's answers, knowing them: the oracle's order. [P]"""
    options = _options(RouterOptions, folder, data, questions=99, flip_batch=200)
    judge = RouterModule(model, reference, options)
    samples = read_data(options, model.config, questions=99, measure=False)
    return torch.cat([judge(batch.to(model.device), phase="ratios")["ratios"].cpu() for batch in _batches(samples, 8)])


def _routings(pages: Pages, thresholds: Mapping[str, float], ratios: Tensor, seed: int) -> dict[str, Tensor]:
    """The router at these thresholds; random, edges and the oracle compress as many tiles each."""
    found: dict[str, Tensor] = {}
    for name, threshold in thresholds.items():
        own = pages.p >= threshold
        count = int(own.sum())
        found[name] = own
        found[f"random as {name}"] = random_like(own, seed)
        found[f"edges as {name}"] = _fewest_first(pages.edges, count)
        found[f"oracle as {name}"] = _fewest_first(ratios, count)
    return found


def _group(name: str) -> str:
    first = name.split()[0]
    return {"ViR": "router", "random": "random", "edges": "edges", "oracle": "oracle"}.get(first, name)


def _entry(
    found: Mapping[str, Any], name: str, right: Tensor, compress: Tensor, pages: Pages, tokens: tuple[int, int]
) -> dict[str, Any]:
    """What the results say of one routing; tokens are counted once per page, however many questions it has."""
    skills, kinds = defaultdict(list), defaultdict(list)
    for line, ok in zip(pages.lines, right.tolist(), strict=True):
        skills[line["skill"]].append(ok)
    seen = {line["image"]: line["kinds"] for line in pages.lines}
    for kind, small in zip([k for own in seen.values() for k in own], compress.tolist(), strict=True):
        kinds[kind].append(small)
    return {
        "group": _group(name),
        "tokens_kept": kept_share(compress, tokens),
        **{key: found[key] for key in ("score", "kl", "families", "first_token_prompts_per_s")},
        "skills": {skill: sum(own) / len(own) for skill, own in sorted(skills.items())},
        "compressed_by_kind": {kind: sum(own) / len(own) for kind, own in sorted(kinds.items())},
    }


def evaluate(
    folder: Path, reference_folder: Path, validation: Path, test: Path, out: Path, *, seed: int,
    about: Mapping[str, Any], throughput_seconds: float = 3.0,
) -> dict[str, Any]:  # fmt: skip
    """Writes ``results.json``, ``outcomes.safetensors`` and ``decisions.safetensors`` into ``out``.

    Args:
        folder: the trained model.
        reference_folder: the model that it was made from.
        validation: JSONL file that thresholds are chosen on.
        test: JSONL file that the figures are of.
        out: folder.
        seed: of the random routings.
        about: what else the results say of themselves.
        throughput_seconds: least time of each timing of the first token; 0: none.
    """
    model, _ = load_model(folder, torch.float32, 0, "eager")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    reference = load_reference(model, str(reference_folder), torch.float32, "eager").to(device)
    tokens = tokens_per_tile(model.config)

    def run(pages: Pages, routings: Mapping[str, Tensor], policies: Mapping[str, Any], seconds: float) -> Any:
        options = _options(
            EvalOptions,
            folder,
            test,
            micro_batch=64,
            seed=seed,
            precision="bf16",
            throughput_batches=(1, 32),
            throughput_seconds=seconds,
        )
        given = {name: pages.per_question(compress) for name, compress in routings.items()}
        evaluation = Evaluation(model, reference, pages.samples, policies, options, routings=given)
        return evaluation.run(), evaluation.outcomes

    pages = read_pages(model, folder, validation)
    thresholds = {f"ViR {budget:.0%}": threshold_for(pages.p, budget, tokens) for budget in BUDGETS}
    found, _ = run(pages, {name: pages.p >= t for name, t in thresholds.items()}, {}, 0)
    least = KEPT * found[ALL_WHOLE]["score"]
    allowed = [name for name, budget in zip(thresholds, BUDGETS, strict=True) if budget <= 0.5]
    chosen = next((name for name in allowed if found[name]["score"] >= least), allowed[-1])
    on_validation = {name: {key: found[name][key] for key in ("score", "kl")} for name in found}

    pages = read_pages(model, folder, test)
    everything = {**thresholds, "ViR p>0.5": 0.5, "ViR chosen": thresholds[chosen]}
    routings = _routings(pages, everything, loss_ratios(model, reference, folder, test), seed)
    timed = {"timed": ThresholdPolicy(thresholds[chosen])}
    found, outcomes = run(pages, routings, timed, throughput_seconds)
    found["ViR chosen"]["first_token_prompts_per_s"] = found["timed"]["first_token_prompts_per_s"]
    every = torch.ones(len(pages.p), dtype=torch.bool)
    routings |= {ALL_WHOLE: ~every, ALL_COMPRESSED: every}
    entries = {name: _entry(found[name], name, outcomes[name], routings[name], pages, tokens) for name in routings}

    before, _ = load_model(reference_folder, torch.float32, 0, "eager")
    average_connector(before)
    model = before.to(device).eval()  # the same pages, answered by the reference itself
    found, more = run(pages, {}, {}, 0)
    for name, from_name in (("reference", ALL_WHOLE), ("all-64 before", ALL_COMPRESSED)):
        outcomes[name] = more[from_name]
        routings[name] = routings[from_name]
        entries[name] = _entry(found[from_name], name, more[from_name], routings[name], pages, tokens)
    entries["reference"]["group"] = ALL_WHOLE

    results = {
        **about, "seed": seed, "pages": int(pages.page.max()) + 1, "questions": len(pages.lines), "tiles": len(pages.p),
        "chosen": {"routing": "ViR chosen", "budget": chosen, "threshold": thresholds[chosen], "rule": RULE},
        "thresholds": thresholds, "validation": on_validation, "routings": entries,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    right = {name: outcomes[name].to(torch.uint8) for name in entries}
    save_file({**right, "page": pages.page}, out / "outcomes.safetensors")
    save_file({name: compress.clone() for name, compress in routings.items()}, out / "decisions.safetensors")
    with replacing(out / "results.json") as path:  # last: whoever finds it finds all
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reproduce.evaluate", description=__doc__, allow_abbrev=False)
    for name in ("model", "reference", "validation", "test", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--command", default="")
    parser.add_argument("--throughput-seconds", type=float, default=3.0)
    args = parser.parse_args()
    about = {"commit": args.commit, "command": args.command}
    results = evaluate(
        args.model, args.reference, args.validation, args.test, args.out, seed=args.seed, about=about,
        throughput_seconds=args.throughput_seconds,
    )  # fmt: skip
    chosen, whole = (results["routings"][name] for name in ("ViR chosen", "reference"))
    print(
        f"seed {args.seed}: {chosen['score']:.2%} right with {chosen['tokens_kept']:.1%} of the tokens, the reference "
        f"{whole['score']:.2%}"
    )


if __name__ == "__main__":
    main()
