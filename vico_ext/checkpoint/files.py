"""Checkpoint files: finds the safetensors of a folder and reads single tensors out of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["CONFIG_NAME", "INDEX_NAME", "SINGLE_NAME", "CheckpointFiles", "FlashCheckpointError", "StateDictFiles"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"

_SHARD = re.compile(r"-of-0*(?!1\.)\d+\.safetensors$")  # of more than one
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# safetensors raises its own error for most damage; what a damaged header can further provoke is listed beside it.
_READ_ERRORS = (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, MemoryError, OverflowError)


class FlashCheckpointError(ValueError):
    """A checkpoint that cannot be used; the message lists every problem found.

    Attributes:
        path: the checkpoint.
        problems: one line per problem.
    """

    def __init__(self, path: Path | str, problems: str | Sequence[str]) -> None:
        self.path = Path(path)
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            message = f"{path}: {self.problems[0]}"
        else:
            message = f"{path}: {len(self.problems)} problems:" + "".join(f"\n  - {p}" for p in self.problems)
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return FlashCheckpointError, (self.path, self.problems)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is a :class:`FlashCheckpointError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FlashCheckpointError(path, f"not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise FlashCheckpointError(path, f"must hold a JSON object, got {type(content).__name__}")
    return content


class CheckpointFiles:
    """The tensors of a checkpoint by name; only headers are read until a tensor is asked for.

    Args:
        path: a folder with ``model.safetensors``, with ``model.safetensors.index.json`` and its shards, or with one
            ``.safetensors`` file of any name; or such a file.

    Raises:
        FlashCheckpointError: there is no such checkpoint, it is damaged, or it holds pickled weights, which are never
            loaded.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open: dict[Path, Any] = {}
        self._held: dict[Path, frozenset[str]] = {}
        self._where = self._locate()

    @property
    def folder(self) -> Path:
        """The folder that holds the files."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the files' order."""
        return list(self._where)

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted(set(self._where.values()))

    def config(self) -> dict[str, Any]:
        """``config.json`` beside the tensors; empty where there is none."""
        path = self.folder / CONFIG_NAME
        return read_json(path) if path.is_file() else {}

    def describe(self, name: str) -> tuple[list[int], str]:
        """Shape and dtype code ("F32", "BF16" ...) of a tensor, from the header alone."""
        try:
            part = self._file_of(name).get_slice(name)
            return list(part.get_shape()), str(part.get_dtype())
        except _READ_ERRORS as error:
            raise self._damaged(self._where[name], error) from error

    def tensor(self, name: str) -> Tensor:
        """The tensor, in memory of its own: the file may change or go afterwards."""
        try:
            return self._file_of(name).get_tensor(name).clone()
        except _READ_ERRORS as error:
            raise self._damaged(self._where[name], error) from error

    def part(self, name: str, part: int, parts: int) -> Tensor:
        """The `part`-th of `parts` equal parts of a tensor along dimension 0, in memory of its own."""
        if parts == 1:
            return self.tensor(name)
        try:
            whole = self._file_of(name).get_slice(name)
            rows = whole.get_shape()[0] // parts
            return whole[part * rows : (part + 1) * rows].clone()
        except _READ_ERRORS as error:
            raise self._damaged(self._where[name], error) from error

    def close(self) -> None:
        """Lets go of the files, and of what of them is mapped into memory; they open again when read."""
        self._open.clear()

    def _locate(self) -> dict[str, Path]:
        path = self.path
        if not path.exists():
            raise FlashCheckpointError(path, "no such file or folder")
        if path.is_file():
            if path.name.endswith(".index.json"):
                return self._read_index(path)
            if path.suffix != ".safetensors":
                raise FlashCheckpointError(path, _refusal([path]))
            return self._names_in(path)
        if (path / SINGLE_NAME).is_file():
            return self._names_in(path / SINGLE_NAME)
        if (path / INDEX_NAME).is_file():
            return self._read_index(path / INDEX_NAME)
        found = sorted(path.glob("*.safetensors"))
        if len(found) == 1 and not _SHARD.search(found[0].name):
            return self._names_in(found[0])
        if found:
            raise FlashCheckpointError(
                path,
                f"{_listed(found)} without {INDEX_NAME}, which says what is in which shard: an incomplete checkpoint",
            )
        raise FlashCheckpointError(path, _refusal(sorted(p for p in path.iterdir() if p.suffix in _PICKLES)))

    def _read_index(self, path: Path) -> dict[str, Path]:
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FlashCheckpointError(path, "must hold a non-empty object 'weight_map' of tensor names to file names")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise FlashCheckpointError(path, f"weight_map[{name!r}] must be a file name beside it, got {shard!r}")
        return {name: path.parent / shard for name, shard in weight_map.items()}

    def _names_in(self, path: Path) -> dict[str, Path]:
        self._handle(path)
        return dict.fromkeys(sorted(self._held[path]), path)

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            if not path.is_file():
                raise FlashCheckpointError(self.path, f"the index names the shard {path.name}, which is missing")
            try:
                handle = safe_open(path, framework="pt", device="cpu")
                self._held[path] = frozenset(handle.keys())
            except _READ_ERRORS as error:
                raise self._damaged(path, error) from error
            self._open[path] = handle
        return self._open[path]

    def _file_of(self, name: str) -> Any:
        path = self._where[name]
        handle = self._handle(path)
        if name not in self._held[path]:
            raise FlashCheckpointError(self.path, f"the index says {name} is in {path.name}, which does not hold it")
        return handle

    def _damaged(self, path: Path, error: BaseException) -> FlashCheckpointError:
        if isinstance(error, FlashCheckpointError):
            return error
        return FlashCheckpointError(
            path, f"not a readable safetensors file ({error}): truncated or damaged, fetch it again"
        )


class StateDictFiles:
    """A state dict in memory, read like :class:`CheckpointFiles`."""

    _CODES: ClassVar = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.path = Path("state dict")
        self._tensors = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def config(self) -> dict[str, Any]:
        """Empty: a state dict has no configuration."""
        return {}

    def describe(self, name: str) -> tuple[list[int], str]:
        """Shape and dtype code of a tensor."""
        t = self._tensors[name]
        return list(t.shape), self._CODES.get(t.dtype, str(t.dtype))

    def tensor(self, name: str) -> Tensor:
        """A copy of the tensor."""
        return self._tensors[name].detach().clone()


def _listed(paths: Sequence[Path], most: int = 4) -> str:
    names = [p.name for p in paths[:most]]
    return ", ".join(names) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def _refusal(pickles: Sequence[Path]) -> str:
    if pickles and pickles[0].suffix in _PICKLES:
        return (
            f"holds pickled weights ({_listed(pickles)}), which are never loaded because a pickle can run any code; "
            "convert them to safetensors"
        )
    return f"no checkpoint: expected {SINGLE_NAME}, {INDEX_NAME} with its shards, or one .safetensors file"
