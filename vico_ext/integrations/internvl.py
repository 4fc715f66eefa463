"""ViCO in transformers' InternVL, by one call and reversibly.

Nothing of transformers is changed: a patched model has a submodule ``model.vico`` (:class:`VicoParts`), and attributes
``forward``, ``generate`` and ``vico_report`` of its own in front of its class's. The class's methods, or whatever was
put in front of them before (accelerate, Liger), do all that has to do with the language model.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vico_ext.checkpoint import FlashWeights, load_flash
from vico_ext.integrations.internvl_generate import UNKNOWN_PROMPT, CompressedPrompt, generate
from vico_ext.integrations.internvl_load import flash_tensors_expected
from vico_ext.integrations.internvl_visual import (
    NO_ROWS_APART,
    Encoded,
    VicoParts,
    cache_of,
    check_flash,
    check_no_placeholders,
    check_policy,
    encode,
    policy_of,
)
from vico_ext.integrations.report import VicoReport
from vico_ext.modules import FusedConnector, VisualResolutionRouter
from vico_ext.routing import RoutingPolicy, ThresholdPolicy

__all__ = ["load_internvl", "patch_internvl", "unpatch_internvl"]

_OLDEST = (4, 57)
_PROJECTOR = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}


def patch_internvl(
    model: Any,
    flash: str | Path | Mapping[str, Tensor] | FlashWeights | None = None,
    policy: RoutingPolicy | None = None,
) -> Any:
    """Gives a transformers InternVL a router and a 64-token connector: forward and generate use fewer visual tokens.

    The 256-token connector is the model's own ``multi_modal_projector``. The new parts are the submodule
    ``model.model.vico``, in the dtype and on the device of the projector's norm; ``state_dict`` has them as
    ``model.vico.mlp2.*`` and ``model.vico.router.*`` under their released names. ``model.config.vico`` says what was
    patched in, and ``model.vico_report()`` what the last call with images did.

    Args:
        model: an InternVLForConditionalGeneration; patched in place.
        flash: the weights, from a checkpoint folder or file in either key format, a state dict, or
            :func:`vico_ext.load_flash`; their ``mlp1`` goes into the projector. None: new parts, to be trained.
        policy: which tiles are compressed; by default the one that the model was saved with, or ThresholdPolicy(0.5).

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no InternVLForConditionalGeneration.
        ValueError: it is patched already, of another size than ``flash``, reads other ViT features than ViCO, or its
            projector is offloaded.
        FlashCheckpointError: ``flash`` is no Flash checkpoint.
        ImportError: transformers is missing or older than 4.57.
    """
    _check_model(model)
    inner, config = model.model, model.config
    if policy is None:
        policy = policy_of(config) or ThresholdPolicy(0.5)
    check_policy(policy)
    vit, llm = config.vision_config.hidden_size, config.text_config.hidden_size
    mlp1: Mapping[str, Tensor] = {}
    if flash is None:
        connector, router = FusedConnector(vit, llm), VisualResolutionRouter(vit)
    else:
        weights = flash if isinstance(flash, FlashWeights) else load_flash(flash)
        check_flash(weights)
        if (weights.vit_hidden, weights.llm_hidden) != (vit, llm):
            raise ValueError(
                f"the Flash weights are for a ViT of width {weights.vit_hidden} and a language model of width "
                f"{weights.llm_hidden}, this model has {vit} and {llm}: load the checkpoint of this model's size"
            )
        connector, router, mlp1 = weights.connector_module(), weights.router_module(), weights.connector
    saved_config = config.__dict__.get("vico")
    like = inner.multi_modal_projector.layer_norm.weight
    if like.is_meta:
        raise ValueError(
            "multi_modal_projector has no weights in memory (device 'meta'): patch the model once they are loaded, and "
            "keep model.multi_modal_projector out of what is offloaded (device_map), beside which ViCO's parts stay"
        )
    replaced = _replace_projector(inner.multi_modal_projector, mlp1)  # may refuse, and nothing else may from here on
    parts = VicoParts(connector.mlp2, router, policy, config)
    parts.saved = {"config": saved_config, "projector": replaced}
    inner.vico = parts.to(like).train(model.training)
    model.forward = _Replacement(model, "forward", _forward)
    model.generate = _Replacement(model, "generate", generate)
    model.vico_report = functools.partial(_report, model)
    return model


def unpatch_internvl(model: Any) -> Any:
    """Undoes :func:`patch_internvl`: the model is as it was, its projector's weights included if they were replaced.

    Returns:
        ``model``.

    Raises:
        ValueError: the model is not patched.
    """
    parts = getattr(getattr(model, "model", None), "vico", None)
    if parts is None:
        raise ValueError("this model is not patched: there is nothing to undo")
    for name in ("forward", "generate"):
        own = model.__dict__[name]
        # What was wrapped around ours since stays, and finds the model's own method behind it.
        if isinstance(own, _Replacement):
            own.restore()
    del model.vico_report, model.model.vico
    if parts.saved["config"] is None:
        del model.config.vico
    else:
        model.config.vico = parts.saved["config"]
    _replace_projector(model.model.multi_modal_projector, parts.saved["projector"])
    return model


def load_internvl(path: str | Path, policy: RoutingPolicy | None = None, **options: Any) -> Any:
    """Loads a patched model that was saved by ``save_pretrained``, or any Flash checkpoint in the transformers layout.

    Equivalent to ``patch_internvl(AutoModelForImageTextToText.from_pretrained(path, **options), path, policy)``, except
    that transformers, whose half does not know the ViCO tensors, does not report them as unexpected on the way.

    Args:
        path: checkpoint folder.
        policy: which tiles are compressed; by default the one that the model was saved with.
        options: of ``from_pretrained``.
    """
    transformers = _transformers()
    with flash_tensors_expected(transformers.InternVLForConditionalGeneration):
        model = transformers.AutoModelForImageTextToText.from_pretrained(path, **options)
    return patch_internvl(model, path, policy)


def _transformers() -> Any:
    """The library, if it is there and new enough."""
    wanted = ".".join(map(str, _OLDEST))
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"InternVL needs transformers: pip install 'transformers>={wanted}'") from error
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < _OLDEST:
        raise ImportError(
            f"patching InternVL needs transformers {wanted} or newer, this is {transformers.__version__}: "
            f"pip install -U 'transformers>={wanted}'"
        )
    return transformers


def _check_model(model: Any) -> None:
    wanted = _transformers().InternVLForConditionalGeneration
    if not isinstance(model, wanted):
        kind = type(model).__name__
        hint = "load it by AutoModelForImageTextToText.from_pretrained"
        if isinstance(getattr(model, "module", None), nn.Module):
            hint = "patch the model before it is wrapped, or pass model.module"
        elif hasattr(model, "get_base_model"):
            hint = "pass model.get_base_model()"
        elif kind == "InternVLChatModel":
            hint = "this is the custom-code model: convert the checkpoint to the transformers layout (vico convert)"
        raise TypeError(f"model must be an InternVLForConditionalGeneration of transformers, got {kind}: {hint}")
    if hasattr(model.model, "vico"):
        raise ValueError(
            "this model is patched already: vico_ext.unpatch_internvl(model) first, or set model.model.vico.policy to "
            "change the policy"
        )
    config, vision = model.config, model.config.vision_config
    grid = [side // patch for side, patch in zip(vision.image_size, vision.patch_size, strict=True)]
    if grid[0] != grid[1] or grid[0] % 4:
        raise ValueError(f"ViCO merges 4 x 4 patches of a square grid, this model's tiles have {grid[0]} x {grid[1]}")
    if config.downsample_ratio != 0.5:
        raise ValueError(f"ViCO's first connector merges 2 x 2 patches, this model has {config.downsample_ratio=}")
    _check_features(config.vision_feature_layer, config.vision_feature_select_strategy)


def _check_features(layer: Any, strategy: Any) -> None:
    if layer not in (None, -1) or strategy not in (None, "default"):
        raise ValueError(
            "the router and the connectors read the patch tokens of the ViT's last layer: vision_feature_layer must be "
            f"-1 and vision_feature_select_strategy 'default', got {layer!r} and {strategy!r}"
        )


def _replace_projector(projector: nn.Module, mlp1: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Writes the tensors of ``mlp1`` into the projector; gives back, on the CPU, what was there and differed."""
    pairs = []
    for name, released in _PROJECTOR.items():
        for part in ("weight", "bias"):
            key, own = f"{released}.{part}", getattr(getattr(projector, name), part)
            if key not in mlp1:
                continue
            if not own.is_floating_point() or own.shape != mlp1[key].shape:
                raise ValueError(
                    f"multi_modal_projector.{name}.{part} is {own.dtype} of shape {list(own.shape)} and cannot take "
                    f"that of the Flash checkpoint, {list(mlp1[key].shape)}: keep multi_modal_projector out of "
                    "the quantisation (model.multi_modal_projector in llm_int8_skip_modules or modules_to_not_convert)"
                )
            pairs.append((key, own.data, mlp1[key].to(own)))
    differing = [(key, own, new) for key, own, new in pairs if not torch.equal(own, new)]
    replaced = {key: own.to("cpu", copy=True) for key, own, _ in differing}
    for _, own, new in differing:
        own.copy_(new)
    return replaced


