"""The two layouts of a whole InternVL checkpoint, released (custom code) and transformers, tensor name by tensor name.

Each tensor of one layout is a list of pieces of the other: a piece is a tensor, or the i-th of n equal parts of one
along dimension 0. Joint projections (``attn.qkv``, ``in_proj``) are three tensors in the transformers layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vico_ext.checkpoint.keys import CONNECTOR, HF_PREFIX, ROUTER, root_name

__all__ = ["Piece", "hf_vision_name", "is_released", "to_hf", "to_released"]

# What follows `vision_model.`, in this order; the table of the conversion that published InternVL3 for transformers.
_TO_HF = (
    (r"^encoder\.layers\.", "encoder.layer."),
    (r"class_embedding$", "cls_token"),
    (r"position_embedding$", "position_embeddings"),
    (r"patch_embedding\.", "patch_embeddings.projection."),
    (r"\.ls(\d)$", r".lambda_\1"),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)
_TO_RELEASED = (
    (r"^encoder\.layer\.", "encoder.layers."),
    (r"cls_token$", "class_embedding"),
    (r"position_embeddings$", "position_embedding"),
    (r"patch_embeddings\.projection\.", "patch_embedding."),
    (r"\.lambda_(\d)$", r".ls\1"),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
_HF_VISION = re.compile(r"^(?:model\.)?vision_tower\.(.+)$")
_HF_LANGUAGE = re.compile(r"^(?:model\.language_model|language_model\.model)\.(.+)$")
_PROJECTION = re.compile(r"\.attn\.([qkv])_proj\.")


@dataclass(frozen=True)
class Piece:
    """The `part`-th of `parts` equal parts along dimension 0 of the tensor `name`; all of it where `parts` is 1."""

    name: str
    part: int = 0
    parts: int = 1


def is_released(names: Iterable[str]) -> bool | None:
    """Whether a checkpoint with these names is in the released layout; None where it is in neither."""
    names = list(names)
    if any(name.startswith("vision_model.") for name in names):
        return True
    return False if any(_HF_VISION.match(name) for name in names) else None


def hf_vision_name(name: str) -> str:
    """transformers' name of a tensor of the vision tower, for what follows ``vision_model.``."""
    return _renamed(name, _TO_HF)


def to_hf(names: Iterable[str]) -> tuple[dict[str, list[Piece]], list[str]]:
    """The transformers layout of a released checkpoint.

    Returns:
        For each tensor of the new layout the pieces it is made of, and the names that neither layout knows.
    """
    made: dict[str, list[Piece]] = {}
    unknown: list[str] = []
    flash = {key.released: [HF_PREFIX + name for name in key.hf[0]] for key in (*CONNECTOR, *ROUTER)}
    for name in names:
        if name in flash:
            new = flash[name]
        elif name.startswith("vision_model."):
            renamed = f"{HF_PREFIX}vision_tower.{hf_vision_name(name.removeprefix('vision_model.'))}"
            joint = ".attention.qkv." in renamed
            new = [renamed.replace(".qkv.", f".{part}_proj.") for part in "qkv"] if joint else [renamed]
        elif name.startswith("language_model.lm_head."):
            new = [name.removeprefix("language_model.")]
        elif name.startswith("language_model.model."):
            new = [f"{HF_PREFIX}language_model.{name.removeprefix('language_model.model.')}"]
        else:
            unknown.append(name)
            continue
        made |= {n: [Piece(name, i, len(new))] for i, n in enumerate(new)}
    return made, unknown


def to_released(names: Iterable[str]) -> tuple[dict[str, list[Piece]], list[str]]:
    """The released layout of a transformers checkpoint, patched and saved or converted; returned as by :func:`to_hf`.

    A joint projection takes the place of its first part.
    """
    made: dict[str, list[Piece | None]] = {}
    unknown: list[str] = []
    flash = {
        name: (key.released, i, len(spelling))
        for key in (*CONNECTOR, *ROUTER)
        for spelling in key.spellings
        for i, name in enumerate(spelling)
    }
    for name in names:
        new, part, parts = name, 0, 1
        vision, language, root = _HF_VISION.match(name), _HF_LANGUAGE.match(name), root_name(name)
        if vision:
            new = f"vision_model.{_renamed(vision[1], _TO_RELEASED)}"
            split = _PROJECTION.search(new)
            if split:
                new, part, parts = _PROJECTION.sub(".attn.qkv.", new), "qkv".index(split[1]), 3
        elif language:
            new = f"language_model.model.{language[1]}"
        elif name.endswith("lm_head.weight"):
            new = "language_model.lm_head.weight"
        elif root in flash:
            new, part, parts = flash[root]
        else:
            unknown.append(name)
            continue
        made.setdefault(new, [None] * parts)[part] = Piece(name)
    lacking = [f"{new} (one of its {len(pieces)} parts)" for new, pieces in made.items() if None in pieces]
    return {new: [piece for piece in pieces if piece] for new, pieces in made.items()}, unknown + lacking


def _renamed(name: str, table: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name
