"""``vico demo``: a trained model on pages, then real images against the released semantics, with a random model."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from vico_ext.cli.visual_side import Routed, VisualSide

SUMMARY = "see it work: a small trained Flash reads pages; photographs, released semantics against vico_ext"
DESCRIPTION = """\
First a small trained InternVL Flash, which comes with vico_ext, answers questions about pages, with all tiles whole and
with its router: visual tokens and right answers of both. Then a checkpoint with random weights and tiles of real size:
photographs and pages are cut into tiles, and what comes after the ViT runs as the released code does it, and with
vico_ext: tokens, times, the largest difference. Pictures show what each tile got. Takes under a minute on two cores and
downloads nothing.
"""
EPILOG = """\
examples:
  vico demo                    writes to ./vico-demo
  vico demo --out out/demo

afterwards:
  vico route YOUR.png --model vico-demo/checkpoint --policy budget:50%
"""

RELATIVE, ABSOLUTE = 0.5, 0.0
_REPEATS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("vico-demo"), metavar="DIR", help="output folder (vico-demo)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (0)")


def run(args: argparse.Namespace) -> int:
    from vico_ext.cli.route import require

    require("PIL", "transformers", "tqdm")
    from transformers.utils import logging

    from vico_ext import PerImagePolicy
    from vico_ext.cli.demo_inputs import write_inputs
    from vico_ext.cli.demo_model import write_checkpoint
    from vico_ext.cli.demo_trained import run_trained, show_trained
    from vico_ext.cli.report import totals, write_json
    from vico_ext.cli.route import UNTRAINED_NOTE, entries, read_job, save_picture
    from vico_ext.cli.versions import versions
    from vico_ext.cli.visual_side import VisualSide

    logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    trained = run_trained(args.out)
    show_trained(trained)
    files = write_inputs(args.out / "inputs")
    checkpoint = write_checkpoint(args.out / "checkpoint", args.seed)
    model = VisualSide.load(checkpoint)
    _introduce(model, files)

    policy = PerImagePolicy(RELATIVE, ABSOLUTE)
    warm = read_job(files[0], model.tile_size, 2)
    _compare(model, warm.tiled, policy)
    images: list[dict[str, Any]] = []
    for path in files:
        job = read_job(path, model.tile_size, 12)
        routed = _compare(model, job.tiled, policy)
        (entry,) = entries([job], routed.ours)
        picture = f"{path.stem}.route.png"
        save_picture(args.out / picture, job, entry, f"per-image:{RELATIVE},{ABSOLUTE}", UNTRAINED_NOTE)
        images.append({**entry, "picture": picture, **routed.measured})

    report = {
        "command": "vico demo",
        "versions": versions(),
        "trained": trained,
        "untrained": True,
        "model": model.describe(),
        "policy": f"per-image:{RELATIVE},{ABSOLUTE}",
        "images": images,
        "totals": {**totals(images), **_sums(images)},
    }
    write_json(args.out / "report.json", report)
    _print(report, args.out)
    return 0


class _Comparison:
    def __init__(self, ours: Any, measured: dict[str, float]) -> None:
        self.ours, self.measured = ours, measured


def released_visual_side(model: VisualSide, vit_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the released code does after the ViT, for one image: p [P], compress [P], visual tokens [T, H].

    Keys and values are projected in each of the router's four rounds, both connectors run on every tile, and a loop
    over tiles picks.
    """
    from vico_ext import reference

    weights = {**model.weights.connector, **model.weights.router}
    pooled = reference.router_pool(vit_tokens, weights)
    p = reference.router_gate(pooled, weights)[:, 0]
    compress = reference.released_route(p, RELATIVE, ABSOLUTE)
    return p, compress, reference.connector(vit_tokens, weights, compress)


