"""save_flash: a connector and a router as safetensors, complete or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vico_ext._files import replacing_all
from vico_ext.checkpoint.files import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from vico_ext.checkpoint.keys import CONNECTOR, HF_PREFIX, ROUTER, Key

__all__ = ["save_flash", "size_in_bytes"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save_flash(
    path: str | Path,
    connector: nn.Module | Mapping[str, Tensor],
    router: nn.Module | Mapping[str, Tensor],
    *,
    format: Literal["released", "hf"] = "released",
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Writes a connector and a router in Flash checkpoint format; :func:`load_flash` gives them back bit for bit.

    Everything is written to temporary files first; then shards take their names before the index does. An interrupted
    save leaves what was there before, or nothing that loads, never half a checkpoint.

    Args:
        path: folder to write to, created where it does not exist.
        connector: a :class:`vico_ext.FusedConnector`, or its tensors under their released names.
        router: a :class:`vico_ext.VisualResolutionRouter`, or its tensors under their released names.
        format: "released" (custom-code names) or "hf" (HF-native names, ``in_proj`` split).
        metadata: strings for the safetensors headers.
        config: written as ``config.json``, such as ``{"flash_relative_threshold": 0.3}``.
        extra: further tensors, written under the names they have, such as a vision tower.
        max_shard_size: bytes, or "500MB", "5GB", "2GiB"; a larger checkpoint is sharded with an index.
        overwrite: replace a checkpoint that the folder already holds with all its shards, whatever else is in it.

    Returns:
        The folder.

    Raises:
        ValueError: tensors are missing or unknown, shapes do not fit together, or an argument is not as above.
        FileExistsError: the folder holds a checkpoint and `overwrite` is False.
    """
    path = Path(path)
    if format not in ("released", "hf"):
        raise ValueError(f"format must be 'released' or 'hf', got {format!r}")
    limit = size_in_bytes(max_shard_size)
    tensors = _named(format, _tensors_of(connector), _tensors_of(router))
    clash = sorted(set(tensors) & set(extra or {}))
    if clash:
        raise ValueError(f"extra must not hold Flash tensors, got {', '.join(clash)}")
    tensors |= extra or {}
    held = [name for name in (SINGLE_NAME, INDEX_NAME) if (path / name).exists()]
    if held and not overwrite:
        raise FileExistsError(
            f"{path} already holds a checkpoint ({held[0]}): choose another folder, or overwrite=True"
        )

    path.mkdir(parents=True, exist_ok=True)
    former = _shard_files(path)
    header = {"format": "pt", **(metadata or {})}
    shards = _shards(tensors, limit)
    with replacing_all(entry_points=[path / name for name in held]) as stage:
        if config is not None:
            _write_json(stage(path / CONFIG_NAME), config)
        if len(shards) == 1:
            _write(stage(path / SINGLE_NAME), tensors, header)
        else:
            weight_map: dict[str, str] = {}
            for number, names in enumerate(shards, start=1):
                shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                _write(stage(path / shard), {name: tensors[name] for name in names}, header)
                weight_map |= dict.fromkeys(names, shard)
            total = sum(map(_size, tensors.values()))
            _write_json(stage(path / INDEX_NAME), {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name in former - _shard_files(path):
        (path / name).unlink(missing_ok=True)
    return path


def _shard_files(path: Path) -> set[str]:
    """Files of the folder itself that its index names, if it has one that can be read."""
    try:
        names = json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()
        return {name for name in names if Path(name).name == name and name.endswith(".safetensors")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _write(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    # Copies: safetensors refuses tensors that share memory, as the parts of a split in_proj do.
    ready = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    save_file(ready, path, metadata=header)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")


def _tensors_of(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(source.state_dict() if isinstance(source, nn.Module) else source)


def _named(format: str, connector: dict[str, Tensor], router: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both parts, checked, under the names of the format."""
    named: dict[str, Tensor] = {}
    problems: list[str] = []
    for part, table, tensors in (("connector", CONNECTOR, connector), ("router", ROUTER, router)):
        problems += _problems(part, table, tensors, connector)
        for key in table:
            tensor = tensors.get(key.released)
            if tensor is None:
                continue
            if format == "released":
                named[key.released] = tensor
            else:
                names = key.hf[0]
                named |= {HF_PREFIX + n: t for n, t in zip(names, tensor.chunk(len(names)), strict=False)}
    if problems:
        raise ValueError(f"cannot save, {len(problems)} problems:" + "".join(f"\n  - {p}" for p in problems))
    return named


def _problems(
    part: str, table: tuple[Key, ...], tensors: Mapping[str, Tensor], connector: Mapping[str, Tensor]
) -> Iterator[str]:
    widths: dict[str, int] = {}
    first = connector.get("mlp1.1.weight")  # [H, 4V]
    if first is not None:
        widths.update(CONNECTOR[2].widths_from(list(first.shape)))
    for key in table:
        tensor = tensors.get(key.released)
        if tensor is None:
            yield f"{part} lacks {key.released}, expected {key.expected(widths)}"
        elif list(tensor.shape) != key.sizes(widths):
            yield f"{part}: {key.released} must have shape {key.expected(widths)}, got {list(tensor.shape)}"
        elif tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            yield f"{part}: {key.released} must be floating point, got {tensor.dtype}"
    for name in tensors:
        if name not in {key.released for key in table}:
            yield f"{part} has {name}, which is no tensor of a Flash {part}"


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Tensor names in shards of at most `limit` bytes; a tensor larger than that has a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + _size(tensor) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _size(tensor)
    return shards


def size_in_bytes(size: int | str) -> int:
    """Bytes from a number, or from words such as "500MB" and "2GiB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size must be bytes or a size such as '500MB' or '2GiB', got {size!r}")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))
