"""Stage 1: the policy at random rates per tile learns to answer as the reference does with every tile whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vico_ext.routing import RoutingPlan
from vico_ext.training.batches import MicroBatch
from vico_ext.training.forward import Reference, answer_hidden, vision_features, visual_tokens
from vico_ext.training.losses import answer_divergence
from vico_ext.training.models import tokens_per_tile
from vico_ext.training.options import ConsistencyOptions

__all__ = ["ConsistencyModule", "ConsistencyStage", "draw_rates"]


def draw_rates(batch: MicroBatch, share: float, per: str) -> Tensor:
    """Which tiles are compressed ``[P]`` bool: each tile, or each image, with probability ``share``.

    Follows from the items' seeds alone, so a tile draws the same however items are spread over micro-batches.
    """
    flags: list[Tensor] = []
    for seed, images in zip(batch.seeds, batch.images_of_item, strict=True):
        chance = torch.Generator().manual_seed(seed)
        number = sum(images) if per == "tile" else len(images)
        drawn = torch.rand(number, generator=chance, device="cpu") < share
        flags.append(drawn if per == "tile" else drawn.repeat_interleave(torch.tensor(images, device="cpu")))
    return torch.cat(flags).to(batch.pixel_values.device)


class ConsistencyModule(nn.Module):
    """Policy and reference, so that one forward does a micro-batch (data parallel wrappers need it to).

    Args:
        policy: a patched model; its parameters' ``requires_grad`` say what trains.
        reference: the frozen model.
        options: of the stage.
    """

    def __init__(self, policy: Any, reference: Reference, options: ConsistencyOptions) -> None:
        super().__init__()
        self.policy, self.reference, self.options = policy, reference, options
        self._no_split_modules = getattr(policy, "_no_split_modules", None)  # FSDP wraps these by themselves
        self.tower_trains = any(p.requires_grad for p in policy.model.vision_tower.parameters())

    def train(self, mode: bool = True) -> ConsistencyModule:
        """Training mode for the policy; what is frozen stays in evaluation mode."""
        super().train(mode)
        self.reference.eval()
        if not self.tower_trains:
            self.policy.model.vision_tower.eval()
        return self

    def forward(self, batch: MicroBatch, scale: float = 1.0, phase: str = "loss") -> dict[str, Tensor]:
        """The divergence of a micro-batch's answers, or with phase "reference" the reference's hidden states.

        Args:
            batch: B rows with N answer tokens.
            scale: factor of the loss.
            phase: "loss" or "reference".

        Returns:
            ``loss``, the sum over rows of each one's mean over its answer tokens, or over all answer tokens, times
            ``scale``; ``tokens`` [N], each token's part of it, without gradient; ``kept`` and ``whole``, visual tokens
            with and without compression. Or ``hidden`` [N, H].
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.tower_trains):
            vit_tokens = vision_features(self.policy.model.vision_tower, batch.pixel_values)
        hidden = batch.reference_hidden
        if hidden is None:
            hidden = self.reference.hidden(batch, vit_tokens)
        if phase == "reference":
            return {"hidden": hidden}
        config, tokens = self.policy.config, tokens_per_tile(self.policy.config)
        compress = draw_rates(batch, self.options.compress_share, self.options.rate_per)
        plan = RoutingPlan.from_compress(compress, tokens)
        visual = visual_tokens(self.policy, vit_tokens, plan)
        given = (plan, batch.input_ids, batch.attention_mask, batch.predict, config.image_token_id)
        own = answer_hidden(self.policy.model.language_model, visual, *given)
        counts = batch.answer_tokens
        share = counts if self.options.average_over == "sample" else torch.ones_like(counts)
        loss, parts = answer_divergence(
            hidden,
            self.reference.head,
            own,
            self.policy.lm_head,
            weights=(scale / share).repeat_interleave(counts),
            divergence=self.options.divergence,
            temperature=self.options.temperature,
        )
        kept = torch.tensor(float(plan.total_tokens), device=loss.device)
        return {"loss": loss, "tokens": parts, "kept": kept, "whole": torch.full_like(kept, plan.tiles * tokens[0])}


class ConsistencyStage:
    """What the trainer needs to know about stage 1.

    Attributes:
        module: what is trained.
    """

    name = "consistency"
    figures = ("visual_tokens", "visual_tokens_whole")

    def __init__(self, module: ConsistencyModule, options: ConsistencyOptions) -> None:
        self.module, self.options = module, options

    def prepare(self, module: nn.Module, batches: Sequence[MicroBatch], gather: Callable[[Tensor], Tensor]) -> Any:
        """Micro-batches as :meth:`loss` takes them, figures to log, and problems."""
        return list(batches), {}, []

    def count(self, batch: MicroBatch) -> int:
        """How many terms of the step's mean a micro-batch has."""
        if batch.blank:
            return 0
        return int(batch.answer_tokens.sum()) if self.options.average_over == "token" else batch.rows

    def loss(
        self, module: nn.Module, batch: MicroBatch, scale: float
    ) -> tuple[Tensor, dict[str, Tensor], Callable[[], list[int]]]:
        """The sum of a micro-batch's terms times ``scale``, sums to log, and which lines' terms are not finite."""
        out = module(batch, scale)

        def bad_lines() -> list[int]:
            rows = torch.arange(batch.rows, device="cpu").repeat_interleave(batch.answer_tokens.cpu())
            return sorted({batch.lines[int(row)] for row in rows[~out["tokens"].isfinite().cpu()]})

        figures = {} if batch.blank else {"visual_tokens": out["kept"], "visual_tokens_whole": out["whole"]}
        return out["loss"], figures, bad_lines

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint needs beside weights and optimizer."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes them back."""
