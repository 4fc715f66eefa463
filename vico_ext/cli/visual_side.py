"""An InternVL's visual side from a checkpoint, without its language model: what a patched model runs, timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import vico_ext
from vico_ext.checkpoint import CheckpointFiles
from vico_ext.checkpoint.vision import load_vision_tower
from vico_ext.cli.errors import CliError
from vico_ext.integrations.internvl_visual import VicoParts, check_flash
from vico_ext.routing import RoutingPlan, RoutingPolicy

if TYPE_CHECKING:
    from transformers import InternVLVisionModel

    from vico_ext.tiling import TiledImage

__all__ = ["Routed", "VisualSide", "stage"]

Milliseconds = dict[str, float]


@contextmanager
def stage(times: Milliseconds, name: str) -> Iterator[None]:
    """Adds the time of a block to times[name]."""
    start = time.perf_counter()
    yield
    times[name] = times.get(name, 0.0) + (time.perf_counter() - start) * 1e3


@dataclass(frozen=True)
class Routed:
    """What became of the images of one call, tiles in order.

    Attributes:
        p: ``[P]`` float64, probability that 64 tokens are enough.
        plan: which tiles are compressed, where each tile's tokens are.
        tokens: ``[T, H]`` packed visual tokens.
        times: milliseconds per stage.
    """

    p: Tensor
    plan: RoutingPlan
    tokens: Tensor
    times: Milliseconds = field(default_factory=dict)


@dataclass(frozen=True)
class VisualSide:
    """ViT, router and connectors of one checkpoint: the parts of a model that :func:`vico_ext.patch_internvl` makes.

    Attributes:
        weights: its Flash tensors.
        parts: router and 64-token connector.
        projector: the 256-token connector.
        tile_size: side of a tile in pixels, as the ViT wants it.
        dtype: in which everything is computed.
    """

    path: Path
    weights: vico_ext.FlashWeights
    tower: InternVLVisionModel
    parts: VicoParts
    projector: nn.Module
    tile_size: int
    dtype: torch.dtype

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype | None = None) -> VisualSide:
        """Reads just these parts of a checkpoint folder; dtype None keeps the checkpoint's."""
        weights = vico_ext.load_flash(path)
        check_flash(weights)
        tower = load_vision_tower(path, dtype)
        height, width = tower.embeddings.patch_embeddings.image_size
        if height != width:
            raise CliError(f"{path}: tiles must be square, config.json says {height} x {width} pixels")
        dtype = dtype or tower.dtype
        connector, router = weights.connector_module(dtype), weights.router_module(dtype)
        config = SimpleNamespace(
            vision_config=tower.config, text_config=SimpleNamespace(hidden_size=weights.llm_hidden)
        )
        parts = VicoParts(connector.mlp2, router, vico_ext.ThresholdPolicy(), config).eval()
        return cls(path, weights, tower, parts, connector.mlp1, int(width), dtype)

    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return CheckpointFiles(self.path).config()

    def describe(self) -> dict[str, Any]:
        """Facts for a report."""
        return {
            "path": str(self.path),
            "vit_hidden": self.weights.vit_hidden,
            "vit_layers": self.tower.config.num_hidden_layers,
            "llm_hidden": self.weights.llm_hidden,
            "tile_size": self.tile_size,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def vit_tokens(self, pixel_values: Tensor, batch_tiles: int) -> Tensor:
        """The ViT's last hidden state [P, 1 + N, V] of tiles [P, 3, S, S]."""
        batches = pixel_values.to(self.dtype).split(batch_tiles)
        return torch.cat([self.tower(pixel_values=batch).last_hidden_state for batch in batches])

    @torch.no_grad()
    def route(
        self,
        vit_tokens: Tensor,
        policy: RoutingPolicy,
        tiles_per_image: Sequence[int],
        times: Milliseconds | None = None,
    ) -> Routed:
        """What follows the ViT, for the tiles of one call [P, 1 + N, V]."""
        times = {} if times is None else times
        with stage(times, "router"):
            self.parts.policy = policy
            padding = [0] * (len(vit_tokens) - len(tiles_per_image))
            compress = self.parts.decide(vit_tokens, torch.tensor([*tiles_per_image, *padding]))
        with stage(times, "plan"):
            plan = RoutingPlan.from_compress(compress, self.parts.tokens)
        with stage(times, "connector"):
            tokens = self.parts.connect(vit_tokens, plan, self.projector)
        assert self.parts.last is not None
        return Routed(self.parts.last.p.double(), plan, tokens, times)

    def run(self, images: Sequence[TiledImage], policy: RoutingPolicy, batch_tiles: int = 8) -> Routed:
        """Routes the images together, as one call."""
        times: Milliseconds = {}
        with stage(times, "vit"):
            vit_tokens = self.vit_tokens(torch.cat([image.pixel_values for image in images]), batch_tiles)
        return self.route(vit_tokens, policy, [image.tiles for image in images], times)