def _compare(model: VisualSide, tiled: Any, policy: Any) -> _Comparison:
    """Both ways on one image: results compared, times the median of interleaved runs."""
    import time

    import torch

    def timed(work: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        result = work()
        return (time.perf_counter() - start) * 1e3, result

    def ours() -> Routed:
        return model.route(vit_tokens, policy, [tiled.tiles])

    vit_ms, vit_tokens = timed(lambda: model.vit_tokens(tiled.pixel_values, 8))
    with torch.no_grad():
        runs = [(timed(lambda: released_visual_side(model, vit_tokens)), timed(ours)) for _ in range(_REPEATS)]
    (_, (p, compress, tokens)), (_, result) = runs[-1]
    if not torch.equal(compress, result.plan.compress):
        raise RuntimeError("the released rule and PerImagePolicy chose different tiles: please report this")
    measured = {
        "ms_vit": round(vit_ms, 3),
        "ms_released": round(statistics.median(released for (released, _), _ in runs), 3),
        "ms_ours": round(statistics.median(mine for _, (mine, _) in runs), 3),
        "max_difference_tokens": float((tokens - result.tokens).abs().max()),
        "max_difference_p": float((p - result.p).abs().max()),
        "largest_token_value": float(tokens.abs().max()),
    }
    return _Comparison(result, measured)


def _sums(images: list[dict[str, Any]]) -> dict[str, float]:
    sums = {name: round(sum(image[name] for image in images), 3) for name in ("ms_vit", "ms_released", "ms_ours")}
    largest = ("max_difference_tokens", "max_difference_p", "largest_token_value")
    return {
        **sums,
        "speed_up": round(sums["ms_released"] / sums["ms_ours"], 2),
        **{name: max(image[name] for image in images) for name in largest},
    }


def _introduce(model: VisualSide, files: list[Path]) -> None:
    facts = model.describe()
    print(
        f"Speed: {len(files)} images through an InternVL of transformers' own classes: ViT {facts['vit_layers']} "
        f"layers, V = {facts['vit_hidden']}, H = {facts['llm_hidden']},\n{facts['tile_size']} px tiles, "
        f"{facts['dtype']}.\n"
        "The weights are random: nobody has trained them, so p and the choice of tiles mean nothing here. The images,\n"
        "the tiling, the checkpoint format, the token counts, the times and the agreement are real.\n"
    )


def _print(report: dict[str, Any], out: Path) -> None:
    from vico_ext.cli.report import table

    header = ("image", "size", "grid", "tiles", "compressed", "tokens", "ms released", "ms vico_ext", "speed-up")
    rows = [
        (
            Path(image["file"]).name,
            f"{image['width']}x{image['height']}",
            f"{image['grid']['columns']}x{image['grid']['rows']}{'+1' if image['thumbnail'] else ''}",
            str(len(image["tiles"])),
            str(image["tiles_compressed"]),
            f"{image['tokens_before']} -> {image['tokens_after']}",
            f"{image['ms_released']:.1f}",
            f"{image['ms_ours']:.1f}",
            f"{image['ms_released'] / image['ms_ours']:.1f}x",
        )
        for image in report["images"]
    ]
    sums = report["totals"]
    total = (
        "total",
        "",
        "",
        str(sums["tiles"]),
        str(sums["tiles_compressed"]),
        f"{sums['tokens_before']} -> {sums['tokens_after']}",
        f"{sums['ms_released']:.1f}",
        f"{sums['ms_ours']:.1f}",
        f"{sums['speed_up']:.1f}x",
    )
    print(table(header, rows, total))
    print(
        f"\nms: router, routing and connectors, after a ViT that takes {sums['ms_vit']:.0f} ms either way; median of "
        f"{_REPEATS} runs.\nBoth chose the same tiles. Largest difference: {sums['max_difference_tokens']:.1e} in the "
        f"visual tokens (values up to {sums['largest_token_value']:.1f}), {sums['max_difference_p']:.1e} in p.\n\n"
        f"Pictures (*.route.png) and report.json are in {out}\n"
        f"The checkpoint is in {out / 'checkpoint'}; try it on an image of yours:\n"
        f"  vico route IMAGE --model {out / 'checkpoint'} --policy budget:50%"
    )
