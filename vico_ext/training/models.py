"""Loading what is trained: the patched model, the start of its 64-token connector, what trains, adapters."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vico_ext.checkpoint import CheckpointFiles
from vico_ext.checkpoint.keys import is_flash_only, root_name
from vico_ext.integrations import load_internvl, patch_internvl

__all__ = [
    "adapters_off",
    "add_lora",
    "average_connector",
    "connector_64_from_256",
    "load_model",
    "merge_lora",
    "tokens_per_tile",
    "trained_names",
]


def tokens_per_tile(config: Any) -> tuple[int, int]:
    """Visual tokens of a whole and of a compressed tile of a model's config."""
    height, width = config.vision_config.image_size
    rows, columns = config.vision_config.patch_size
    patches = (height // rows) * (width // columns)
    return patches // 4, patches // 16


def holds_flash(path: str | Path) -> bool:
    """Whether a checkpoint has the second connector and the router, by its tensors' names."""
    roots = (root_name(name) for name in CheckpointFiles(path).names)
    return any(root is not None and is_flash_only(root) for root in roots)


def load_model(path: str | Path, dtype: torch.dtype, seed: int, attention: str = "auto") -> tuple[Any, bool]:
    """A patched InternVL, and whether the checkpoint had Flash parts; else they are new, random by ``seed``.

    Args:
        path: folder of the checkpoint.
        dtype: of the weights.
        seed: of new weights.
        attention: transformers' implementation; auto takes its choice.

    Raises:
        OSError, FlashCheckpointError: there is no such checkpoint, or it is damaged.
        ImportError: what the attention needs is not installed.
    """
    from transformers import AutoModelForImageTextToText

    has_flash = holds_flash(path)
    if has_flash:
        model = load_internvl(path, dtype=dtype)
    else:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = patch_internvl(model)
    if attention != "auto":
        model.set_attn_implementation(attention)
    return model, has_flash


@torch.no_grad()
def connector_64_from_256(mlp2: nn.Sequential, weights: tuple[tuple[Tensor, Tensor], ...]) -> None:
    """Fills the 64-token connector so that it starts as average pooling before the 256-token connector's GELU.

    With z = mean over the four 2 x 2 blocks of W1 LN(x) + b1, the new connector is W2 GELU(z) + b2 exactly, but for its
    LayerNorm, which spans all four blocks. z passes the first GELU as GELU(z) - GELU(-z) = z, in 2H hidden units; the
    other half of the second layer keeps its random rows and starts with no weight in the third.

    Args:
        mlp2: LayerNorm, Linear, GELU, Dropout, Linear, GELU, Dropout, Linear; written in place.
        weights: (weight, bias) of the 256-token connector's LayerNorm, first and second Linear.
    """
    (gamma, beta), (w1, b1), (w2, b2) = weights
    norm, first, second, third = (cast(Any, mlp2[i]) for i in (0, 1, 4, 7))
    hidden, width = w1.shape[0], w1.shape[1] // 4

    def spread(values: Tensor) -> Tensor:  # [..., (i j c)] of 2 x 2 -> [..., (I J c)] of 4 x 4, I = 2 bi + i
        blocks = values.unflatten(-1, (1, 2, 1, 2, width))
        sizes = (*values.shape[:-1], 2, 2, 2, 2, width)
        return blocks.expand(sizes).reshape(*values.shape[:-1], 16 * width)

    norm.weight.copy_(spread(gamma))
    norm.bias.copy_(spread(beta))
    pooled = spread(w1) / 4
    first.weight.copy_(torch.cat([pooled, -pooled]))
    first.bias.copy_(torch.cat([b1, -b1]))
    eye = torch.eye(hidden, dtype=w1.dtype, device=w1.device)
    second.weight[:hidden].copy_(torch.cat([eye, -eye], 1))
    second.bias[:hidden].zero_()
    third.weight.zero_()
    third.weight[:, :hidden].copy_(w2)
    third.bias.copy_(b2)


def average_connector(model: Any) -> None:
    """:func:`connector_64_from_256` for a patched model."""
    projector = model.model.multi_modal_projector
    layers = (projector.layer_norm, projector.linear_1, projector.linear_2)
    connector_64_from_256(model.model.vico.mlp2, tuple((layer.weight, layer.bias) for layer in layers))


def trained_names(model: Any, train: str) -> set[str]:
    """Names of the parameters that train: ``connector64``, ``connectors``, ``llm``, ``all``, ``lora`` or ``router``.

    For ``lora`` those of the connectors; adapters come on top, see :func:`add_lora`.
    """
    if train == "router":
        return {f"model.vico.router.{name}" for name in _used_by_router(model.model.vico.router)}
    starts: dict[str, tuple[str, ...]] = {"connector64": ("model.vico.mlp2.",)}
    starts["connectors"] = starts["lora"] = (*starts["connector64"], "model.multi_modal_projector.")
    starts["llm"] = (*starts["connectors"], "model.language_model.", "lm_head.")
    starts["all"] = (*starts["llm"], "model.vision_tower.")
    return {name for name, _ in model.named_parameters() if name.startswith(starts[train])}


def _used_by_router(router: nn.Module) -> list[str]:
    unused = re.compile(r"pooling_before_gating\.(attn|norm)[34]\.")
    return [name for name, _ in router.named_parameters() if not unused.match(name)]


def add_lora(model: Any, targets: str, rank: int, alpha: float, dropout: float, seed: int) -> None:
    """Puts adapters into the language model's layers whose names match ``targets``; they start as no change.

    Raises:
        ValueError: no layer matches.
    """
    from peft import LoraConfig, inject_adapter_in_model

    scale: Any = alpha  # peft says int, and takes any number
    config = LoraConfig(r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model.model.language_model)


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    if "peft" not in sys.modules:  # then nobody has put adapters in
        return iter(())
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters."""
    layers = [layer for _, layer in _adapters(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge_lora(model: nn.Module) -> None:
    """Adds the adapters into the weights and takes them away."""
    for name, layer in list(_adapters(model)):
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())


def fingerprint(path: str | Path) -> dict[str, Any]:
    """What tells a checkpoint from another: its config, and of its tensors' files the size and some of the bytes."""
    import hashlib

    folder = Path(path)
    digest = hashlib.blake2b(digest_size=16)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest.update(json.dumps(config, sort_keys=True).encode())
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as content:
            for part in range(64):
                content.seek(size * part // 64)
                digest.update(content.read(4096))
    return {"files": [file.name for file in files], "digest": digest.hexdigest()}
