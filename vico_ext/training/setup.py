"""From options to what a run needs: data, model, reference, stage."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vico_ext.training.batches import Samples
from vico_ext.training.chat import ChatEncoder
from vico_ext.training.consistency import ConsistencyModule, ConsistencyStage
from vico_ext.training.forward import Reference
from vico_ext.training.models import (
    add_lora,
    average_connector,
    fingerprint,
    load_model,
    tokens_per_tile,
    trained_names,
)
from vico_ext.training.options import ConsistencyOptions, DataOptions, RouterOptions, TrainOptions
from vico_ext.training.records import Corpus, Tiling
from vico_ext.training.reference_cache import ReferenceCache
from vico_ext.training.router import RouterModule, RouterStage

__all__ = ["Run", "load_dtype", "load_reference", "read_data", "set_up"]

_CACHE_DEPENDS_ON = ("system", "min_tiles", "max_tiles", "thumbnail", "precision")


@dataclass
class Run:
    """What the trainer works with.

    Attributes:
        stage: consistency or router.
        samples: the data.
        policy: the patched model, also inside the stage's module.
        cache: to be filled before the first step, where the reference is cached.
        identity: what model and data are, to be compared when a run goes on.
    """

    stage: Any
    samples: Samples
    policy: Any
    cache: ReferenceCache | None
    identity: dict[str, Any]


def load_dtype(options: DataOptions) -> torch.dtype:
    """What weights are loaded in."""
    return torch.bfloat16 if options.precision == "bf16" else torch.float32


def read_data(options: DataOptions, config: Any, *, questions: int = 0, measure: bool) -> Samples:
    """The data of the options, for a model of this config.

    Args:
        options: paths and limits.
        config: the model's.
        questions: see :meth:`Corpus.scan`.
        measure: whether items need lengths.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    full, _ = tokens_per_tile(config)
    encoder = ChatEncoder(tokenizer, config.image_token_id, full, options.system)
    height, width = config.vision_config.image_size
    if height != width:
        raise ValueError(f"tiles must be square, the model's are {height} x {width} pixels")
    tiling = Tiling(width, options.min_tiles, options.max_tiles, options.thumbnail)
    path = Path(options.data)
    root = Path(options.image_root) if options.image_root else path.parent
    corpus = Corpus.scan(path, root, tiling, questions=questions, measure=measure, tokens_per_tile=full)
    return Samples(corpus, tiling, encoder, options.max_length)


def set_up(options: TrainOptions, *, sharded: bool) -> Run:
    """Model, data and stage. ``sharded``: the model will be (FSDP), so that nothing can be shared with a reference."""
    policy, has_flash = load_model(options.model, load_dtype(options), options.seed, options.attention)
    grouped = options.grouping == "length"
    identity = {"model": fingerprint(options.model)["digest"]}
    if isinstance(options, ConsistencyOptions):
        samples = read_data(options, policy.config, measure=grouped)
        module, cache = _consistency(options, policy, has_flash, sharded, identity["model"])
        stage: Any = ConsistencyStage(module, options)
    elif isinstance(options, RouterOptions):
        if not has_flash:
            raise ValueError(f"{options.model} has no 64-token connector: run stage 1, `vico train consistency`, first")
        samples = read_data(options, policy.config, questions=options.questions, measure=grouped)
        cache = None
        stage = RouterStage(_router(options, policy, sharded), options)
    else:
        raise TypeError(f"options must be of a stage, got {type(options).__name__}")
    if options.gradient_checkpointing:
        policy.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    identity["data"] = hashlib.blake2b(repr(samples.corpus.items).encode(), digest_size=16).hexdigest()
    return Run(stage, samples, policy, cache, identity)


def _consistency(
    options: ConsistencyOptions, policy: Any, has_flash: bool, sharded: bool, digest: str
) -> tuple[ConsistencyModule, ReferenceCache | None]:
    if options.connector64_from == "average" or (options.connector64_from == "auto" and not has_flash):
        average_connector(policy)
    elif options.connector64_from == "random" and has_flash:
        raise ValueError(f"connector64_from: random, but {options.model} has a 64-token connector: use auto")
    trained = _mark(policy, trained_names(policy, options.train))
    kind = options.reference
    if kind == "auto":
        kind = "adapters_off" if options.train == "lora" else "copy"
    reference = Reference(policy, trained, borrow=kind != "copy", share=not sharded)
    if options.train == "lora":
        add_lora(policy, options.lora_targets, options.lora_rank, options.lora_alpha, options.dropout, options.seed)
    _train_in_float32(policy)
    for layer in policy.model.vico.mlp2:
        if isinstance(layer, nn.Dropout):
            layer.p = options.dropout
    cache = None
    if kind == "cache":
        about = {
            name: getattr(options, name) for name in ("system", "min_tiles", "max_tiles", "thumbnail", "precision")
        }
        data = hashlib.blake2b(Path(options.data).read_bytes(), digest_size=16).hexdigest()
        folder = Path(options.reference_cache or Path(options.out) / "reference")
        cache = ReferenceCache(folder, {"model": digest, "data": data, **about})
    return ConsistencyModule(policy, reference, options), cache


def _router(options: RouterOptions, policy: Any, sharded: bool) -> RouterModule:
    _mark(policy, trained_names(policy, "router"))
    reference = load_reference(policy, options.reference, load_dtype(options), options.attention, share=not sharded)
    _train_in_float32(policy)
    return RouterModule(policy, reference, options)


def load_reference(
    policy: Any, where: str, dtype: torch.dtype, attention: str = "auto", *, share: bool = True
) -> Reference:
    """The reference of a checkpoint folder, or of the policy itself (``self``).

    Raises:
        ValueError: it is of another size or vocabulary than the policy.
    """
    if where == "self":
        return Reference(policy, set(), share=share)
    other, _ = load_model(where, dtype, 0, attention)
    for name in ("vision_config", "text_config"):
        sizes = [getattr(getattr(model.config, name), "hidden_size", None) for model in (policy, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{where} has another {name}.hidden_size than the model: {sizes[1]}, not {sizes[0]}")
    if other.lm_head.weight.shape != policy.lm_head.weight.shape:
        raise ValueError(f"{where} has another vocabulary than the model")
    if share:
        _share_equal(other, policy)
    reference = Reference(other, set(), share=share)
    towers = (other.model.vision_tower, policy.model.vision_tower)
    pairs = zip(towers[0].parameters(), towers[1].parameters(), strict=True)
    if not all(mine is theirs for mine, theirs in pairs):
        reference.tower = other.model.vision_tower.requires_grad_(False).eval()
    return reference


def _share_equal(other: nn.Module, policy: nn.Module) -> None:
    """Parameters of ``other`` that equal the policy's become the policy's: held once."""
    mine = dict(policy.named_parameters())
    for name, parameter in list(other.named_parameters()):
        twin = mine.get(name)
        if twin is not None and twin.shape == parameter.shape and torch.equal(twin, parameter):
            parent, _, own = name.rpartition(".")
            setattr(other.get_submodule(parent), own, twin)


def _mark(model: Any, names: set[str]) -> set[int]:
    """Sets what requires a gradient; gives back the ids of the parameters that do."""
    trained = set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names:
            trained.add(id(parameter))
    return trained


def _train_in_float32(model: nn.Module) -> None:
    """What trains is kept in float32, whatever the rest is in."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
