"""Stages 1 and 2 of a seed: ``vico train`` as any user would call it, on pages written as files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["STAGE1", "STAGE2", "TILES", "train"]

TILES = {"max_tiles": 4, "thumbnail": False}  # a page is cut into its four tiles, and is no fifth
FASTER = {"precision": "bf16", "attention": "eager", "tensorboard": False}  # sequences are short
STAGE1: dict[str, Any] = {
    "steps": 900, "batch": 24, "micro_batch": 24, "grouping": "none", "learning_rate": 2e-3, "language_lr_scale": 0.5,
    "warmup_steps": 40, "dropout": 0.0, "train": "llm", "average_over": "token", **FASTER,
}  # fmt: skip
STAGE2: dict[str, Any] = {
    "steps": 250, "batch": 16, "micro_batch": 16, "grouping": "none", "learning_rate": 1e-3, "warmup_steps": 20,
    "dropout": 0.0, "percentile": 70, "window": 1024, "questions": 1, "flip_batch": 80, **FASTER,
}  # fmt: skip


def train(stage: str, out: Path, options: Mapping[str, Any], *, threads: int) -> Path:
    """Runs ``vico train STAGE`` into a folder, or what is left of it; gives back the result's folder.

    Args:
        stage: consistency or router.
        out: of the run.
        options: by name.
        threads: of torch.

    Raises:
        subprocess.CalledProcessError: it failed; what it said is on the screen.
    """
    flags = []
    for name, value in {**TILES, **options, "out": out}.items():
        flags += [f"--{name.replace('_', '-')}", str(value).lower() if isinstance(value, bool) else str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "vico_ext", "train", stage, *flags], check=True, env=environment)
    return out / "model"
