"""convert_checkpoint: a whole InternVL Flash checkpoint from the released layout to transformers', and back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from vico_ext._files import replacing, sync_folder
from vico_ext.checkpoint import configs
from vico_ext.checkpoint.files import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointFiles,
    FlashCheckpointError,
    read_json,
)
from vico_ext.checkpoint.keys import CONNECTOR, HF_PREFIX, ROUTER, is_flash_only, root_name
from vico_ext.checkpoint.layouts import Piece, is_released, to_hf, to_released
from vico_ext.checkpoint.save import size_in_bytes

__all__ = ["Conversion", "convert_checkpoint"]

STAGE = ".vico-convert"
_PLAN = "plan.json"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        path: the new checkpoint's folder.
        to: "hf" or "released".
        tensors: how many tensors it has, each read back and compared with what it was made of.
        shards: how many files they are in.
        resumed: how many of these an earlier, interrupted run had left complete.
    """

    path: Path
    to: str
    tensors: int
    shards: int
    resumed: int


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    to: Literal["hf", "released"] | None = None,
    *,
    image_token_id: int | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Conversion:
    """Rewrites a checkpoint under the other layout's tensor names and configuration; no value changes.

    Works shard by shard: at most one new shard is in memory. Shards are built in a hidden folder of ``target``; each is
    read back and compared with its source bit for bit. Only when all are there do they take their places, the file
    that makes a checkpoint of them last: what is interrupted does not load, and goes on where it was when run again.

    Args:
        source: folder of a checkpoint, released (custom code) or transformers layout, the latter as converted here, by
            others (the table is :mod:`vico_ext.checkpoint.keys`), or saved from a patched model.
        target: folder to write, on the same file system as its parts are built in.
        to: "hf" or "released"; by default the layout that ``source`` does not have.
        image_token_id: the id of ``<IMG_CONTEXT>``, where no tokenizer file of ``source`` says it.
        max_shard_size: bytes, or "500MB", "5GB"; by default the size of the source's largest file.
        overwrite: replace a checkpoint that ``target`` already holds, all its shards, and other files of equal names.
        progress: called with a line about each shard.

    Raises:
        FlashCheckpointError: ``source`` is no whole Flash checkpoint, or has tensors or settings that the other layout
            has no place for; each is named. Or a written tensor is not what it was made of.
        ValueError: an argument is not as above.
        FileExistsError: ``target`` holds a checkpoint, or files that would be replaced, and ``overwrite`` is False.
    """
    source, target = Path(source), Path(target)
    files = CheckpointFiles(source)
    released = is_released(files.names)
    if released is None:
        raise FlashCheckpointError(source, "neither layout: no tensor of a vision tower (vision_model, vision_tower)")
    to = to or ("hf" if released else "released")
    if to not in ("hf", "released"):
        raise ValueError(f"to must be 'hf' or 'released', got {to!r}")
    if (to == "released") == released:
        raise ValueError(f"{source} is in the {'released' if released else 'transformers'} layout already")
    if target.resolve() == files.folder.resolve():
        raise ValueError(f"the new checkpoint needs a folder of its own, got {target}, which is the source")
    made = _checked_plan(files, to)
    if to == "hf":
        config = configs.hf_config(source, files.config(), image_token_id)
    else:
        config = configs.released_config(source, files.config())
    largest = max(path.stat().st_size for path in files.files)
    limit = largest if max_shard_size is None else size_in_bytes(max_shard_size)
    sizes = {name: sum(_bytes_of(files, piece) for piece in pieces) for name, pieces in made.items()}
    job = _Job(files, target, made, _named_shards(sizes, limit), config, sum(sizes.values()), progress or _silent)
    return job.run(to, overwrite)


def _silent(line: str) -> None:
    pass


def _checked_plan(files: CheckpointFiles, to: str) -> dict[str, list[Piece]]:
    made, unknown = (to_hf if to == "hf" else to_released)(files.names)
    problems = [f"{name}: the other layout has no place for it" for name in unknown]
    if not any(is_flash_only(root) for name in files.names if (root := root_name(name))):
        problems.append("this is not a Flash checkpoint: it has no second connector and no router (mlp2, gating)")
    else:
        for key in (*CONNECTOR, *ROUTER):
            names = [HF_PREFIX + name for name in key.hf[0]] if to == "hf" else [key.released]
            problems += [f"incomplete: nothing to make {name} of" for name in names if name not in made]
    for name, pieces in made.items():
        for piece in pieces:
            shape, _ = files.describe(piece.name)
            if piece.parts > 1 and (not shape or shape[0] % piece.parts):
                problems.append(f"{piece.name} must divide into {piece.parts} equal parts for {name}, got {shape}")
    if problems:
        raise FlashCheckpointError(files.path, problems)
    return made


def _bytes_of(files: CheckpointFiles, piece: Piece) -> int:
    shape, code = files.describe(piece.name)
    return torch.Size(shape).numel() * _BYTES.get(code, 1) // piece.parts


def _named_shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File names, and the tensors in each: at most `limit` bytes, or one tensor that is larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, start=1)}