class _Replacement:
    """Stands in a model's ``__dict__`` for one of its methods. Is copied and pickled with the model.

    Args:
        model: the patched model.
        name: of the method.
        function: called with the model, the method replaced, and the call's arguments.
    """

    def __init__(self, model: Any, name: str, function: Callable[..., Any]) -> None:
        self.model, self.name, self.function = model, name, function
        self.previous = model.__dict__.get(name)

    @property
    def __signature__(self) -> inspect.Signature:  # generate and Trainer look into forward's parameters
        return inspect.signature(self.original)

    @property
    def original(self) -> Callable[..., Any]:
        """The method as it is without us: looked up when called, since Liger replaces those of classes."""
        return self.previous or getattr(type(self.model), self.name).__get__(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.model:  # accelerate binds a forward that it unwraps to the model, as a method
            args = args[1:]
        if not hasattr(self.model.model, "vico"):
            return self.original(*args, **kwargs)
        return self.function(self.model, self.original, *args, **kwargs)

    def restore(self) -> None:
        """Takes this away from the model."""
        del self.model.__dict__[self.name]
        if self.previous is not None:
            setattr(self.model, self.name, self.previous)


def _forward(model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The patched ``model.forward``: logits, loss and hidden states are those of the compressed sequence."""
    if not args and kwargs.get("pixel_values") is None:
        return original(**kwargs)
    named = {**dict(zip(inspect.signature(original).parameters, args, strict=False)), **kwargs}
    pixel_values = named.pop("pixel_values", None)
    if pixel_values is None or len(pixel_values) == 0:
        if pixel_values is not None:
            check_no_placeholders(model, named.get("input_ids"))
        return original(**named)
    if named.get("mm_encoder_outputs") is not None:
        raise ValueError("pass pixel_values or mm_encoder_outputs, not both")
    input_ids, inputs_embeds = named.pop("input_ids", None), named.pop("inputs_embeds", None)
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    _check_features(named.pop("vision_feature_layer", None), named.pop("vision_feature_select_strategy", None))
    shape = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
    cache = cache_of(named)
    if cache is not None and shape[0] > 1 and cache.get_seq_length() > 0:
        raise ValueError(NO_ROWS_APART.format("Pass the whole prompts without a cache"))
    past_mask, attention_mask = None, named.pop("attention_mask", None)
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] > shape[1]:
        past_mask, attention_mask = attention_mask[:, : -shape[1]], attention_mask[:, -shape[1] :]
    position_ids = named.pop("position_ids", None)
    encoded = encode(model, pixel_values, input_ids, inputs_embeds, attention_mask, position_ids)
    mask = encoded.attention_mask
    if encoded.sequence is not None:
        named.pop("cache_position", None)  # counts positions that are no longer there; made anew where it is needed
        for name, value in named.items():
            if name.startswith("cu_seq_lens") or (name == "logits_to_keep" and isinstance(value, Tensor)):
                raise ValueError(f"{name} counts positions of the sequence before compression: leave it out")
            if isinstance(value, Tensor) and value.shape == shape:
                named[name] = encoded.take(value, -100 if name.endswith("labels") else 0)
    empty = cache is None or cache.get_seq_length() == 0
    # Hooked to the inner model's output, what the outer forward (the class's, Liger's) makes of it finds them there.
    hook = model.model.register_forward_hook(functools.partial(_set_image_output, encoded))
    try:
        output = original(
            inputs_embeds=encoded.inputs_embeds,
            attention_mask=mask if past_mask is None or mask is None else torch.cat([past_mask, mask], 1),
            position_ids=encoded.position_ids,
            **named,
        )
    finally:
        hook.remove()
    filled = next((x for x in _values(output) if hasattr(x, "get_seq_length")), None)
    if filled is not None and encoded.sequence is not None:
        known = empty and input_ids is not None
        filled.vico_prompt = CompressedPrompt(input_ids, encoded.input_ids, encoded.mask) if known else UNKNOWN_PROMPT
    return output


def _values(output: Any) -> Any:
    """The values of a model's output, which is a dictionary of them or a tuple."""
    return output if isinstance(output, tuple) else output.values()


def _set_image_output(encoded: Encoded, module: Any, args: Any, output: Any) -> None:
    """Puts the visual tokens where this version of transformers has the output of its image encoder."""
    names = {field.name for field in dataclasses.fields(output)} if dataclasses.is_dataclass(output) else set()
    if "image_outputs" in names:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        output.image_outputs = BaseModelOutputWithPooling(
            last_hidden_state=encoded.vit_tokens, pooler_output=encoded.visual_tokens
        )
    elif "image_hidden_states" in names:
        output.image_hidden_states = encoded.visual_tokens


def _report(model: Any) -> VicoReport:
    """What routing did in the model's last call with images; one host sync, at this call."""
    last = model.model.vico.last
    if last is None:
        raise ValueError("there was no call with images yet: nothing to report")
    return last.report()
