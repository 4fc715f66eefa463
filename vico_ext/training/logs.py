"""What a run says while it goes on: progress bar, metrics.jsonl, problems.jsonl, TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vico_ext._files import replacing
from vico_ext.training.records import Problem

__all__ = ["RunLog", "drop_after"]

_SHOWN = 20  # problems on the screen; all of them are in problems.jsonl


def drop_after(path: Path, step: int) -> None:
    """Takes out of a JSONL log what belongs to later steps, or was half written when the run was killed."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run
        if entry["step"] <= step:
            kept.append(line + "\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


class RunLog:
    """The logs of one process; all but the problems are the main one's.

    Args:
        out: the run's folder.
        rank: of the process.
        name: of the stage.
        start: steps done before.
        steps: of the whole run.
        tensorboard: whether to write TensorBoard logs, and every how many steps.
    """

    def __init__(self, out: Path, rank: int, name: str, start: int, steps: int, tensorboard: int) -> None:
        from tqdm import tqdm

        self.main = rank == 0
        out.mkdir(parents=True, exist_ok=True)
        paths = [out / f"problems-{rank}.jsonl", out / "metrics.jsonl"]
        for path in paths[: 1 + self.main]:
            drop_after(path, start)
        self._problems = open(paths[0], "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._metrics = open(paths[1], "a", encoding="utf-8") if self.main else None  # noqa: SIM115
        self._bar = tqdm(total=steps, initial=start, desc=name, unit="step", disable=None if self.main else True)
        self._board: Any = None
        self._every = tensorboard
        if self.main and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        self._shown = 0
        self._since = time.perf_counter()

    def problems(self, step: int, problems: Sequence[Problem]) -> None:
        """Notes problems of a step (from 1 on; 0: before the first), and shows the first of them."""
        from tqdm import tqdm

        for problem in problems:
            entry = {"step": step, "kind": problem.kind, "line": problem.line, "message": problem.message}
            self._problems.write(json.dumps(entry) + "\n")
            if self._shown < _SHOWN:
                tqdm.write(f"vico train: bad {problem.kind}, {problem}", file=sys.stderr)
            elif self._shown == _SHOWN:
                tqdm.write(f"vico train: more problems go to {self._problems.name} only", file=sys.stderr)
            self._shown += 1
        self._problems.flush()

    def step(self, step: int, figures: Mapping[str, Any], samples: int, tokens: int) -> None:
        """Notes a step's figures, with the throughput since the one before."""
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        speed = {"samples_per_s": samples / seconds, "tokens_per_s": tokens / seconds}
        if self._metrics is not None:
            self._metrics.write(json.dumps({"step": step, **figures, "seconds": seconds, **speed}) + "\n")
            self._metrics.flush()
        if self._board is not None and step % self._every == 0:
            for name, value in {**figures, **speed}.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)
        loss = "none" if figures["loss"] is None else f"{figures['loss']:.4g}"
        shown = {"loss": loss, "samples/s": f"{samples / seconds:.3g}"}
        if any(figures["skipped"].values()):
            shown["skipped"] = str(sum(figures["skipped"].values()))
        self._bar.set_postfix(shown)
        self._bar.update(1)

    def close(self) -> None:
        """Closes files and bar."""
        self._bar.close()
        for file in (self._problems, self._metrics, self._board):
            if file is not None:
                file.close()
