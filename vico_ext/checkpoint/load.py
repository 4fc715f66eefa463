"""load_flash: the Flash tensors of a checkpoint, and nothing else of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vico_ext.checkpoint.files import CheckpointFiles, FlashCheckpointError, StateDictFiles
from vico_ext.checkpoint.keys import CONNECTOR, ROUTER, Key, is_flash_only, root_name

if TYPE_CHECKING:
    from vico_ext.modules import FusedConnector, VisualResolutionRouter

__all__ = ["FlashWeights", "load_flash"]

_FLOATS = ("F64", "F32", "BF16", "F16")
_CONFIG_PARTS = (
    "flash_mode",
    "flash_relative_threshold",
    "flash_absolute_threshold",
    "ps_version",
    "downsample_ratio",
    "projector_hidden_act",
    "select_layer",
    "vision_feature_layer",
    "image_token_id",
)


@dataclass(frozen=True)
class FlashWeights:
    """The Flash tensors of one checkpoint, under their released names whatever the file calls them.

    Attributes:
        connector: ``mlp1.*`` and ``mlp2.*``.
        router: ``pooling_before_gating.*`` and ``gating.*``, the unused attn3, attn4, norm3 and norm4 included.
        vit_hidden: width of the ViT, V.
        llm_hidden: width of the language model, H.
        config: what ``config.json`` says about Flash, such as ``flash_relative_threshold``.
    """

    connector: dict[str, Tensor]
    router: dict[str, Tensor]
    vit_hidden: int
    llm_hidden: int
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def flash_relative_threshold(self) -> float | None:
        """The released rule's quantile, where ``config.json`` has it."""
        return self.config.get("flash_relative_threshold")

    @property
    def flash_absolute_threshold(self) -> float | None:
        """The released rule's smallest probability, where ``config.json`` has it."""
        return self.config.get("flash_absolute_threshold")

    def connector_module(self, dtype: torch.dtype | None = None, **options: Any) -> FusedConnector:
        """A :class:`vico_ext.FusedConnector` with these weights, in evaluation mode.

        Args:
            dtype: dtype of its parameters; by default the checkpoint's.
            options: further arguments of the module, such as ``has_cls=False``.
        """
        from vico_ext import FusedConnector

        if "ps_version" in self.config:
            options.setdefault("ps_version", self.config["ps_version"])
        return _filled(FusedConnector(self.vit_hidden, self.llm_hidden, **options), self.connector, dtype)

    def router_module(self, dtype: torch.dtype | None = None, **options: Any) -> VisualResolutionRouter:
        """A :class:`vico_ext.VisualResolutionRouter` with these weights, in evaluation mode; arguments as above."""
        from vico_ext import VisualResolutionRouter

        return _filled(VisualResolutionRouter(self.vit_hidden, **options), self.router, dtype)


