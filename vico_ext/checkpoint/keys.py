"""The names of the Flash tensors: one table, read from left to right to save and from right to left to load.

Each row is one tensor in released (custom-code) naming, its shape in V (ViT width) and H (language model width),
and its spellings in HF-native checkpoints. A spelling is a tuple of names: the tensor is their concatenation along
dimension 0, which is how the open conversion splits the ``in_proj`` of an attention into ``query``, ``key`` and
``value``. The first spelling is the open conversion's and is the one written; the rest are natural variants,
accepted when loading:

- attention: ``{q,k,v}_proj`` beside ``{query,key,value}``; ``o_proj`` and ``output`` beside ``out_proj``;
- ``mlp2`` and ``gating`` left as the released ``nn.Sequential`` inside an otherwise HF-native model.

Names are matched behind any wrapper prefix (``model.``, ``module.``, ``base_model.model.`` ...).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["CONNECTOR", "FLASH_ONLY", "HF_PREFIX", "ROUTER", "Key", "is_flash_only", "root_name"]

HF_PREFIX = "model."

_ADDED = ("mlp2", "pooling_before_gating", "gating")
_ROOTS = ("mlp1", "multi_modal_projector", *_ADDED)
# Matches, by re.search, the names of the tensors that Flash adds to InternVL: the second connector and the router.
FLASH_ONLY = rf"(?:^|\.)(?:{'|'.join(_ADDED)})\."
_ROOTED = re.compile(rf"(?:^|\.)((?:{'|'.join(_ROOTS)})\..+)$")


@dataclass(frozen=True)
class Key:
    """One Flash tensor: its released name, its shape such as ("2H", "16V"), and its HF-native spellings."""

    released: str
    shape: tuple[str, ...]
    hf: tuple[tuple[str, ...], ...]

    @property
    def spellings(self) -> tuple[tuple[str, ...], ...]:
        """All spellings, the released one first."""
        return ((self.released,), *self.hf)

    def sizes(self, widths: Mapping[str, int]) -> list[int] | None:
        """The shape in numbers, or None where a width that it needs is unknown."""
        parts = [_factor_and_width(dim) for dim in self.shape]
        if any(width and width not in widths for _, width in parts):
            return None
        return [factor * widths.get(width, 1) for factor, width in parts]

    def expected(self, widths: Mapping[str, int]) -> str:
        """The shape in words: ``[2H, 16V] = [8192, 16384]``."""
        symbols = f"[{', '.join(self.shape)}]"
        sizes = self.sizes(widths)
        return symbols if sizes is None else f"{symbols} = {sizes}"

    def widths_from(self, sizes: list[int]) -> Iterator[tuple[str, int]]:
        """The widths V and H that a tensor of these sizes implies."""
        if len(sizes) == len(self.shape):
            for dim, size in zip(self.shape, sizes, strict=True):
                factor, width = _factor_and_width(dim)
                if width and size and size % factor == 0:
                    yield width, size // factor


def _factor_and_width(dim: str) -> tuple[int, str]:
    width = dim[-1] if dim[-1] in "VH" else ""
    factor = dim[: len(dim) - len(width)]
    return int(factor or 1), width


def root_name(name: str) -> str | None:
    """A Flash tensor's name without wrapper prefixes; None for tensors of other parts of the model."""
    match = _ROOTED.search(name)
    return match.group(1) if match else None


def is_flash_only(root: str) -> bool:
    """Whether a rooted name belongs to what Flash adds to InternVL: the second connector or the router."""
    return not root.startswith(("mlp1.", "multi_modal_projector."))


def _affine(released: str, hf: tuple[str, ...], weight: tuple[str, ...]) -> list[Key]:
    """Weight and bias of a Linear, or of a LayerNorm where the weight has one dimension."""
    return [
        Key(f"{released}.{part}", shape, tuple((f"{name}.{part}",) for name in hf))
        for part, shape in (("weight", weight), ("bias", weight[:1]))
    ]


def _attention(released: str) -> list[Key]:
    def split(part: str) -> tuple[tuple[str, ...], ...]:
        open_names = tuple(f"{released}.{name}.{part}" for name in ("query", "key", "value"))
        return open_names, tuple(f"{released}.{name}_proj.{part}" for name in "qkv")

    return [
        Key(f"{released}.in_proj_weight", ("3V", "V"), split("weight")),
        Key(f"{released}.in_proj_bias", ("3V",), split("bias")),
        *_affine(
            f"{released}.out_proj",
            (f"{released}.out_proj", f"{released}.o_proj", f"{released}.output"),
            ("V", "V"),
        ),
    ]


def _router() -> list[Key]:
    pooling, gating = "pooling_before_gating", "gating"
    keys = [Key(f"{pooling}.query_token", ("1", "V"), ((f"{pooling}.query_token",),))]
    for i in range(1, 5):
        keys += _attention(f"{pooling}.attn{i}")
        keys += _affine(f"{pooling}.norm{i}", (f"{pooling}.norm{i}",), ("V",))
    for i in range(1, 5):
        keys += _affine(f"{gating}.block{i}.0", (f"{gating}.block{i}.dense_in",), ("4V", "V"))
        keys += _affine(f"{gating}.block{i}.3", (f"{gating}.block{i}.dense_out",), ("V", "4V"))
        keys += _affine(f"{gating}.block{i}.5", (f"{gating}.block{i}.norm",), ("V",))
    keys += _affine(f"{gating}.gate.0", (f"{gating}.gate_norm",), ("V",))
    keys += _affine(f"{gating}.gate.1", (f"{gating}.gate_proj",), ("2", "V"))
    return keys


CONNECTOR: tuple[Key, ...] = (
    *_affine("mlp1.0", ("multi_modal_projector.layer_norm",), ("4V",)),
    *_affine("mlp1.1", ("multi_modal_projector.linear_1",), ("H", "4V")),
    *_affine("mlp1.3", ("multi_modal_projector.linear_2",), ("H", "H")),
    *_affine("mlp2.0", ("mlp2.norm",), ("16V",)),
    *_affine("mlp2.1", ("mlp2.dense1",), ("2H", "16V")),
    *_affine("mlp2.4", ("mlp2.dense2",), ("2H", "2H")),
    *_affine("mlp2.7", ("mlp2.dense3",), ("H", "2H")),
)
ROUTER: tuple[Key, ...] = tuple(_router())