@dataclass
class _Job:
    """One conversion: what is to be written, and where."""

    files: CheckpointFiles
    target: Path
    made: dict[str, list[Piece]]
    shards: dict[str, list[str]]
    config: dict[str, Any]
    total: int
    progress: Callable[[str], None]

    def run(self, to: str, overwrite: bool) -> Conversion:
        stage, target = self.target / STAGE, self.target
        plan = self._description()
        ours = (stage / _PLAN).is_file() and (stage / _PLAN).read_text(encoding="utf-8") == plan
        held = [name for name in (SINGLE_NAME, INDEX_NAME) if (target / name).exists()]
        placed = ours and not any(stage.glob("*.safetensors"))  # an earlier run was stopped after its last shard moved
        if held and not overwrite and not placed:
            raise FileExistsError(
                f"{target} already holds a checkpoint ({held[0]}): choose another folder, or overwrite"
            )
        if not overwrite and not ours:
            mine = [name for name in (*self.shards, CONFIG_NAME, *self._copied()) if (target / name).exists()]
            if mine:
                raise FileExistsError(
                    f"{target} already holds {mine[0]}, which would be replaced: choose another folder, or overwrite"
                )
        if stage.exists() and not ours:
            shutil.rmtree(stage)
        stage.mkdir(parents=True, exist_ok=True)
        with replacing(stage / _PLAN) as temporary:
            temporary.write_text(plan, encoding="utf-8")
        resumed = sum(self._shard(stage, number, name) for number, name in enumerate(self.shards, start=1))
        last = self._beside(stage)
        self._take_places(stage, held, last)
        return Conversion(target, to, len(self.made), len(self.shards), resumed)

    def _description(self) -> str:
        """Equal for runs that write the same from the same files."""
        sources = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in self.files.files]
        return json.dumps({"sources": sources, "shards": self.shards, "config": self.config})

    def _shard(self, stage: Path, number: int, name: str) -> bool:
        """Writes a shard, unless an earlier run has; returns whether it had."""
        for folder in (stage, self.target):
            if (folder / name).is_file() and self._differing(folder / name, name) is None:
                self.progress(f"{name}: already there")
                return True
        tensors = {key: self._built(self.made[key]) for key in self.shards[name]}
        with replacing(stage / name) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        del tensors
        self.files.close()
        wrong = self._differing(stage / name, name)
        if wrong is not None:
            (stage / name).unlink()
            raise FlashCheckpointError(stage / name, f"{wrong} is not what was written: is the disk sound?")
        self.progress(f"{name}: {len(self.shards[name])} tensors, {number} of {len(self.shards)}")
        return False

    def _built(self, pieces: list[Piece]) -> Tensor:
        parts = [self.files.part(piece.name, piece.part, piece.parts) for piece in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _differing(self, path: Path, name: str) -> str | None:
        """The first tensor of a written shard that is not what it should be, bit for bit."""
        try:
            written = CheckpointFiles(path)
            if set(written.names) != set(self.shards[name]):
                return "the list of tensors"
            for key in self.shards[name]:
                got, want = written.tensor(key), self._built(self.made[key])
                if got.dtype != want.dtype or got.shape != want.shape or not torch.equal(_bits(got), _bits(want)):
                    return key
        except FlashCheckpointError as error:
            if error.path != path:
                raise  # the source is damaged, not what was written
            return "its header"
        finally:
            self.files.close()
        return None

    def _beside(self, stage: Path) -> str:
        """Everything but the tensors; returns the name of the file that makes a checkpoint of it all."""
        for name in self._copied():
            with replacing(stage / name) as temporary:
                shutil.copyfile(self.files.folder / name, temporary)
        with replacing(stage / CONFIG_NAME) as temporary:
            temporary.write_text(configs.json_text(self.config), encoding="utf-8")
        if SINGLE_NAME in self.shards:
            return SINGLE_NAME
        where = {name: shard for shard, names in self.shards.items() for name in names}
        with replacing(stage / INDEX_NAME) as temporary:
            index = {"metadata": {"total_size": self.total}, "weight_map": where}
            temporary.write_text(configs.json_text(index), encoding="utf-8")
        return INDEX_NAME

    def _copied(self) -> list[str]:
        """Files of the source that go along as they are: tokenizer, licence and the like."""
        files = sorted(path.name for path in self.files.folder.iterdir() if path.is_file())
        not_copied = (*_NOT_COPIED, ".py", INDEX_NAME)
        return [name for name in files if not name.startswith(".") and not name.endswith(not_copied)]

    def _replaced_shards(self) -> list[Path]:
        """Shards of the checkpoint that the target holds, of which the new one has no shard of that name."""
        try:
            names = set(read_json(self.target / INDEX_NAME).get("weight_map", {}).values())
        except (FlashCheckpointError, AttributeError, TypeError):
            return []  # an index that nobody can read names no shards: it is to be replaced
        plain = (n for n in names if isinstance(n, str) and Path(n).name == n and n.endswith(".safetensors"))
        return [self.target / name for name in plain if name not in self.shards]

    def _take_places(self, stage: Path, held: list[str], last: str) -> None:
        names = sorted(path.name for path in stage.iterdir() if path.name not in (last, _PLAN))
        if (stage / last).exists():  # else an earlier run got as far as this
            old = self._replaced_shards() if INDEX_NAME in held else []
            for name in held:
                (self.target / name).unlink()
            for path in old:
                path.unlink(missing_ok=True)
            sync_folder(self.target)
        for name in names:
            os.replace(stage / name, self.target / name)
        sync_folder(self.target)
        if (stage / last).exists():
            os.replace(stage / last, self.target / last)
            sync_folder(self.target)
        shutil.rmtree(stage)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
