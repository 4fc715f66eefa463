"""A small InternVL Flash checkpoint with random weights: real architecture, real format, nothing learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico_ext import save_flash
from vico_ext.checkpoint.keys import CONNECTOR, HF_PREFIX, ROUTER, Key

__all__ = ["write_checkpoint"]


def write_checkpoint(
    path: Path,
    seed: int = 0,
    *,
    vit_hidden: int = 256,
    vit_layers: int = 4,
    llm_hidden: int = 512,
    image_size: int = 448,
    max_shard_size: int | str = "16MB",
) -> Path:
    """Writes config.json and sharded safetensors of a Flash model without its language model; HF-native names."""
    from transformers import InternVLConfig, InternVLVisionConfig, InternVLVisionModel

    vision = InternVLVisionConfig(
        hidden_size=vit_hidden,
        intermediate_size=4 * vit_hidden,
        num_hidden_layers=vit_layers,
        num_attention_heads=max(1, vit_hidden // 64),
        image_size=[image_size, image_size],
        patch_size=[14, 14],
        attention_bias=True,
    )
    heads = max(1, llm_hidden // 64)
    text = {
        "model_type": "qwen3",
        "hidden_size": llm_hidden,
        "intermediate_size": 3 * llm_hidden,
        "num_hidden_layers": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = InternVLVisionModel(vision)
        torch.nn.init.normal_(tower.embeddings.cls_token, std=0.02)
        torch.nn.init.normal_(tower.embeddings.position_embeddings, std=0.02)
        connector = {key.released: _drawn(key, vit_hidden, llm_hidden) for key in CONNECTOR}
        router = {key.released: _drawn(key, vit_hidden, llm_hidden) for key in ROUTER}
    # A random gate says nearly the same of every tile; a larger one spreads p enough to see.
    router["gating.gate.1.weight"] *= 3
    config: dict[str, Any] = json.loads(InternVLConfig(vision_config=vision, text_config=text).to_json_string())
    config |= {"flash_relative_threshold": 0.5, "flash_absolute_threshold": 0.0, "vico_ext_untrained": True}
    extra = {f"{HF_PREFIX}vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    return save_flash(
        path,
        connector,
        router,
        format="hf",
        config=config,
        extra=extra,
        max_shard_size=max_shard_size,
        overwrite=True,
    )


def _drawn(key: Key, vit_hidden: int, llm_hidden: int) -> Tensor:
    """As torch initialises layers: LayerNorm at identity, Linear scaled by its fan-in, biases zero."""
    sizes = key.sizes({"V": vit_hidden, "H": llm_hidden})
    assert sizes is not None
    if key.released.endswith("bias"):
        return torch.zeros(sizes)
    if len(sizes) == 1:
        return torch.ones(sizes)
    scale = 1.0 if key.released.endswith("query_token") else sizes[1] ** -0.5
    return torch.randn(sizes) * scale
