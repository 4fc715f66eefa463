"""Options of training and evaluation: one dataclass per command, the same names in YAML and as flags."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "ConsistencyOptions",
    "DataOptions",
    "EvalOptions",
    "RouterOptions",
    "TrainOptions",
    "build_options",
    "option_type",
    "read_yaml",
    "to_dict",
]

Options = TypeVar("Options", bound="DataOptions")
SKIP_OR_STOP = ("skip", "stop")


def _option(
    default: Any, help: str, *, choices: tuple[str, ...] = (), low: float = -math.inf, high: float = math.inf,
    free: bool = False,
) -> Any:  # fmt: skip
    """A field with its help, its allowed values, and whether a resumed run may change it (``free``)."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high, "free": free})


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What every command reads."""

    model: str = _option("", "InternVL or Flash checkpoint folder in the transformers layout", free=True)
    data: str = _option("", "JSONL file of conversations", free=True)
    out: str = _option("", "folder for everything written", free=True)
    image_root: str = _option("", "folder that image paths are relative to; by default that of the data", free=True)
    system: str = _option("", "system message of conversations that have none")
    min_tiles: int = _option(1, "fewest tiles of an image's grid", low=1)
    max_tiles: int = _option(12, "most tiles of an image's grid", low=1)
    thumbnail: bool = _option(True, "add the whole image as one more tile where the grid has several")
    max_length: int = _option(
        8192, "longest conversation in tokens, all tiles whole; longer ones are bad records", low=1
    )
    on_bad_record: str = _option("stop", "a malformed line", choices=SKIP_OR_STOP)
    on_unreadable_image: str = _option("stop", "an image that cannot be read", choices=SKIP_OR_STOP)
    precision: str = _option("no", "autocast; bf16 also loads what does not train in bfloat16", choices=("no", "bf16"))
    attention: str = _option(
        "auto", "transformers' implementation; auto = its choice; short sequences on a CPU are faster with eager",
        choices=("auto", "eager", "sdpa", "flash_attention_2"),
    )  # fmt: skip
    seed: int = _option(0, "of data order, rates, dropout and new weights")
    workers: int = _option(2, "processes per device that load images", low=0, free=True)

    def __post_init__(self) -> None:
        for name in ("model", "data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give it in the YAML file or as --{name}")
        for item in fields(self):
            _check(item, getattr(self, item.name))
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"min_tiles must not exceed max_tiles, got {self.min_tiles} and {self.max_tiles}")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    """What both stages read."""

    steps: int = _option(0, "optimizer steps; 0: by epochs", low=0)
    epochs: int = _option(1, "passes over the data, where steps is 0", low=1)
    batch: int = _option(32, "samples per optimizer step, over all processes", low=1)
    micro_batch: int = _option(1, "samples that a device holds at once; accumulation follows from it", low=1)
    grouping: str = _option(
        "length", "samples of a step: of similar length, or as they come", choices=("length", "none")
    )
    learning_rate: float = _option(1e-4, "peak of the cosine schedule", low=0)
    final_share: float = _option(0.0, "where the cosine ends, as a share of the peak", low=0, high=1)
    warmup_steps: int = _option(0, "linear warm-up", low=0)
    weight_decay: float = _option(0.01, "AdamW, on matrices only", low=0)
    beta1: float = _option(0.9, "AdamW", low=0, high=1)
    beta2: float = _option(0.95, "AdamW", low=0, high=1)
    clip_norm: float = _option(1.0, "largest norm of the gradient; 0: do not clip", low=0)
    dropout: float = _option(0.1, "of what trains; the released models have 0.1", low=0, high=0.99)
    gradient_checkpointing: bool = _option(False, "recompute the language model's layers in the backward pass")
    on_nonfinite_loss: str = _option("stop", "a loss or gradient that is not finite", choices=SKIP_OR_STOP)
    save_every: int = _option(200, "steps between checkpoints", low=1, free=True)
    keep_checkpoints: int = _option(2, "older ones are removed", low=1, free=True)
    log_every: int = _option(10, "steps between entries in TensorBoard", low=1, free=True)
    tensorboard: bool = _option(True, "write TensorBoard logs", free=True)
    resume: bool = _option(True, "go on from the last checkpoint in out; false: out must hold no run", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch % self.micro_batch:
            raise ValueError(f"batch must be a multiple of micro_batch, got {self.batch} and {self.micro_batch}")


@dataclass(frozen=True, kw_only=True)
class ConsistencyOptions(TrainOptions):
    """Stage 1."""

    train: str = _option(
        "llm",
        "what trains: connector64; connectors; llm = connectors and language model; all = with the ViT; "
        "lora = connectors, and adapters in the language model",
        choices=("connector64", "connectors", "llm", "all", "lora"),
    )
    connector64_from: str = _option(
        "auto", "start of the 64-token connector: auto = average, unless the checkpoint has one",
        choices=("auto", "average", "random"),
    )  # fmt: skip
    rate_per: str = _option("tile", "what draws its rate", choices=("tile", "image"))
    compress_share: float = _option(0.5, "probability of the 1/16 rate", low=0, high=1)
    reference: str = _option(
        "auto", "auto = adapters_off for lora, else copy; cache = hidden states on disk",
        choices=("auto", "copy", "adapters_off", "cache"),
    )  # fmt: skip
    reference_cache: str = _option("", "folder of the cache; by default OUT/reference", free=True)
    divergence: str = _option("forward_kl", "KL(ref, policy), KL(policy, ref) or their mean to the mixture",
                              choices=("forward_kl", "reverse_kl", "jsd"))  # fmt: skip
    temperature: float = _option(1.0, "of both models' logits", low=1e-3)
    average_over: str = _option(
        "sample", "mean of the samples' means, or of all answer tokens", choices=("sample", "token")
    )
    language_lr_scale: float = _option(0.3, "learning rate of all but the connectors, as a share", low=0)
    lora_rank: int = _option(16, "lora", low=1)
    lora_alpha: float = _option(32.0, "lora", low=0)
    lora_targets: str = _option(r".*\.(q|k|v|o|gate|up|down)_proj", "lora: regular expression of layers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference == "adapters_off" and self.train != "lora":
            raise ValueError(f"reference: adapters_off needs train: lora, got {self.train}")


@dataclass(frozen=True, kw_only=True)
class RouterOptions(TrainOptions):
    """Stage 2."""

    reference: str = _option("self", "checkpoint folder of the original model; self = the policy, all tiles whole")
    questions: int = _option(8, "most conversations of one image that are judged together", low=1)
    others: str = _option("full", "the other tiles while one is flipped", choices=("full", "random", "router"))
    compress_share: float = _option(0.5, "others: random, the probability of the 1/16 rate", low=0, high=1)
    window: int = _option(2048, "loss ratios that the percentile is taken of", low=1)
    percentile: float = _option(65.0, "k: tau is the k-th percentile of the window", low=0, high=100)
    epsilon: float = _option(1e-4, "added to both losses of a ratio", low=0)
    flip_batch: int = _option(16, "sequences per run of the language model", low=1, free=True)


@dataclass(frozen=True, kw_only=True)
class EvalOptions(DataOptions):
    """``vico eval``."""

    reference: str = _option("self", "checkpoint folder that KL is taken to; self = the model, all tiles whole")
    policies: tuple[str, ...] = _option(
        ("threshold:0.5", "budget:0.5"), "of the router; all-256, all-64 and random at equal budgets come on top"
    )
    micro_batch: int = _option(4, "conversations per run", low=1)
    throughput_batches: tuple[int, ...] = _option((1,), "prompts per run in the timing of the first token")
    throughput_seconds: float = _option(2.0, "least time of each timing; 0: none", low=0)


def option_type(item: dataclasses.Field[Any], owner: type) -> Any:
    """The type of a field's values: int, float, bool, str or a tuple type."""
    return typing.get_type_hints(owner)[item.name]


