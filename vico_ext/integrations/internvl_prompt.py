"""Where the visual tokens of a batch stand: the placeholders of each tile and image, checked, without a host sync.

B rows, L positions, P tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vico_ext import functional as VF
from vico_ext.routing import RoutingPolicy

__all__ = ["Placeholders"]


@dataclass(frozen=True, eq=False)
class Placeholders:
    """The placeholders of a batch of prompts; all tensors stay on the device of the prompts.

    Attributes:
        rows: B.
        length: L.
        tiles: P.
        tokens: visual tokens of a whole and of a compressed tile.
        visual: ``[B, L]`` bool, where a placeholder is that is not padding.
        present: ``[B, L]`` bool, what is not padding at either end of its row.
        tile: ``[B, L]`` int64, the tile that a placeholder belongs to; anything elsewhere, within range.
        within: ``[B, L]`` int64, the placeholder's number within its tile; anything elsewhere.
        tiles_per_image: ``[P]`` int64: an image is a run of placeholders; zeros behind them where there are fewer.
        matches: 0-d bool: each of the P tiles has its placeholders, consecutive and in one row.
    """

    rows: int
    length: int
    tiles: int
    tokens: tuple[int, int]
    visual: Tensor
    present: Tensor
    tile: Tensor
    within: Tensor
    tiles_per_image: Tensor
    matches: Tensor

    @classmethod
    def find(
        cls, input_ids: Tensor, mask: Tensor | None, placeholder: int, tiles: int, tokens: tuple[int, int]
    ) -> Placeholders:
        """Looks for them.

        Args:
            input_ids: ``[B, L]``.
            mask: ``[B, L]``, zeros at either end of a row are padding; or None.
            placeholder: the id of a visual token's place.
            tiles: P, at least 1.
            tokens: visual tokens of a whole and of a compressed tile.
        """
        rows, length = input_ids.shape
        full = tokens[0]
        present = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else _between_ends(mask != 0)
        visual = (input_ids == placeholder) & present
        number = visual.flatten().cumsum(0).view_as(visual) - 1
        within = number.remainder(full)
        begins = visual & ~F.pad(visual[:, :-1], (1, 0))  # of a run
        matches = (visual.sum() == tiles * full) & ~(begins & (within != 0)).any()
        image = torch.where(visual, begins.flatten().cumsum(0).view_as(visual) - 1, tiles).clamp(0, tiles).flatten()
        counts = torch.zeros(tiles + 1, dtype=torch.int64, device=input_ids.device)
        counts = counts.scatter_add_(0, image, torch.ones_like(image))[:tiles] // full
        # Where they do not match, policies get one image of all tiles, which they can handle until the error is raised.
        one_image = F.pad(torch.full((1,), tiles, device=input_ids.device), (0, tiles - 1))
        images = torch.where(matches, counts, one_image)
        tile = (number // full).clamp(0, tiles - 1)
        return cls(rows, length, tiles, tokens, visual, present, tile, within, images, matches)

    def known_length(self, policy: RoutingPolicy) -> int | None:
        """L' where it does not depend on which tiles are compressed: one row, and a policy that fixes their number."""
        count = policy.compressed_tiles(self.tiles, self.tokens) if self.rows == 1 else None
        return None if count is None else self.length - count * (self.tokens[0] - self.tokens[1])

    def check_on_device(self, input_ids: Tensor, mask: Tensor | None, placeholder: int) -> None:
        """Raises a ValueError where they do not match; on an accelerator the kernel traps: nobody waits for it."""
        none = torch.zeros(self.tiles, dtype=torch.bool, device=input_ids.device)
        try:
            VF.keep_placeholders(
                input_ids,
                none,
                placeholder_id=placeholder,
                attention_mask=None if mask is None else mask != 0,
                full_tokens=self.tokens[0],
                compressed_tokens=self.tokens[1],
            )
        except RuntimeError as error:
            raise self._mismatch() from error

    def sizes(self, compress: Tensor, policy: RoutingPolicy, mask: Tensor | None) -> tuple[int, int, bool]:
        """The number of compressed tiles, L', and whether the batch is padded on the left: one host sync, or none.

        Args:
            compress: ``[P]`` bool.
            policy: that decided.
            mask: ``[B, L]``, or None.

        Raises:
            ValueError: tiles and placeholders do not match.
        """
        length = self.known_length(policy)
        if length is not None:
            return (self.length - length) // (self.tokens[0] - self.tokens[1]), length, False
        if self.rows == 1:
            longest = self.length - compress.sum() * (self.tokens[0] - self.tokens[1])
        else:
            dropped = self.visual & compress[self.tile] & (self.within >= self.tokens[1])
            longest = (self.present & ~dropped).sum(1).max()
        left = torch.zeros_like(longest) if mask is None else (mask[:, 0] == 0).any()
        # ---- the host sync ----
        matches, count, new_length, is_left = torch.stack([self.matches, compress.sum(), longest, left]).tolist()
        if not matches:
            raise self._mismatch()
        return count, new_length, bool(is_left)

    def _mismatch(self) -> ValueError:
        return ValueError(
            f"images and prompt do not match: pixel_values hold {self.tiles} tiles, each of which needs "
            f"{self.tokens[0]} consecutive placeholders (image_token_id) in one row. Pass ids and pixel values of one "
            "processor call, uncompressed; with a filled cache only the tiles of what is new. (The prompts have "
            f"{int(self.visual.sum())} placeholders.)"
        )


def _between_ends(mask: Tensor) -> Tensor:
    """mask ``[B, L]`` bool with the zeros between a row's first and last one filled."""
    seen = mask.cumsum(1)
    return (seen > 0) & (seen - mask.long() < seen[:, -1:])
