"""Stages 1 and 2 of a seed: ``vico train`` as any user would call it, on pages written as files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["STAGE1", "STAGE2", "TILES", "call", "environment", "flags", "train"]

TILES = {"max_tiles": 4, "thumbnail": False}  # a page is cut into its four tiles, and is no fifth
FASTER = {"precision": "bf16", "attention": "eager", "tensorboard": False}  # sequences are short
STAGE1: dict[str, Any] = {
    "batch": 24, "micro_batch": 24, "grouping": "none", "learning_rate": 2e-3, "language_lr_scale": 0.5,
    "warmup_steps": 40, "dropout": 0.0, "train": "llm", "average_over": "token", **FASTER,
}  # fmt: skip
STAGE2: dict[str, Any] = {
    "batch": 16, "micro_batch": 16, "grouping": "none", "learning_rate": 1e-3, "warmup_steps": 20,
    "dropout": 0.0, "percentile": 70, "window": 1024, "questions": 1, "flip_batch": 80, **FASTER,
}  # fmt: skip


def environment(threads: int) -> dict[str, str]:
    """Of a process that trains on so many threads."""
    # glibc gives memory of this size back with every tensor, and the kernel zeroes it for the next: a third of a step.
    keep = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
    return {**os.environ, **keep, "OMP_NUM_THREADS": str(threads)}


def call(command: Sequence[Any], log: Path, threads: int) -> None:
    """Runs ``python -m`` with these arguments; what it says goes to the end of a file.

    Raises:
        RuntimeError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        words = [sys.executable, "-m", *map(str, command)]
        done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=environment(threads), check=False)
    if done.returncode:
        raise RuntimeError(f"python -m {command[0]} ended with {done.returncode}: what it said is in {log}")


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options by name as the command line takes them."""
    found = []
    for name, value in options.items():
        found += [f"--{name.replace('_', '-')}", str(value).lower() if isinstance(value, bool) else str(value)]
    return found


def train(stage: str, out: Path, options: Mapping[str, Any], *, log: Path, threads: int) -> Path:
    """Runs ``vico train STAGE`` into a folder, or what is left of it; gives back the result's folder.

    Args:
        stage: consistency or router.
        out: of the run.
        options: by name.
        log: what it says goes there.
        threads: of torch.

    Raises:
        RuntimeError: it failed.
    """
    call(["vico_ext", "train", stage, *flags({**TILES, **options, "out": out})], log, threads)
    return out / "model"
