"""The small InternVL: transformers' own classes, 64 x 64 pixel tiles, 16 visual tokens of a tile or 4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reproduce.drawing import PATCH, SIDE
from reproduce.tokens import END, IMAGE, PAD, VOCABULARY
from vico_ext.tiling import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["SIZES", "Size", "make_config", "make_model", "normalised"]


@dataclass(frozen=True)
class Size:
    """Widths and depths."""

    vit: int
    vit_layers: int
    llm: int
    llm_layers: int


SIZES = {"laptop": Size(128, 4, 128, 3), "gpu": Size(256, 6, 256, 6)}


def make_config(size: Size) -> Any:
    """An InternVLConfig of that size."""
    from transformers import AutoConfig, InternVLConfig, InternVLVisionConfig

    vision = InternVLVisionConfig(
        hidden_size=size.vit,
        intermediate_size=3 * size.vit,
        num_hidden_layers=size.vit_layers,
        num_attention_heads=size.vit // 32,
        image_size=[SIDE, SIDE],
        patch_size=[PATCH, PATCH],
        attention_bias=True,
        # Few layers from scratch: small gates in front of them, made for many, would only delay the start.
        layer_scale_init_value=1.0,
        use_mean_pooling=False,
        initializer_range=0.05,
    )
    language = AutoConfig.for_model(
        "qwen3",
        hidden_size=size.llm,
        intermediate_size=3 * size.llm,
        num_hidden_layers=size.llm_layers,
        num_attention_heads=size.llm // 32,
        num_key_value_heads=size.llm // 32,
        head_dim=32,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=1024,
        initializer_range=0.05,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
    )
    return InternVLConfig(
        vision_config=vision,
        text_config=language,
        image_token_id=IMAGE,
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        tie_word_embeddings=False,
    )


def make_model(size: Size, seed: int) -> Any:
    """The model with random weights, in float32."""
    from transformers import InternVLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(make_config(size))
        _place_patches(model.model.vision_tower.embeddings.position_embeddings.data)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = END
    return model


def _place_patches(embeddings: Tensor) -> None:
    """Writes sines and cosines of row and column into ``[1, 1 + N, V]``.

    transformers starts them at zero. A glyph lies across patches, and a neighbour is found sooner where positions have
    a geometry from the start.
    """
    side, width = round((embeddings.shape[1] - 1) ** 0.5), embeddings.shape[2]
    waves = torch.pi * torch.linspace(1 / side, 1, width // 4)  # from half a turn over the tile to one in two patches
    angles = torch.arange(side)[:, None] * waves
    along = torch.cat([angles.sin(), angles.cos()], 1)  # [side, V / 2]
    rows, columns = along[:, None].expand(-1, side, -1), along[None].expand(side, -1, -1)
    embeddings.zero_()
    embeddings[0, 1:] = 0.5 * torch.cat([rows, columns], -1).flatten(0, 1)


def normalised(pixels: Tensor) -> Tensor:
    """Pixel values ``[n, 3, S, S]`` of uint8 pixels ``[n, S, S, 3]``, as :func:`vico_ext.tiling.tile_image` does."""
    mean, std = (torch.tensor(own, device=pixels.device) for own in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixels.float() / 255 - mean) / std).movedim(-1, 1).contiguous()
