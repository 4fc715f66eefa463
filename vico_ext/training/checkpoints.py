"""Checkpoints of a run: complete or not there, safetensors and JSON, nothing pickled.

``OUT/checkpoints/step-00000200/`` holds ``weights.safetensors`` (what trains, under the model's names),
``optimizer.safetensors`` (``<parameter>/<slot>``), ``stage.safetensors`` (the router's window) and ``state.json``
(step, counts, and what a run that goes on must agree in). Order, rates and dropout follow from seed and step, the
schedule from the step: they have no state that could be lost.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["Checkpoints", "TrainingState", "full_tensor"]

_NAME = re.compile(r"step-(\d{8})$")
_FILES = ("weights.safetensors", "optimizer.safetensors", "stage.safetensors", "state.json")


@dataclass(frozen=True)
class TrainingState:
    """Everything of a run between two steps.

    Attributes:
        step: steps done.
        weights: of the parameters that train.
        optimizer: ``<parameter>/<slot>`` to tensor.
        stage: tensors of the stage.
        counts: sums since the run began.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    stage: dict[str, Tensor]
    counts: dict[str, int]

    @classmethod
    def collect(
        cls, step: int, trained: Mapping[str, nn.Parameter], optimizer: Any, stage: dict[str, Tensor],
        counts: dict[str, int],
    ) -> TrainingState:  # fmt: skip
        """Copies on the CPU. All processes call this: sharded tensors are gathered."""
        weights = {name: full_tensor(parameter) for name, parameter in trained.items()}
        slots = {
            f"{name}/{slot}": full_tensor(value)
            for name, parameter in trained.items()
            for slot, value in optimizer.state.get(parameter, {}).items()
        }
        return cls(step, weights, slots, {k: full_tensor(v) for k, v in stage.items()}, dict(counts))

    def restore(self, trained: Mapping[str, nn.Parameter], optimizer: Any) -> None:
        """Writes weights and optimizer back in place.

        Raises:
            ValueError: the parameters are not those that were saved.
        """
        if trained.keys() != self.weights.keys():
            differing = sorted(trained.keys() ^ self.weights.keys())
            raise ValueError(f"the checkpoint holds other parameters than those that train: {', '.join(differing[:4])}")
        optimizer.state.clear()
        for name, parameter in trained.items():
            with torch.no_grad():
                parameter.copy_(_like(self.weights[name], parameter))
            prefix = f"{name}/"
            slots = {k.removeprefix(prefix): v for k, v in self.optimizer.items() if k.startswith(prefix)}
            if slots:
                optimizer.state[parameter] = {
                    slot: value if slot == "step" else _like(value, parameter) for slot, value in slots.items()
                }


class Checkpoints:
    """The checkpoints of a run's folder.

    Args:
        folder: that holds them.
        keep: how many of the last ones stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Complete checkpoints by step."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.match(path.name))

    def save(self, state: TrainingState, settings: Mapping[str, Any]) -> Path:
        """Writes a checkpoint; it appears complete, by one rename, or not at all. Older ones go afterwards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{state.step:08d}"
        unfinished = self.folder / f".{path.name}.tmp"
        for leftover in (unfinished, path):
            if leftover.exists():
                shutil.rmtree(leftover)
        unfinished.mkdir()
        for name, tensors in zip(_FILES, (state.weights, state.optimizer, state.stage), strict=False):
            save_file(tensors, unfinished / name)
        content = {"step": state.step, "counts": state.counts, "settings": dict(settings)}
        (unfinished / _FILES[-1]).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name in _FILES:
            _sync(unfinished / name)
        _sync(unfinished)
        os.rename(unfinished, path)
        _sync(self.folder)
        for old in self.paths()[: -self.keep]:
            hidden = old.with_name(f".{old.name}.old")
            os.rename(old, hidden)  # half of a folder must not look like a checkpoint
            shutil.rmtree(hidden)
        return path

    def clean(self) -> None:
        """Removes what an interrupted save left."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith(".step-"):
                    shutil.rmtree(path)

    def load(self, settings: Mapping[str, Any]) -> TrainingState | None:
        """The last checkpoint; None where there is none.

        Raises:
            ValueError: it is damaged, or is of a run with other settings.
        """
        paths = self.paths()
        if not paths:
            return None
        path = paths[-1]
        try:
            content = json.loads((path / _FILES[-1]).read_text(encoding="utf-8"))
            tensors = [load_file(path / name) for name in _FILES[:-1]]
        except Exception as error:  # safetensors and JSON have errors of their own
            raise ValueError(f"{path} is damaged ({error}): remove it to go on from the one before") from error
        before = content["settings"]
        names = sorted(set(before) | set(settings))
        changed = [name for name in names if before.get(name) != settings.get(name)]
        if changed:
            was = ", ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in changed)
            raise ValueError(f"{path} is of a run with other settings: {was}. Take those back, or choose another out")
        return TrainingState(content["step"], tensors[0], tensors[1], tensors[2], content["counts"])


def full_tensor(value: Any) -> Tensor:
    """A copy on the CPU; of a sharded tensor all of it, for which every process must call."""
    tensor = torch.as_tensor(value).detach()
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.to("cpu", copy=True).contiguous()


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """The value in the place, and sharded as, a parameter is."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), mesh, parameter.placements)  # type: ignore[attr-defined]


def _sync(path: Path) -> None:
    """To the disk, files and (where the system can open them) folders."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
