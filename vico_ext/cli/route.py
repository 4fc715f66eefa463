"""``vico route``: which tiles of real images are compressed, as pictures and a JSON report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vico_ext.cli.errors import CliError
from vico_ext.cli.policies import FORMS, parse_policy

if TYPE_CHECKING:
    from PIL import Image

    from vico_ext.cli.visual_side import Routed, VisualSide
    from vico_ext.tiling import TiledImage

SUMMARY = "which tiles of your images are compressed: pictures and a JSON report"
DESCRIPTION = """\
Cuts each image into tiles as InternVL does, runs the checkpoint's vision tower, router and connectors, and shows what
each tile got: 256 visual tokens, or 64 where the router says that is enough. The language model is not loaded.

Writes to the output folder, for each image, NAME.route.png (every tile tinted by its rate and probability) and, for all
of them, report.json (sizes, grids, p of each tile, tokens before and after, times).
"""
EPILOG = f"""\
{FORMS}
  A call is one image, unless --one-call makes all images one.

examples:
  vico route page.png --model InternVL3_5-8B-Flash
  vico route scans/ 'photos/*.jpg' --model DIR --out routed --policy budget:50%
  vico route a.png b.png --model DIR --policy released:0.3,0.0 --one-call

DIR holds config.json and safetensors weights of an InternVL Flash model, released or Hugging Face format. `vico demo`
makes a small one with random weights in OUT/checkpoint.

exit status: 0 done; 1 done, but some images could not be read; 2 not done, one line says why.
"""


_MOST_TILES = 1000  # all grids of up to so many tiles are looked at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file, folder of images, or quoted pattern")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument(
        "--policy", type=parse_policy, default="threshold:0.5", help="who is compressed, see below (threshold:0.5)"
    )
    parser.add_argument("--out", type=Path, default=Path("routed"), metavar="DIR", help="output folder (routed)")
    parser.add_argument(
        "--max-tiles", type=_max_tiles, default=12, metavar="N", help="most tiles of an image's grid (12)"
    )
    parser.add_argument("--batch-tiles", type=_positive, default=8, metavar="N", help="tiles per run of the ViT (8)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64", "checkpoint"),
        default="float32",
        help="compute in this type; `checkpoint` keeps the type on disk (float32)",
    )
    parser.add_argument(
        "--one-call",
        action="store_true",
        help="route all images together: budgets and the released quantile then span them all (holds all in memory)",
    )


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got '{text}'")
    return value


def _max_tiles(text: str) -> int:
    value = _positive(text)
    if value > _MOST_TILES:
        raise argparse.ArgumentTypeError(f"expected at most {_MOST_TILES} tiles, got '{text}'")
    return value


def run(args: argparse.Namespace) -> int:
    require("PIL", "transformers", "tqdm")
    import torch
    from transformers.utils import logging

    from vico_ext.cli.inputs import expand_images, picture_names
    from vico_ext.cli.report import totals, write_json
    from vico_ext.cli.versions import versions
    from vico_ext.cli.visual_side import VisualSide

    logging.set_verbosity_error()
    if args.out.exists() and not args.out.is_dir():
        raise CliError(f"--out must be a folder, {args.out} is a file")
    files = expand_images(args.images)
    model = VisualSide.load(args.model, None if args.dtype == "checkpoint" else getattr(torch, args.dtype))
    config = model.config()
    policy = args.policy.build(config)
    args.out.mkdir(parents=True, exist_ok=True)
    note = UNTRAINED_NOTE if config.get(UNTRAINED) else ""

    failed: list[dict[str, str]] = []
    images: list[dict[str, Any]] = []
    names = dict(zip(files, picture_names(files), strict=True))
    for call in _calls(_read(files, model.tile_size, args.max_tiles, failed), args.one_call):
        routed = _routed(model, call, policy, args.batch_tiles)
        for job, entry in zip(call, entries(call, routed), strict=True):
            with job.timed("picture"):
                save_picture(args.out / names[job.path], job, entry, args.policy.text, note)
            images.append({**entry, "picture": names[job.path], "ms": {k: round(v, 3) for k, v in job.times.items()}})

    report = {
        "command": "vico route",
        "versions": versions(),
        "model": {**model.describe(), "untrained": bool(note)},
        "policy": args.policy.text,
        "policy_spans": "all images" if args.one_call else "one image",
        "max_tiles": args.max_tiles,
        "images": images,
        "failed": failed,
        "totals": totals(images),
    }
    write_json(args.out / "report.json", report)
    _print(images, failed, report["totals"], args.out, note)
    return 0 if not failed else 1 if images else 2


UNTRAINED = "vico_ext_untrained"
UNTRAINED_NOTE = "The weights are random: p means nothing here."


class Job:
    """One image on its way through the command."""

    def __init__(self, path: Path, image: Image.Image, tiled: TiledImage, times: dict[str, float]) -> None:
        self.path, self.image, self.tiled, self.times = path, image, tiled, times

    def timed(self, name: str) -> Any:
        """Context manager that adds to this image's times."""
        from vico_ext.cli.visual_side import stage

        return stage(self.times, name)


