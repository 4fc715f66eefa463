"""Routing: from per-tile probabilities to a plan of which tiles are compressed and where their tokens go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vico_ext import reference

__all__ = ["RoutingPlan"]


@dataclass(frozen=True)
class RoutingPlan:
    """Which tiles are compressed, and where each tile's tokens go in the packed order.

    Attributes:
        compress: ``[P]`` bool, True where a tile gets the smaller number of tokens.
        cu_tokens: ``[P + 1]`` int64 offsets: tile t owns packed rows cu_tokens[t] .. cu_tokens[t + 1].
        order: ``[P]`` int64, the tiles that stay whole, ascending, then those that are compressed, ascending.
        compressed_tiles: how many tiles are compressed (K).
        tokens: visual tokens of a whole and of a compressed tile.
    """

    compress: Tensor
    cu_tokens: Tensor
    order: Tensor
    compressed_tiles: int
    tokens: tuple[int, int] = (256, 64)

    @classmethod
    def from_compress(cls, compress: Tensor, tokens: tuple[int, int] = (256, 64)) -> RoutingPlan:
        """The plan of a given decision; one host sync, for the number of compressed tiles."""
        cu_tokens, order = reference.plan_tokens(compress, *tokens)
        return cls(compress, cu_tokens, order, int(compress.sum()), tokens)

    @property
    def tiles(self) -> int:
        """Number of tiles P."""
        return self.compress.shape[0]

    @property
    def full_tiles(self) -> int:
        """Number of tiles that stay whole."""
        return self.tiles - self.compressed_tiles

    @property
    def total_tokens(self) -> int:
        """Number of packed visual tokens T."""
        return self.full_tiles * self.tokens[0] + self.compressed_tiles * self.tokens[1]
