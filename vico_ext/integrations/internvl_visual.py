"""The visual side of a patched InternVL: pixel values and a prompt in, the language model's shorter inputs out.

B rows, L positions before and L' after compression, P tiles, T packed visual tokens, H the language model's width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vico_ext import functional as VF
from vico_ext.integrations.internvl_prompt import Placeholders
from vico_ext.integrations.report import LastCall
from vico_ext.modules import VisualResolutionRouter
from vico_ext.routing import (
    BudgetPolicy,
    PerImagePolicy,
    ReleasedPolicy,
    RoutingPlan,
    RoutingPolicy,
    ThresholdPolicy,
    decide,
)
from vico_ext.tokens import CompressedSequence, compress_sequence

__all__ = [
    "NO_ROWS_APART",
    "Encoded",
    "VicoParts",
    "cache_of",
    "check_flash",
    "check_no_placeholders",
    "check_policy",
    "encode",
    "policy_of",
]

NO_ROWS_APART = (
    "new images with a filled cache (past_key_values) work for one row only: compression gives rows different lengths, "
    "and padding cannot go between what is cached and what is new. {}"
)

_POLICIES: dict[str, Any] = {c.__name__: c for c in (BudgetPolicy, PerImagePolicy, ReleasedPolicy, ThresholdPolicy)}


class VicoParts(nn.Module):
    """What ViCO adds to an InternVL: the submodule ``vico`` of its ``model``.

    The connector at 256 tokens per tile is not here: it is the model's own ``multi_modal_projector``.

    Attributes:
        mlp2: the 64-token connector, ``nn.Sequential`` under the released names.
        router: the router; it never drops out, and does not require gradients until one asks for it: routing is not
            differentiable, so the language model's loss gives it none.
        policy: which tiles are compressed; set it to change the rule, the model's config follows.
        last: what the last call with images leaves for ``vico_report``.
        saved: what ``unpatch_internvl`` puts back.
    """

    def __init__(self, mlp2: nn.Sequential, router: VisualResolutionRouter, policy: RoutingPolicy, config: Any) -> None:
        super().__init__()
        self.mlp2 = mlp2
        self.router = router.requires_grad_(False)
        self.last: LastCall | None = None
        self.saved: dict[str, Any] = {}
        self.config = config
        self.policy = policy

    @property
    def policy(self) -> RoutingPolicy:
        """Which tiles are compressed."""
        return self._policy

    @policy.setter
    def policy(self, policy: RoutingPolicy) -> None:
        check_policy(policy)
        self._policy = policy
        name = type(policy).__name__
        known: Any = asdict(policy) if type(policy) is _POLICIES.get(name) else {}  # type: ignore[call-overload]
        self.config.vico = {
            "policy": {"type": name, **known},
            "tokens": list(self.tokens),
            "vit_hidden": self.config.vision_config.hidden_size,
            "llm_hidden": self.config.text_config.hidden_size,
        }

    def train(self, mode: bool = True) -> VicoParts:
        """Training mode for all but the router: a decision must not depend on dropout."""
        super().train(mode)
        self.router.eval()
        return self

    def _replicate_for_data_parallel(self) -> Any:
        # A replica keeps the patched forward of the model that it was copied from, which runs that model instead.
        raise RuntimeError(
            "nn.DataParallel cannot copy a patched InternVL, and would cut pixel_values elsewhere than prompts: run "
            "one process per GPU (torchrun, accelerate launch), or show this one a single GPU (CUDA_VISIBLE_DEVICES)"
        )

    @torch.no_grad()
    def probabilities(self, vit_tokens: Tensor) -> Tensor:
        """The router's ``[P]``, of vit_tokens ``[P, 1 + N, V]``."""
        return self.router(vit_tokens.to(self.router.pooling_before_gating.query_token))

    @property
    def tokens(self) -> tuple[int, int]:
        """Visual tokens of a whole and of a compressed tile."""
        full = tokens_per_tile(self.config)
        return full, full // 4

    def decide(self, vit_tokens: Tensor, tiles_per_image: Tensor) -> Tensor:
        """Which of the tiles are compressed, ``[P]`` bool; leaves what ``vico_report`` shows.

        Args:
            vit_tokens: ``[P, 1 + N, V]``.
            tiles_per_image: ``[P]`` int64, in the first entries; the rest are 0.
        """
        p = self.probabilities(vit_tokens)
        compress = decide(p, self.policy, tiles_per_image, self.tokens)
        self.last = LastCall(p, compress, tiles_per_image, self.tokens)
        return compress

    def connect(self, vit_tokens: Tensor, plan: RoutingPlan, projector: nn.Module) -> Tensor:
        """The visual tokens ``[T, H]``, packed in tile order; only the chosen connector runs on a tile.

        ``projector`` is called as the module it is, so that whatever was done to it (LoRA, quantisation, hooks) holds,
        and on the same shape as ever where no tile is compressed, which makes its output the same bits.
        """
        whole, compressed = plan.order.split([plan.full_tiles, plan.compressed_tiles])
        # With gradients both run, perhaps on no tile: DistributedDataParallel expects a gradient of every parameter.
        both = torch.is_grad_enabled()
        parts = []
        if both or plan.full_tiles:
            parts.append(projector(VF.pixel_shuffle(vit_tokens, 2, tile_index=whole)))
        if both or plan.compressed_tiles:
            x = vit_tokens.to(next(self.mlp2.parameters()))
            parts.append(self.mlp2(VF.pixel_shuffle(x, 4, tile_index=compressed)))
        if len(parts) == 1:
            return parts[0].flatten(0, 1)
        return VF.pack_tokens(parts[0], parts[1].to(parts[0]), plan)


