"""Stage 2: the router learns which tiles lose little at the smaller number of tokens; nothing else trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vico_ext import functional as VF
from vico_ext.routing import RoutingPlan
from vico_ext.training.batches import MicroBatch
from vico_ext.training.consistency import draw_rates
from vico_ext.training.forward import Reference, answer_hidden, both_rates, evaluating, vision_features
from vico_ext.training.losses import answer_divergence, row_means
from vico_ext.training.models import tokens_per_tile
from vico_ext.training.options import RouterOptions
from vico_ext.training.records import Problem

__all__ = ["RatioWindow", "RouterModule", "RouterStage"]

COMPRESS, KEEP = 0, 1  # the gate's classes
UNKNOWN = -1  # a tile whose loss ratio is not finite


class RatioWindow:
    """The last loss ratios, and their k-th percentile tau.

    Args:
        size: how many are kept.
        percentile: k, from 0 to 100.
    """

    def __init__(self, size: int, percentile: float) -> None:
        self.size, self.percentile = size, percentile
        self.ratios = torch.empty(0, dtype=torch.float64, device="cpu")

    def add(self, ratios: Tensor) -> None:
        """Takes in new ratios, oldest first; those that are not finite are left out."""
        finite = ratios[ratios.isfinite()].double().cpu()
        self.ratios = torch.cat([self.ratios, finite])[-self.size :]

    @property
    def tau(self) -> float:
        """The percentile; NaN while the window is empty."""
        if not len(self.ratios):
            return float("nan")
        ordered = self.ratios.sort().values  # torch.quantile takes no more than 16 million
        place = self.percentile / 100 * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return float(torch.lerp(ordered[low], ordered[high], place - low))


@dataclass(frozen=True)
class _Sequence:
    """One conversation under one routing: a row, its tiles in the batch, and which of those are compressed."""

    row: int
    tiles: range
    compress: Tensor


class RouterModule(nn.Module):
    """Policy, reference and router in one forward.

    Args:
        policy: a patched model after stage 1.
        reference: the model that the loss is taken to.
        options: of the stage.
    """

    def __init__(self, policy: Any, reference: Reference, options: RouterOptions) -> None:
        super().__init__()
        self.policy, self.reference, self.options = policy, reference, options
        self._no_split_modules = getattr(policy, "_no_split_modules", None)
        self.router.dropout = options.dropout

    @property
    def router(self) -> Any:
        """The part that trains."""
        return self.policy.model.vico.router

    def train(self, mode: bool = True) -> RouterModule:
        """Training mode for the router alone."""
        super().train(False)
        self.training = mode
        self.router.train(mode)
        return self

    def forward(self, batch: MicroBatch, scale: float = 1.0, phase: str = "loss") -> dict[str, Tensor]:
        """The cross-entropy of the tiles, or with phase "ratios" what its labels are made from.

        Returns:
            ``loss``, the sum over the tiles that have a label, times ``scale``; ``tiles`` [P], each tile's part of it,
            without gradient; ``right``, how many the router would have decided so. Or ``vit_tokens`` [P, 1 + N, V] and
            ``ratios`` [P].
        """
        if phase == "ratios":
            with torch.no_grad():
                vit_tokens = vision_features(self.policy.model.vision_tower, batch.pixel_values)
                return {"vit_tokens": vit_tokens, "ratios": self._ratios(batch, vit_tokens)}
        assert batch.vit_tokens is not None
        assert batch.labels is not None
        logits = self.router.logits(batch.vit_tokens)
        tiles = F.cross_entropy(logits.float(), batch.labels, ignore_index=UNKNOWN, reduction="none") * scale
        right = (logits.argmax(-1) == batch.labels).sum()
        return {"loss": tiles.sum(), "tiles": tiles.detach(), "right": right}

    def _ratios(self, batch: MicroBatch, vit_tokens: Tensor) -> Tensor:
        """r_t = (L(y | tile t at 1/16) + eps) / (L(y | tile t at 1/4) + eps), the other tiles as configured. [P]"""
        tiles = batch.tiles_of_item
        base = self._others(batch, vit_tokens).cpu()
        sequences: list[_Sequence] = []
        for item, own in enumerate(tiles):
            rows = [row for row, of in enumerate(batch.item_of_row) if of == item]
            for flipped in (None, *range(len(own))):
                compress = base[own.start : own.stop].clone()
                if flipped is not None:
                    compress[flipped] = ~compress[flipped]
                sequences += [_Sequence(row, own, compress) for row in rows]
        # Several conversations about an image count the same, whatever the length of their answers.
        losses = self._losses(batch, vit_tokens, sequences)
        ratios, start = [], 0
        for item, own in enumerate(tiles):
            rows_of_item = batch.item_of_row.count(item)
            count = (1 + len(own)) * rows_of_item
            loss = losses[start : start + count].view(1 + len(own), rows_of_item).mean(1) + self.options.epsilon
            start += count
            was_compressed = base[own.start : own.stop].to(loss.device)
            ratios.append(torch.where(was_compressed, loss[0] / loss[1:], loss[1:] / loss[0]))
        return torch.cat(ratios)

    def _others(self, batch: MicroBatch, vit_tokens: Tensor) -> Tensor:
        """The routing that single tiles are flipped in. [P] bool"""
        if self.options.others == "random":
            return draw_rates(batch, self.options.compress_share, "tile")
        if self.options.others == "full":
            return torch.zeros(len(vit_tokens), dtype=torch.bool, device=vit_tokens.device)
        with evaluating(self.router):
            return self.router(vit_tokens) >= 0.5

    def _losses(self, batch: MicroBatch, vit_tokens: Tensor, sequences: list[_Sequence]) -> Tensor:
        """The stage-1 loss of each sequence ``[S]``; the reference runs once per row, the connectors once per tile."""
        config, device = self.policy.config, batch.input_ids.device
        per_tile = tokens_per_tile(config)
        whole, small = both_rates(self.policy, vit_tokens)
        counts = batch.answer_tokens.tolist()
        reference = self.reference.hidden(batch, vit_tokens).split(counts)
        losses = []
        for start in range(0, len(sequences), self.options.flip_batch):
            chunk = sequences[start : start + self.options.flip_batch]
            rows = torch.tensor([one.row for one in chunk], device=device)
            compress = torch.cat([one.compress for one in chunk])
            tile = torch.tensor([t for one in chunk for t in one.tiles], device=device)
            plan = RoutingPlan.from_compress(compress.to(device), per_tile, compressed_tiles=int(compress.sum()))
            first, rest = tile[plan.order[: plan.full_tiles]], tile[plan.order[plan.full_tiles :]]
            visual = VF.pack_tokens(whole[first], small[rest].to(whole.dtype), plan)
            given = (plan, batch.input_ids[rows], batch.attention_mask[rows], batch.predict[rows])
            hidden = answer_hidden(self.policy.model.language_model, visual, *given, config.image_token_id)
            target = torch.cat([reference[one.row] for one in chunk])
            _, loss = answer_divergence(target, self.reference.head, hidden, self.policy.lm_head)
            losses.append(row_means(loss, batch.answer_tokens[rows]))
        return torch.cat(losses)


class RouterStage:
    """What the trainer needs to know about stage 2.

    Attributes:
        module: what is trained.
        window: of loss ratios, the same in every process.
    """

    name = "router"
    figures = ("tiles_right",)

    def __init__(self, module: RouterModule, options: RouterOptions) -> None:
        self.module, self.options = module, options
        self.window = RatioWindow(options.window, options.percentile)

    def prepare(
        self, module: nn.Module, batches: Sequence[MicroBatch], gather: Callable[[Tensor], Tensor]
    ) -> tuple[list[MicroBatch], dict[str, float | None], list[Problem]]:
        """Ratios of all tiles of the step, over all processes, into the window; then labels by tau."""
        outs = [module(batch, phase="ratios") for batch in batches]
        own = [out["ratios"].double() for out, batch in zip(outs, batches, strict=True) if not batch.blank]
        nothing = torch.empty(0, dtype=torch.float64, device=batches[0].pixel_values.device)
        everyone = gather(torch.cat([nothing, *own]))
        self.window.add(everyone)
        tau = self.window.tau
        made, problems = [], []
        for out, batch in zip(outs, batches, strict=True):
            ratios = out["ratios"]
            labels = torch.where(ratios < tau, COMPRESS, KEEP).masked_fill(~ratios.isfinite(), UNKNOWN)
            made.append(replace(batch, vit_tokens=out["vit_tokens"], labels=labels))
            lines = _lines_of_tiles(batch, ~ratios.isfinite())
            problems += [Problem("loss", line, "the loss ratio of a tile is not finite") for line in lines]
        finite = everyone[everyone.isfinite()]
        share = float((finite < tau).double().mean()) if len(finite) else 0.0
        figures = {"tau": None if math.isnan(tau) else tau, "share_labelled_compress": share}
        return made, {**figures, "window": len(self.window.ratios)}, problems

    def count(self, batch: MicroBatch) -> int:
        """How many terms of the step's mean a micro-batch has."""
        return 0 if batch.blank or batch.labels is None else int((batch.labels != UNKNOWN).sum())

    def loss(
        self, module: nn.Module, batch: MicroBatch, scale: float
    ) -> tuple[Tensor, dict[str, Tensor], Callable[[], list[int]]]:
        """The sum of a micro-batch's terms times ``scale``, sums to log, and which lines' terms are not finite."""
        if batch.blank:
            assert batch.labels is not None
            batch = replace(batch, labels=torch.full_like(batch.labels, UNKNOWN))
        out = module(batch, scale)
        return out["loss"], {"tiles_right": out["right"]}, lambda: _lines_of_tiles(batch, ~out["tiles"].isfinite())

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint needs beside weights and optimizer."""
        return {"router_window": self.window.ratios}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes them back."""
        self.window.ratios = state["router_window"]


def _lines_of_tiles(batch: MicroBatch, chosen: Tensor) -> list[int]:
    """Lines that the chosen tiles [P] belong to; none of a blank batch."""
    if batch.blank:
        return []
    items = {i for i, own in enumerate(batch.tiles_of_item) if chosen[own.start : own.stop].any()}
    return [line for line, item in zip(batch.lines, batch.item_of_row, strict=True) if item in items]
