"""The reproduction from end to end: ``python -m reproduce.run --out runs/reproduce``.

Reference (stage 0), then for each seed stage 1, stage 2 and the evaluation, then report and plots. What is finished is
not done again: an interrupted run goes on with the same command.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from reproduce import SHIPPED_REFERENCE, stages
from reproduce.bank import Bank
from reproduce.export import write_pages
from reproduce.pages import Pages

__all__ = ["main"]


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Attributes:
        tiles: rendered of training's split.
        stage0: options of stage 0.
        stage1: steps.
        stage2: steps.
        share: of the pages.
        seconds: of each timing of the first token.
    """

    tiles: int
    stage0: tuple[str, ...]
    stage1: int
    stage2: int
    share: float
    seconds: float


FULL = Effort(24_960, (), 900, 250, 1.0, 3.0)
SMOKE = Effort(624, ("--tiles", "624", "--sheets", "64", "--vit-steps", "2", "--steps", "2"), 2, 2, 1 / 64, 0.1)
# Pages as files, by what they are for: the split, how many, the share of tiles drawn from those with something to read,
# and whether a page's questions are one conversation. The router's labels are a percentile over its pages, so those are
# as they come.
PAGES: dict[str, tuple[str, int, float, bool]] = {
    "stage1": ("train", 4000, 0.4, True),
    "stage2": ("train", 2000, 0.0, True),
    "validation": ("validation", 256, 0.0, False),
    "test": ("test", 384, 0.0, False),
}


def say(start: float, text: str) -> None:
    """A line with the minutes since the start."""
    print(f"[{(time.perf_counter() - start) / 60:5.1f} min] {text}", flush=True)


def write_data(out: Path, effort: Effort) -> dict[str, Path]:
    """The pages as files, where they are not there yet."""
    tiles = {"train": effort.tiles, "validation": 2496, "test": 4992}
    found = {}
    for number, (name, (split, pages, readable, together)) in enumerate(PAGES.items()):
        found[name] = out / name / "data.jsonl"
        if not found[name].exists():
            drawn = Pages(Bank.cached(split, tiles[split], 0, out / "banks"), 100 + number, readable)
            count = math.ceil(pages * effort.share)
            write_pages(out / name, drawn, count, questions=10 if together else 8, together=together)
    return found


@dataclass(frozen=True)
class Plan:
    """What the seeds share."""

    out: Path
    reference: Path
    data: dict[str, Path]
    effort: Effort
    about: dict[str, str]
    threads: int

    def run(self, seed: int) -> None:
        """Stage 1, stage 2 and the evaluation of one seed."""
        out, data, effort = self.out / f"seed-{seed}", self.data, self.effort
        log = out / "log.txt"
        common = {"seed": seed, "workers": 1, "save_every": 100, "keep_checkpoints": 1}
        options = {**common, **stages.STAGE1, "model": self.reference, "data": data["stage1"], "steps": effort.stage1}
        first = stages.train("consistency", out / "stage1", options, log=log, threads=self.threads)
        options = {**common, **stages.STAGE2, "model": first, "data": data["stage2"], "steps": effort.stage2}
        options["reference"] = self.reference
        second = stages.train("router", out / "stage2", options, log=log, threads=self.threads)
        if not (out / "results.json").exists():
            command = ["reproduce.evaluate", second, self.reference, data["validation"], data["test"], out]
            command += ["--seed", seed, "--commit", self.about["commit"], "--command", self.about["command"]]
            stages.call([*command, "--throughput-seconds", effort.seconds], log, self.threads)

    def where(self, seed: int) -> str:
        """What a seed is at."""
        out = self.out / f"seed-{seed}"
        if (out / "results.json").exists():
            return "done"
        for name, steps, then in (
            ("stage2", self.effort.stage2, "evaluation"),
            ("stage1", self.effort.stage1, "stage 2"),
        ):
            path = out / name / "metrics.jsonl"
            if path.exists():
                done = len(path.read_text(encoding="utf-8").splitlines())
                return f"stage {name[-1]}, {done} of {steps} steps" if done < steps else then
        return "stage 1" if out.exists() else "waits"


def run_seeds(plan: Plan, seeds: list[int], abreast: int, start: float) -> None:
    """All seeds, so many side by side; a line every minute."""
    with ThreadPoolExecutor(abreast) as pool:
        jobs = [pool.submit(plan.run, seed) for seed in seeds]
        while wait(jobs, timeout=60, return_when=FIRST_EXCEPTION).not_done:
            say(start, "; ".join(f"seed {seed}: {plan.where(seed)}" for seed in seeds))
            if any(job.done() and job.exception() for job in jobs):
                pool.shutdown(cancel_futures=True)
                break
        for job in jobs:
            if not job.cancelled():
                job.result()


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
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--reference", type=Path, help="start from this reference; by default one is trained")
    given.add_argument("--fast", action="store_true", help="start from the reference that ships, one seed")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 0 1 2; with --fast 0")
    given.add_argument("--size", choices=("laptop", "gpu"), default="laptop", help="of the reference that is trained")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="to use; seeds run side by side")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    args = parser.parse_args()
    if args.cores < 1:
        parser.error(f"--cores must be at least 1, got {args.cores}")
    if args.reference and not (args.reference / "config.json").is_file():
        parser.error(f"--reference must be a checkpoint folder, {args.reference} has no config.json")
    effort = SMOKE if args.smoke else FULL
    start, out = time.perf_counter(), args.out
    seeds = args.seeds or ([0] if args.fast else [0, 1, 2])
    about = {"commit": commit(), "command": "python -m reproduce.run " + " ".join(sys.argv[1:])}
    reference = SHIPPED_REFERENCE if args.fast else args.reference
    if reference is None:
        reference = out / "reference" / "model"
        if not reference.exists():
            say(start, "stage 0: training the reference")
            options = ["--out", out / "reference", "--banks", out / "banks", "--size", args.size]
            command = [sys.executable, "-m", "reproduce.stage0", *options, "--threads", args.cores, *effort.stage0]
            subprocess.run([str(part) for part in command], check=True, env=stages.environment(args.cores))
    say(start, "writing pages")
    data = write_data(out, effort)
    say(start, f"stages 1 and 2 and the evaluation of seeds {', '.join(map(str, seeds))}; details in their log.txt")
    abreast = min(args.cores, len(seeds))
    run_seeds(Plan(out, reference, data, effort, about, args.cores // abreast), seeds, abreast, start)
    from reproduce.report import write_report

    say(start, f"report: {write_report(out)}")


if __name__ == "__main__":
    main()