def cache_of(holder: dict[str, Any]) -> Any:
    """The key-value cache among keyword arguments or in a model's output, by either of its names in transformers."""
    cache = dict.get(holder, "cache")  # unbound: outputs that answer to both names warn when asked by the old one
    return dict.get(holder, "past_key_values") if cache is None else cache


def check_flash(weights: Any) -> None:
    """Raises a ValueError for Flash weights that were trained on another pixel shuffle than transformers' InternVL."""
    if weights.config.get("ps_version", "v2") != "v2":
        raise ValueError(
            f"the Flash checkpoint has ps_version {weights.config['ps_version']!r}, transformers' InternVL shuffles "
            "pixels as 'v2': use vico_ext.FusedConnector with ps_version='v1' in a model of your own"
        )


def check_policy(policy: Any) -> None:
    """Raises a TypeError for what is no policy."""
    if not isinstance(policy, RoutingPolicy):
        raise TypeError(f"policy must be a RoutingPolicy such as ThresholdPolicy(), got {policy!r}")


def check_no_placeholders(model: Any, input_ids: Tensor | None) -> None:
    """Raises a ValueError for a prompt with placeholders beside pixel values of no tile; one host sync."""
    if input_ids is not None and bool((input_ids == model.config.image_token_id).any()):
        raise ValueError(
            "images and prompt do not match: pixel_values hold 0 tiles and the prompt has placeholders "
            "(image_token_id). Pass ids and pixel values of one processor call; with a filled cache the ids of what is "
            "new."
        )


def policy_of(config: Any) -> RoutingPolicy | None:
    """The policy that a patched model's config was saved with; None for other configs."""
    section = getattr(config, "vico", None)
    if not isinstance(section, dict) or "policy" not in section:
        return None
    options = dict(section["policy"])
    name = options.pop("type", None)
    if name not in _POLICIES:
        raise ValueError(
            f"the model's config was saved with the routing policy {name}, which is none of {', '.join(_POLICIES)}: "
            "pass policy="
        )
    return _POLICIES[name](**options)