def require(*modules: str) -> None:
    """Says what to install where an optional dependency of the command line is missing."""
    from importlib.util import find_spec

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise CliError(f"this command needs {', '.join(missing)}: pip install 'vico_ext[cli]'")


def read_job(path: Path, tile_size: int, max_tiles: int, *, thumbnail: bool = True) -> Job:
    """Opens and cuts one image."""
    from vico_ext.cli.visual_side import stage
    from vico_ext.tiling import open_image, tile_image

    times: dict[str, float] = {}
    with stage(times, "read"):
        image = open_image(path)
    with stage(times, "tile"):
        tiled = tile_image(image, tile_size=tile_size, max_tiles=max_tiles, thumbnail=thumbnail)
    return Job(path, image, tiled, times)


def _read(files: Sequence[Path], tile_size: int, max_tiles: int, failed: list[dict[str, str]]) -> Iterator[Job]:
    """Images one by one; those that cannot be read are reported, noted and passed over."""
    from tqdm import tqdm

    from vico_ext.tiling import UnreadableImageError

    progress = tqdm(files, unit="image", disable=None if len(files) > 1 else True)
    for path in progress:
        progress.set_postfix_str(path.name)
        try:
            yield read_job(path, tile_size, max_tiles)
        except UnreadableImageError as error:
            reason = " ".join(str(error).split())
            failed.append({"file": str(path), "error": reason})
            tqdm.write(f"vico route: {reason}", file=sys.stderr)


def _calls(jobs: Iterator[Job], one_call: bool) -> Iterator[list[Job]]:
    if not one_call:
        yield from ([job] for job in jobs)
        return
    together = list(jobs)
    if together:
        yield together


def _routed(model: VisualSide, call: list[Job], policy: Any, batch_tiles: int) -> Routed:
    try:
        routed = model.run([job.tiled for job in call], policy, batch_tiles)
    except ValueError as error:
        name = str(call[0].path) if len(call) == 1 else f"{len(call)} images"
        raise CliError(f"{name}: {error}") from error
    total = sum(job.tiled.tiles for job in call)
    for job in call:  # a call's time is shared out by tiles
        job.times.update({name: ms * job.tiled.tiles / total for name, ms in routed.times.items()})
    return routed


def entries(call: Sequence[Job], routed: Routed) -> Iterator[dict[str, Any]]:
    """The report's entry of each image of a call."""
    from vico_ext.cli.report import describe_image

    sizes = [job.tiled.tiles for job in call]
    parts = zip(call, routed.p.split(sizes), routed.plan.compress.split(sizes), strict=True)
    for job, p, compress in parts:
        yield describe_image(str(job.path), job.tiled, p.tolist(), compress.tolist(), routed.plan.tokens)


def save_picture(path: Path, job: Job, entry: dict[str, Any], policy: str, note: str) -> None:
    """Draws and writes one image's picture."""
    from vico_ext._files import replacing
    from vico_ext.visualize import route_picture

    tokens = [tile["tokens"] for tile in entry["tiles"]]
    whole = entry["tokens_before"] // len(tokens)
    picture = route_picture(
        job.image,
        job.tiled.grid,
        [tile["p"] for tile in entry["tiles"]],
        [tile["compressed"] for tile in entry["tiles"]],
        thumbnail=job.tiled.thumbnail,
        tokens=(whole, whole // 4),
        title=job.path.name,
        policy=policy,
        note=note,
    )
    with replacing(path) as temporary:
        picture.save(temporary, "PNG")


def _print(
    images: list[dict[str, Any]], failed: list[dict[str, str]], sums: dict[str, Any], out: Path, note: str
) -> None:
    from vico_ext.cli.report import table

    header = ("image", "size", "grid", "tiles", "compressed", "tokens", "ms")
    rows = [
        (
            Path(image["file"]).name,
            f"{image['width']}x{image['height']}",
            f"{image['grid']['columns']}x{image['grid']['rows']}{'+1' if image['thumbnail'] else ''}",
            str(len(image["tiles"])),
            str(image["tiles_compressed"]),
            f"{image['tokens_before']} -> {image['tokens_after']}",
            f"{sum(image['ms'].values()):.0f}",
        )
        for image in images
    ]
    if rows:
        ms = sum(sum(image["ms"].values()) for image in images)
        tokens = f"{sums['tokens_before']} -> {sums['tokens_after']}"
        total = ("total", "", "", str(sums["tiles"]), str(sums["tiles_compressed"]), tokens, f"{ms:.0f}")
        print(table(header, rows, total))
    if note:
        print(note)
    if failed:
        print(f"{len(failed)} of {len(failed) + len(images)} images could not be read, see report.json.")
    print(f"{'Pictures and report.json are' if images else 'report.json is'} in {out}")
