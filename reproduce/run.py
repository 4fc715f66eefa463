"""The reproduction from end to end: ``python -m reproduce.run --out runs/reproduce``.

Reference (stage 0), then for each seed stage 1, stage 2 and the evaluation, then report and plots. What is finished is
not done again: an interrupted run goes on with the same command.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reproduce import SHIPPED_REFERENCE, stages
from reproduce.bank import Bank
from reproduce.export import write_pages
from reproduce.pages import Pages

__all__ = ["main"]

# Pages as files, by what they are for: the split, tiles rendered, pages, the share of tiles drawn from those with
# something to read, and whether a page's questions are one conversation. The router's labels are a percentile over its
# pages, so those are as they come.
PAGES: dict[str, tuple[str, int, int, float, bool]] = {
    "stage1": ("train", 25_920, 4000, 0.4, True),
    "stage2": ("train", 25_920, 2000, 0.0, True),
    "validation": ("validation", 2592, 256, 0.0, False),
    "test": ("test", 5184, 384, 0.0, False),
}


def say(start: float, text: str) -> None:
    """A line with the minutes since the start."""
    print(f"[{(time.perf_counter() - start) / 60:5.1f} min] {text}", flush=True)


def write_data(out: Path) -> dict[str, Path]:
    """The pages as files, where they are not there yet."""
    found = {}
    for number, (name, (split, tiles, pages, readable, together)) in enumerate(PAGES.items()):
        found[name] = out / name / "data.jsonl"
        if not found[name].exists():
            drawn = Pages(Bank.cached(split, tiles, 0, out / "banks"), 100 + number, readable)
            write_pages(out / name, drawn, pages, questions=10 if together else 8, together=together)
    return found


def run_seed(seed: int, reference: Path, data: dict[str, Path], out: Path, about: dict[str, Any], threads: int) -> None:
    """Stage 1, stage 2 and the evaluation of one seed."""
    common = {"seed": seed, "workers": 1, "save_every": 100, "keep_checkpoints": 1}
    first = stages.train(
        "consistency",
        out / "stage1",
        {"model": reference, "data": data["stage1"], **common, **stages.STAGE1},
        threads=threads,
    )
    options = {"model": first, "reference": reference, "data": data["stage2"], **common, **stages.STAGE2}
    second = stages.train("router", out / "stage2", options, threads=threads)
    if not (out / "results.json").exists():
        command = [sys.executable, "-m", "reproduce.evaluate", second, reference, data["validation"], data["test"], out]
        more = ["--seed", seed, "--commit", about["commit"], "--command", about["command"]]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run([str(part) for part in (*command, *more)], check=True, env=environment)


def commit() -> str:
    """Of the sources, "-dirty" behind it where they differ."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reproduce.run", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything written")
    parser.add_argument("--reference", type=Path, help="start from this reference; by default one is trained")
    parser.add_argument("--fast", action="store_true", help="start from the reference that ships, one seed")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 0 1 2; with --fast 0")
    parser.add_argument("--size", choices=("laptop", "gpu"), default="laptop", help="of the model that is trained")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="to use; seeds run side by side")
    args = parser.parse_args()
    start, out = time.perf_counter(), args.out
    seeds = args.seeds or ([0] if args.fast else [0, 1, 2])
    about = {"commit": commit(), "command": "python -m reproduce.run " + " ".join(sys.argv[1:])}
    reference = SHIPPED_REFERENCE if args.fast else args.reference
    if reference is None:
        reference = out / "reference" / "model"
        if not reference.exists():
            say(start, "stage 0: training the reference")
            options = [
                "--out",
                out / "reference",
                "--banks",
                out / "banks",
                "--size",
                args.size,
                "--threads",
                args.cores,
            ]
            subprocess.run([sys.executable, "-m", "reproduce.stage0", *map(str, options)], check=True)
    say(start, "writing pages")
    data = write_data(out)
    abreast = min(args.cores, len(seeds))
    say(start, f"stages 1 and 2 and the evaluation of seeds {', '.join(map(str, seeds))}, {abreast} side by side")
    with ThreadPoolExecutor(abreast) as pool:
        threads = max(1, args.cores // abreast)
        jobs = [pool.submit(run_seed, seed, reference, data, out / f"seed-{seed}", about, threads) for seed in seeds]
        for job in jobs:
            job.result()
    from reproduce.report import write_report

    say(start, f"report: {write_report(out)}")


if __name__ == "__main__":
    main()