def tokens_per_tile(config: Any) -> int:
    """Visual tokens of a tile that stays whole: a quarter of the ViT's patches."""
    height, width = config.vision_config.image_size
    rows, columns = config.vision_config.patch_size
    return (height // rows) * (width // columns) // 4


@dataclass(frozen=True, eq=False)
class Encoded:
    """Inputs of the language model.

    Attributes:
        input_ids: ``[B, L']``.
        inputs_embeds: ``[B, L', H]``, the visual tokens in their places.
        attention_mask: ``[B, L']``, or None where none was given and none is needed.
        position_ids: ``[B, L']``, or None where none were given.
        vit_tokens: ``[P, 1 + N, V]``, the ViT's last hidden state.
        visual_tokens: ``[T, H]``.
        sequence: how the batch was compressed; None where no tile was, and the batch is as it came.
    """

    input_ids: Tensor
    inputs_embeds: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    vit_tokens: Tensor
    visual_tokens: Tensor
    sequence: CompressedSequence | None

    @property
    def mask(self) -> Tensor:
        """The attention mask, ones where there is none."""
        return torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask

    def take(self, values: Tensor, fill: int = 0) -> Tensor:
        """Values ``[B, L]`` of the positions that stayed, ``fill`` at padding."""
        return values if self.sequence is None else self.sequence.take(values, fill)


def encode(
    model: Any,
    pixel_values: Tensor,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    padding_side: str | None = None,
    pad_token_id: int = 0,
) -> Encoded:
    """Runs the visual side of a batch and takes out the placeholders that its compressed tiles do not need.

    One host sync: the numbers that size the outputs. None for one row where the policy knows its count; several rows
    have a longest one, which depends on where the compressed tiles are, so that padding them takes the sync.

    Args:
        model: a patched InternVLForConditionalGeneration.
        pixel_values: ``[P, 3, height, width]``, the tiles of all rows in order.
        input_ids: ``[B, L]``, or None with ``inputs_embeds``.
        inputs_embeds: ``[B, L, H]``, in which the embedding of the placeholder marks its places.
        attention_mask: ``[B, L]``.
        position_ids: ``[B, L]`` or ``[1, L]``.
        padding_side: where shorter rows are padded; by default where the batch was.
        pad_token_id: the id written there.

    Raises:
        ValueError: the tiles and the placeholders do not match, or an argument has another form.
        RuntimeError: they do not match and there was no host sync to see it, on an accelerator.
    """
    inner = model.model
    parts, placeholder = inner.vico, model.config.image_token_id
    if pixel_values.dim() != 4:
        raise ValueError(
            f"pixel_values must have shape [tiles, channels, height, width], got {list(pixel_values.shape)}"
        )
    side = list(model.config.vision_config.image_size)
    if list(pixel_values.shape[2:]) != side:
        raise ValueError(
            f"pixel_values must hold tiles of {side[0]} x {side[1]} pixels, for which this model's connectors are, got "
            f"{pixel_values.shape[2]} x {pixel_values.shape[3]}: set the size of the image processor"
        )
    if input_ids is None:
        if inputs_embeds is None:
            raise ValueError("pixel_values need input_ids or inputs_embeds beside them, got neither")
        marker = model.get_input_embeddings()(torch.full((), placeholder, device=inputs_embeds.device))
        # Any id but the placeholder's does for the rest, and -1 is never that.
        input_ids = torch.where((inputs_embeds == marker).all(-1), placeholder, -1)
    input_ids = input_ids.long()
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of the prompt, {list(input_ids.shape)}, got "
            f"{list(attention_mask.shape)}: routing shortens the prompt, and cannot shorten a mask of another form"
        )
    prompt = Placeholders.find(input_ids, attention_mask, placeholder, pixel_values.shape[0], parts.tokens)
    if prompt.known_length(parts.policy) is not None:
        prompt.check_on_device(input_ids, attention_mask, placeholder)

    vit_tokens = inner.vision_tower(pixel_values=pixel_values.to(dtype=inner.vision_tower.dtype))[0]
    compress = parts.decide(vit_tokens, prompt.tiles_per_image)
    count, length, left = prompt.sizes(compress, parts.policy, attention_mask)
    plan = RoutingPlan.from_compress(compress, parts.tokens, compressed_tiles=count)
    visual_tokens = parts.connect(vit_tokens, plan, inner.multi_modal_projector)

    sequence = None
    if plan.compressed_tiles:
        sequence = compress_sequence(
            input_ids,
            plan,
            placeholder_id=placeholder,
            attention_mask=attention_mask != 0 if attention_mask is not None and len(input_ids) > 1 else None,
            position_ids=position_ids,
            padding_side=padding_side or ("left" if left else "right"),
            pad_token_id=pad_token_id,
            length=length,
        )
        input_ids, position_ids = sequence.input_ids, sequence.position_ids
        if attention_mask is not None:
            attention_mask = sequence.take(attention_mask)
        elif len(input_ids) > 1:
            attention_mask = sequence.attention_mask
        if inputs_embeds is not None:
            inputs_embeds = inputs_embeds.flatten(0, 1)[sequence.position.clamp_min(0)]
    if inputs_embeds is None:
        inputs_embeds = model.get_input_embeddings()(input_ids)
    merged = _merge(inputs_embeds, visual_tokens.to(inputs_embeds.device), input_ids == placeholder)
    return Encoded(input_ids, merged, attention_mask, position_ids, vit_tokens, visual_tokens, sequence)


def _merge(inputs_embeds: Tensor, visual_tokens: Tensor, is_visual: Tensor) -> Tensor:
    """inputs_embeds ``[B, L, H]`` with the rows where `is_visual` replaced by visual_tokens ``[T, H]``, in order."""
    rows = is_visual.numel()
    own = torch.arange(rows, device=is_visual.device)
    is_visual = is_visual.flatten()
    source = torch.where(is_visual, rows - 1 + is_visual.cumsum(0), own)
    return VF.merge_tokens(inputs_embeds.flatten(0, 1), visual_tokens, source).view_as(inputs_embeds)