def _check(item: dataclasses.Field[Any], value: Any) -> None:
    choices, low, high = (item.metadata[key] for key in ("choices", "low", "high"))
    if choices and value not in choices:
        raise ValueError(f"{item.name} must be one of {', '.join(choices)}, got {value!r}")
    if isinstance(value, int | float) and not isinstance(value, bool) and not low <= value <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{item.name} must be {bounds}, got {value}")


def _converted(name: str, value: Any, wanted: Any) -> Any:
    """A YAML or flag value in the type of its field."""
    origin = typing.get_origin(wanted)
    if origin is tuple:
        inner = typing.get_args(wanted)[0]
        listed = value.split() if isinstance(value, str) else value
        if not isinstance(listed, list | tuple):
            raise ValueError(f"{name} must be a list, got {value!r}")
        return tuple(_converted(name, part, inner) for part in listed)
    if wanted is bool:
        words = {"true": True, "yes": True, "false": False, "no": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if isinstance(value, bool):
            return value
        raise ValueError(f"{name} must be true or false, got {value!r}")
    if wanted is str:
        # YAML reads a bare `no` as false
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (wanted is int and number != int(number)):
        raise ValueError(f"{name} must be a {'whole ' if wanted is int else ''}number, got {value!r}")
    return wanted(number)


def build_options(kind: type[Options], *layers: Mapping[str, Any]) -> Options:
    """Options from layers of names and values, later ones first: a YAML file, then flags.

    Raises:
        ValueError: an unknown name, a value of another type or outside its bounds, or a missing path.
    """
    known = {item.name: item for item in fields(kind)}
    values: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                raise ValueError(f"there is no option {name}" + (f": did you mean {near[0]}?" if near else ""))
            values[name] = _converted(name, value, option_type(known[name], kind))
    return kind(**values)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Names and values of a YAML file, read by its safe loader.

    Raises:
        ValueError: not YAML, or no mapping of names to values.
        ModuleNotFoundError: PyYAML is missing.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold names and values, got {type(content).__name__}")
    return content


def to_dict(options: DataOptions, *, all_of_them: bool = True) -> dict[str, Any]:
    """Names and values for JSON; without those that a resumed run may change where ``all_of_them`` is False."""
    chosen = (item for item in fields(options) if all_of_them or not item.metadata["free"])
    values = {item.name: getattr(options, item.name) for item in chosen}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
