"""generate() of a patched InternVL: the prompt is compressed first, the model's own generate does the rest.

B rows, L positions of the user's prompt, L' of the compressed one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vico_ext.integrations.internvl_visual import NO_ROWS_APART, Encoded, cache_of, check_no_placeholders, encode

__all__ = ["UNKNOWN_PROMPT", "CompressedPrompt", "generate"]

# Parameters of transformers' generate, in the order in which it takes them positionally.
_POSITIONAL = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
)
# What needs the prompt's ids to stand for the whole prompt, where ours stands in embeddings.
_REFUSED = (
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "use_mtp",
    "custom_generate",
    "token_healing",
    "prefill_chunk_size",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "negative_prompt_ids",
)


@dataclass(frozen=True, eq=False)
class CompressedPrompt:
    """Left on a key-value cache by the call that filled it: what its positions stand for.

    Attributes:
        original: ``[B, L]`` the user's ids.
        input_ids: ``[B, L']`` the ids after compression.
        attention_mask: ``[B, L']``.
    """

    original: Tensor
    input_ids: Tensor
    attention_mask: Tensor

    def begin(self, sequences: Tensor) -> Tensor:
        """sequences ``[n B, L' + new]`` with the user's prompts in front of what is new, ``[n B, L + new]``."""
        start = self.original.repeat_interleave(sequences.shape[0] // self.original.shape[0], 0)
        return torch.cat([start.to(sequences), sequences[:, self.input_ids.shape[1] :]], 1)

    def repeated(self, times: int) -> CompressedPrompt:
        """Each row so many times, as generate repeats the rows of a cache."""
        if times == 1:
            return self
        tensors = (self.original, self.input_ids, self.attention_mask)
        return CompressedPrompt(*(tensor.repeat_interleave(times, 0) for tensor in tensors))


# In place of a CompressedPrompt where the prompt's ids do not say what the cache's positions stand for.
UNKNOWN_PROMPT: Any = "unknown"


@torch.no_grad()
def generate(model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The patched ``model.generate``; see docs/internvl.md for what its arguments mean."""
    named = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
    cache = cache_of(named)
    earlier: CompressedPrompt | None = getattr(cache, "vico_prompt", None)
    if isinstance(earlier, str):  # UNKNOWN_PROMPT, perhaps a copy of it
        raise ValueError(
            "this cache (past_key_values) was filled from compressed prompts by several calls of the model itself, or "
            "by beam search, whose beams are not the sequences returned: generate cannot tell which of the prompt's "
            "ids it holds. Go on calling the model, or pass the whole conversation without a cache"
        )
    pixel_values = named.pop("pixel_values", None)
    has_images = pixel_values is not None and len(pixel_values) > 0
    if not has_images and earlier is None:
        if pixel_values is not None and cache is None:
            check_no_placeholders(model, named.get("input_ids", named.get("inputs")))
        return original(*args, **kwargs)

    settings = _Settings(model, named)
    settings.refuse_unsupported()
    if named.get("inputs") is None:
        named["inputs"] = named.pop("input_ids", None)
    ids, embeds = named.pop("inputs"), named.pop("inputs_embeds", None)
    if ids is not None and embeds is not None:
        raise ValueError("pass input_ids or inputs_embeds, not both: with images the prompt's embeddings are made here")
    like = embeds if ids is None else ids
    if like is None:
        raise ValueError("pixel_values need the prompt that they belong to: pass input_ids, got none")
    rows, length = like.shape[:2]
    mask = named.pop("attention_mask", None)
    if mask is None:
        mask = settings.inferred_mask(ids) if ids is not None else torch.ones_like(like[..., 0], dtype=torch.int64)
    settings.count_new_tokens(length)

    prompt = None if ids is None else CompressedPrompt(ids, ids, mask)
    if has_images:
        encoded = _encode(model, pixel_values, ids, embeds, mask, named, earlier, settings.pad)
        if prompt is not None:
            prompt = CompressedPrompt(prompt.original, encoded.input_ids, encoded.mask)
        named |= {"inputs_embeds": encoded.inputs_embeds, "attention_mask": encoded.mask}
        past = 0 if cache is None else cache.get_seq_length()
        if past and "cache_position" in inspect.signature(model.forward).parameters:
            # These versions of transformers take embeddings for new positions only where they are told so.
            named["inputs_embeds"] = encoded.inputs_embeds[:, past:]
            named["cache_position"] = torch.arange(past, encoded.inputs_embeds.shape[1], device=mask.device)
        if encoded.position_ids is not None:
            named["position_ids"] = encoded.position_ids
    else:
        prompt = _continued(prompt, earlier)
        named["attention_mask"] = prompt.attention_mask
    if prompt is None:
        return original(**named)

    named["input_ids"] = prompt.input_ids
    beams = (settings.get("num_beams") or 1) > 1
    _show_whole_prompt(named, prompt, 1 if beams else settings.get("num_return_sequences") or 1)
    output = original(**named)
    sequences = output if isinstance(output, Tensor) else output.sequences
    whole = prompt.begin(sequences)
    left = UNKNOWN_PROMPT if beams else prompt.repeated(sequences.shape[0] // rows)
    if cache is not None:
        cache.vico_prompt = left
    if isinstance(output, Tensor):
        return whole
    returned = cache_of(output)
    if returned is not None:
        returned.vico_prompt = left
    output.sequences = whole
    return output


def _encode(
    model: Any,
    pixel_values: Tensor,
    ids: Tensor | None,
    embeds: Tensor | None,
    mask: Tensor,
    named: dict[str, Any],
    earlier: CompressedPrompt | None,
    pad: int,
) -> Encoded:
    """The prompt's embeddings; what an earlier call has cached stands before them in its compressed form."""
    cache = cache_of(named)
    position_ids = named.pop("position_ids", None)
    if cache is not None and cache.get_seq_length() > 0:
        if len(mask) > 1:
            raise ValueError(NO_ROWS_APART.format("Call generate for each row, or without a cache"))
        if position_ids is not None:
            raise ValueError(
                "position_ids with new images and a filled past_key_values are not supported: leave them out"
            )
        if embeds is not None:
            raise ValueError(
                "inputs_embeds with new images and a filled past_key_values are not supported: pass input_ids"
            )
    if earlier is None or ids is None:
        return encode(model, pixel_values, ids, embeds, mask, position_ids, padding_side="left", pad_token_id=pad)
    known = _known_length(ids, earlier)
    new = encode(model, pixel_values, ids[:, known:], None, mask[:, known:], padding_side="left", pad_token_id=pad)
    # Rows of cached positions are not read: generate cuts them off.
    head = model.get_input_embeddings()(earlier.input_ids)
    return Encoded(
        torch.cat([earlier.input_ids, new.input_ids], 1),
        torch.cat([head, new.inputs_embeds], 1),
        torch.cat([earlier.attention_mask, new.mask.to(earlier.attention_mask)], 1),
        None,
        new.vit_tokens,
        new.visual_tokens,
        None,
    )


def _continued(prompt: CompressedPrompt | None, earlier: CompressedPrompt | None) -> CompressedPrompt:
    """A prompt that goes on from a cached one, without new images."""
    if prompt is None or earlier is None:
        raise ValueError(
            "this cache (past_key_values) was filled from a compressed prompt: pass the whole conversation's input_ids"
        )
    known = _known_length(prompt.original, earlier)
    return CompressedPrompt(
        prompt.original,
        torch.cat([earlier.input_ids, prompt.original[:, known:]], 1),
        torch.cat([earlier.attention_mask, prompt.attention_mask[:, known:].to(earlier.attention_mask)], 1),
    )


def _known_length(ids: Tensor, earlier: CompressedPrompt) -> int:
    known = earlier.original.shape[1]
    if ids.shape[0] != earlier.original.shape[0] or not torch.equal(ids[:, :known], earlier.original):
        raise ValueError(
            f"input_ids must begin with the {known} ids of the call that filled the cache (past_key_values) "
            f"({len(earlier.original)} rows), got {list(ids.shape)} that do not: its positions are those of a "
            "compressed prompt. Pass the whole conversation, or no cache"
        )
    return known


def _show_whole_prompt(named: dict[str, Any], prompt: CompressedPrompt, copies: int) -> None:
    """Has the caller's own code, which counts from the prompt that it passed, see that prompt.

    ``copies`` is how many rows each prompt has for ``prefix_allowed_tokens_fn``, which is told a row's number.
    """
    if named.get("streamer") is not None:
        named["streamer"] = _Streamer(named["streamer"], prompt.original)
    for name, wrapper in (("logits_processor", _Processor), ("stopping_criteria", _Criterion)):
        if named.get(name) is not None:
            named[name] = type(named[name])(wrapper(function, prompt) for function in named[name])
    allowed = named.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        named["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, torch.cat([prompt.original[row // copies].to(ids), ids[prompt.input_ids.shape[1] :]])
        )


class _Processor:
    """A logits processor of the caller's, which sees the user's prompts."""

    def __init__(self, function: Callable[..., Any], prompt: CompressedPrompt) -> None:
        self.function, self.prompt = function, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:  # with more parameters, lists of them ask for more
        return self.function(self.prompt.begin(input_ids), scores)


class _Criterion(_Processor):
    """A stopping criterion of the caller's, which sees the user's prompts."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return self.function(self.prompt.begin(input_ids), scores, **kwargs)


class _Streamer:
    """Shows a streamer the user's prompt first instead of the compressed one."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer = streamer
        self.prompt: Tensor | None = prompt

    def put(self, value: Tensor) -> None:
        if self.prompt is not None:
            value, self.prompt = self.prompt.cpu(), None
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


class _Settings:
    """The generation settings of a call: keyword arguments, then generation_config, then the model's own."""

    def __init__(self, model: Any, named: dict[str, Any]) -> None:
        from transformers import GenerationConfig

        self.named = named
        self.sources = [s for s in (named.get("generation_config"), model.generation_config) if s is not None]
        self.defaults = GenerationConfig()
        pad = self.get("pad_token_id")
        self.pad = int(pad) if pad is not None else 0

    def get(self, name: str) -> Any:
        """The value that counts, None where nobody set one."""
        if self.named.get(name) is not None:
            return self.named[name]
        default = getattr(self.defaults, name, None)
        values = (getattr(source, name, None) for source in self.sources)
        return next((v for v in values if v is not None and v != default), None)

    def refuse_unsupported(self) -> None:
        """Raises for modes that would work on something else than the prompt."""
        for name in _REFUSED:
            value = self.get(name)
            if value is not None and value is not False:
                raise ValueError(
                    f"generate({name}=...) is not supported with images on a patched model, which generates from the "
                    "compressed prompt's embeddings: leave it out, or vico_ext.unpatch_internvl(model) first"
                )
        if self.get("cache_implementation") == "paged":
            raise ValueError("generate(cache_implementation='paged') takes no images: choose another cache")

    def inferred_mask(self, ids: Tensor) -> Tensor:
        """As transformers infers it: the pad token is padding, unless it ends sequences too."""
        pad, eos = self.get("pad_token_id"), self.get("eos_token_id")
        ends = eos if isinstance(eos, list | tuple) else [eos]
        if pad is None or pad in ends:
            return torch.ones_like(ids)
        return (ids != pad).long()

    def count_new_tokens(self, length: int) -> None:
        """Total lengths, which count the user's prompt, become numbers of new tokens, which mean the same for ours."""
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = self.get(total)
            if value is None:
                continue
            if self.get(new) is None:
                if total == "max_length" and value <= length:
                    raise ValueError(
                        f"max_length is {value}, but the prompt has {length} tokens already (as passed, before "
                        "compression): increase max_length, or set max_new_tokens instead"
                    )
                # 0 too: a number of new tokens goes before a total length that the model's own configuration keeps.
                self._set(new, max(value - length, 0))
            self.named.pop(total, None)
            if self.named.get("generation_config") is not None:
                self._set(total, getattr(self.defaults, total))

    def _set(self, name: str, value: Any) -> None:
        config = self.named.get("generation_config")
        if config is None:
            self.named[name] = value
        else:
            config = self.named["generation_config"] = copy.deepcopy(config)
            setattr(config, name, value)