def _filled(module: Any, weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> Any:
    module = module.to(dtype or next(iter(weights.values())).dtype)
    module.load_state_dict(weights, strict=True)
    return module.eval()


def load_flash(path: str | Path | Mapping[str, Tensor], *, prefix: str | None = None) -> FlashWeights:
    """Reads the connector and the router of an InternVL Flash checkpoint, and none of its other tensors.

    Takes the released custom-code names and the HF-native ones (:mod:`vico_ext.checkpoint.keys`), mixed too, behind any
    wrapper prefix. Tensors keep the dtype they have on disk.

    Args:
        path: folder with ``model.safetensors``, with ``model.safetensors.index.json`` and its shards, or with one
            ``.safetensors`` file; or that file. ``config.json`` beside it is read where it exists. Or a state dict.
        prefix: take only tensors whose names start so; needed where a file holds two models, say policy and reference.

    Raises:
        FlashCheckpointError: lists every missing tensor and every wrong shape or dtype with what was expected; or says
            that this is no Flash checkpoint, that a file is missing or damaged, or that the weights are pickled.
    """
    files = StateDictFiles(path) if isinstance(path, Mapping) else CheckpointFiles(path)
    path = files.path
    config = files.config()
    names = _rooted_names(files, prefix)
    problems = [
        f"{root} is held more than once ({', '.join(full)}): pass prefix= to choose one"
        for root, full in names.items()
        if len(full) > 1
    ]
    if problems:
        raise FlashCheckpointError(path, problems)
    if not any(is_flash_only(root) for root in names):
        raise FlashCheckpointError(path, "this is not a Flash checkpoint: " + _what_it_has(names))

    found = {key.released: _spelling(key, names) for key in (*CONNECTOR, *ROUTER)}
    loader = _Loader(files, {root: full[0] for root, full in names.items()})
    widths = loader.widths(found, _configured_widths(config))
    tensors = {key.released: loader.load(key, found[key.released], widths) for key in (*CONNECTOR, *ROUTER)}
    if loader.problems:
        raise FlashCheckpointError(path, loader.problems)
    return FlashWeights(
        connector={key.released: tensors[key.released] for key in CONNECTOR},
        router={key.released: tensors[key.released] for key in ROUTER},
        vit_hidden=widths["V"],
        llm_hidden=widths["H"],
        config={name: config[name] for name in _CONFIG_PARTS if name in config},
    )


def _rooted_names(files: CheckpointFiles | StateDictFiles, prefix: str | None) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for full in files.names:
        root = root_name(full)
        if root is not None and full.startswith(prefix or ""):
            names.setdefault(root, []).append(full)
    return names


def _what_it_has(names: Iterable[str]) -> str:
    return "has mlp1 only" if any(names) else "has none of mlp1, mlp2, pooling_before_gating and gating"


def _spelling(key: Key, names: Mapping[str, object]) -> tuple[str, ...]:
    """The spelling used by the file: the one most of whose parts are there, the released one where none is."""
    return max(key.spellings, key=lambda parts: sum(part in names for part in parts) / len(parts))


def _configured_widths(config: Mapping[str, Any]) -> dict[str, int]:
    """V and H as ``config.json`` gives them: custom-code and HF-native configurations."""
    widths = {}
    for width, sections in (("V", ("vision_config",)), ("H", ("llm_config", "text_config"))):
        for section in sections:
            part = config.get(section)
            if isinstance(part, dict) and isinstance(part.get("hidden_size"), int):
                widths[width] = part["hidden_size"]
    return widths


class _Loader:
    """Checks and reads tensors, collecting what is wrong instead of stopping at the first."""

    def __init__(self, files: CheckpointFiles | StateDictFiles, names: Mapping[str, str]) -> None:
        self.files = files
        self.names = names
        self.problems: list[str] = []

    def widths(self, found: Mapping[str, tuple[str, ...]], configured: Mapping[str, int]) -> dict[str, int]:
        """V and H that most tensors agree on; a configuration that says otherwise is a problem."""
        votes: dict[str, Counter[int]] = {"V": Counter(), "H": Counter()}
        for key in (*CONNECTOR, *ROUTER):
            sizes = self._sizes(found[key.released])
            for width, value in key.widths_from(sizes) if sizes else ():
                votes[width][value] += 1
        widths = {width: counter.most_common(1)[0][0] for width, counter in votes.items() if counter}
        for width, value in configured.items():
            if widths.setdefault(width, value) != value:
                part = "vision" if width == "V" else "language"
                self._problem(f"config.json says {part} hidden size {value}, the tensors say {widths[width]}")
        return widths

    def load(self, key: Key, parts: tuple[str, ...], widths: Mapping[str, int]) -> Tensor:
        """The tensor of one row of the table; an empty one where there is a problem with it."""
        missing = [part for part in parts if part not in self.names]
        if missing:
            elsewhere = [name for name in key.hf[0] if name not in (*parts, key.released)]
            looked = f"; also looked for {', '.join(elsewhere)}" if elsewhere else ""
            return self._problem(f"missing {', '.join(missing)}, expected {key.expected(widths)}{looked}")
        sizes = self._sizes(parts)
        if sizes is None:
            return torch.empty(0)
        if sizes != key.sizes(widths):
            return self._problem(f"{' + '.join(parts)} must have shape {key.expected(widths)}, got {sizes}")
        try:
            dtypes = {self.files.describe(self.names[part])[1] for part in parts}
            if len(dtypes) > 1 or not dtypes <= set(_FLOATS):
                got = ", ".join(sorted(dtypes))
                return self._problem(f"{' + '.join(parts)} must be one of {', '.join(_FLOATS)}, got {got}")
            tensors = [self.files.tensor(self.names[part]) for part in parts]
        except FlashCheckpointError as error:
            return self._problem(*error.problems)
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def _sizes(self, parts: tuple[str, ...]) -> list[int] | None:
        """Sizes of the parts' concatenation; None where parts are missing, damaged, or do not fit together."""
        try:
            shapes = [self.files.describe(self.names[part])[0] for part in parts if part in self.names]
        except FlashCheckpointError as error:
            self._problem(*error.problems)
            return None
        if len(shapes) < len(parts):
            return None
        if len(shapes) > 1 and (not shapes[0] or any(s != shapes[0] for s in shapes)):
            self._problem(f"{' + '.join(parts)} must have equal shapes, got {shapes}")
            return None
        return [sum(s[0] for s in shapes), *shapes[0][1:]] if len(shapes) > 1 else shapes[0]

    def _problem(self, *lines: str) -> Tensor:
        self.problems += [line for line in lines if line not in self.problems]
        return torch.empty(0)
