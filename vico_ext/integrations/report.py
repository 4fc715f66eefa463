"""What routing did with the images of a call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["ImageReport", "LastCall", "VicoReport"]


@dataclass(frozen=True)
class ImageReport:
    """One image, or one frame of a video.

    Attributes:
        probabilities: of each tile, that the smaller number of tokens is enough.
        compressed: of each tile, whether it was compressed.
        tokens_before: visual tokens without routing.
        tokens_after: visual tokens that the language model got.
    """

    probabilities: tuple[float, ...]
    compressed: tuple[bool, ...]
    tokens_before: int
    tokens_after: int

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return len(self.compressed)


@dataclass(frozen=True)
class VicoReport:
    """All images of the last call that had images, in the order of its prompts.

    Attributes:
        images: one entry per image.
    """

    images: tuple[ImageReport, ...]

    @property
    def tiles(self) -> int:
        """Tiles of all images."""
        return sum(image.tiles for image in self.images)

    @property
    def compressed_tiles(self) -> int:
        """How many of them were compressed."""
        return sum(sum(image.compressed) for image in self.images)

    @property
    def compressed_share(self) -> float:
        """The same as a share; 0 without tiles."""
        return self.compressed_tiles / self.tiles if self.tiles else 0.0

    @property
    def tokens_before(self) -> int:
        """Visual tokens without routing."""
        return sum(image.tokens_before for image in self.images)

    @property
    def tokens_after(self) -> int:
        """Visual tokens that the language model got."""
        return sum(image.tokens_after for image in self.images)

    @property
    def tokens_saved(self) -> int:
        """The difference."""
        return self.tokens_before - self.tokens_after

    def __str__(self) -> str:
        return (
            f"{len(self.images)} images, {self.tiles} tiles, {self.compressed_tiles} compressed "
            f"({self.compressed_share:.0%}); visual tokens {self.tokens_before} -> {self.tokens_after}"
        )


@dataclass(frozen=True, eq=False)
class LastCall:
    """What a call leaves for the report: tensors where they were, so that keeping them costs no host sync.

    Attributes:
        p: ``[P]``.
        compress: ``[P]`` bool.
        tiles_per_image: ``[P]`` int64, in the first entries; the rest are 0.
        tokens: of a whole and of a compressed tile.
    """

    p: Tensor
    compress: Tensor
    tiles_per_image: Tensor
    tokens: tuple[int, int]

    def report(self) -> VicoReport:
        """The numbers, on the host."""
        p, compress = self.p.tolist(), self.compress.tolist()
        images, start = [], 0
        for tiles in filter(None, self.tiles_per_image.tolist()):
            own = slice(start, start + tiles)
            start += tiles
            after = sum(self.tokens[compressed] for compressed in compress[own])
            images.append(ImageReport(tuple(p[own]), tuple(compress[own]), tiles * self.tokens[0], after))
        return VicoReport(tuple(images))
