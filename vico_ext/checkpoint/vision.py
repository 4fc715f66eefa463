"""The vision tower of a checkpoint as transformers' own InternVLVisionModel, without loading anything else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vico_ext.checkpoint.configs import hf_vision_config
from vico_ext.checkpoint.files import CheckpointFiles, FlashCheckpointError
from vico_ext.checkpoint.layouts import hf_vision_name

if TYPE_CHECKING:
    from transformers import InternVLVisionModel

__all__ = ["load_vision_tower"]

_TOWER = re.compile(r"(?:^|\.)(vision_model|vision_tower)\.((?:embeddings|encoder|layernorm)\..+)$")


def load_vision_tower(path: str | Path, dtype: torch.dtype | None = None) -> InternVLVisionModel:
    """Reads the ViT of an InternVL checkpoint, custom-code or HF-native, in evaluation mode.

    Args:
        path: checkpoint folder with ``config.json`` and safetensors.
        dtype: dtype of its parameters; by default the checkpoint's.

    Raises:
        FlashCheckpointError: the folder has no vision configuration, or lists every tensor that is missing, unknown or
            of the wrong shape.
        ModuleNotFoundError: transformers is not installed.
    """
    try:
        from transformers import InternVLVisionConfig, InternVLVisionModel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "loading a vision tower needs transformers, which is not installed: pip install 'vico_ext[cli]'",
            name=error.name,
        ) from error
    files = CheckpointFiles(path)
    config = _vision_config(files)
    try:
        with torch.device("meta"):
            tower = InternVLVisionModel(InternVLVisionConfig(**config))
    except Exception as error:  # transformers' validation raises its own kinds, which differ between versions
        raise FlashCheckpointError(path, f"vision_config in config.json is not usable: {error}") from error

    weights: dict[str, Tensor] = {}
    for name in files.names:
        match = _TOWER.search(name)
        if match:
            weights |= _renamed(match[2], files.tensor(name), custom=match[1] == "vision_model")
    problems = _problems(tower.state_dict(), weights)
    if problems:
        raise FlashCheckpointError(path, problems)
    tower.load_state_dict(weights, strict=True, assign=True)
    nn.Module.to(tower, dtype or weights["embeddings.cls_token"].dtype)
    return tower.eval()


def _vision_config(files: CheckpointFiles) -> dict[str, Any]:
    config = files.config()
    vision = config.get("vision_config")
    if not isinstance(vision, dict) or "hidden_size" not in vision:
        raise FlashCheckpointError(files.path, "config.json with a vision_config is needed to build the vision tower")
    layer = config.get("select_layer", config.get("vision_feature_layer", -1))
    if layer != -1:
        raise FlashCheckpointError(
            files.path, f"features of ViT layer {layer} are asked for; only the last (-1) is served"
        )
    return hf_vision_config(config)


def _renamed(name: str, tensor: Tensor, *, custom: bool) -> dict[str, Tensor]:
    """A tensor under transformers' names: itself, or the query, key and value parts of a joint projection."""
    if not custom:
        return {name: tensor}
    name = hf_vision_name(name)
    if ".attention.qkv." not in name:
        return {name: tensor}
    parts = tensor.chunk(3)
    return {name.replace(".qkv.", f".{p}_proj."): part for p, part in zip("qkv", parts, strict=False)}


def _problems(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> list[str]:
    problems = [
        f"vision tower: missing {name}, expected {list(wanted[name].shape)}" for name in wanted if name not in got
    ]
    problems += [f"vision tower: {name} is unknown to InternVLVisionModel" for name in got if name not in wanted]
    problems += [
        f"vision tower: {name} must have shape {list(wanted[name].shape)}, got {list(tensor.shape)}"
        for name, tensor in got.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    problems += [
        f"vision tower: {name} must be floating point, got {tensor.dtype}"
        for name, tensor in got.items()
        if not tensor.is_floating_point()
    ]
    return problems
