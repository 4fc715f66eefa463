"""A picture of what the pages are made of: ``python -m reproduce.sample out.png``."""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

from reproduce.bank import FAMILIES, STYLES, render_tile
from reproduce.drawing import SIDE

__all__ = ["sheet"]


def sheet(split: str, pages: int = 6, seed: int = 0, zoom: int = 2) -> Image.Image:
    """A row of pages per family, four tiles each."""
    gap = 4
    page = 2 * SIDE + gap
    canvas = np.full((page * len(FAMILIES), page * pages, 3), 128, np.uint8)
    for row, family in enumerate(FAMILIES):
        for column in range(pages):
            for place in range(4):
                tile = render_tile(split, family, column % STYLES, 10_000 + 4 * column + place, seed)
                top, left = row * page + place // 2 * SIDE, column * page + place % 2 * SIDE
                canvas[top : top + SIDE, left : left + SIDE] = np.asarray(tile.image)
    image = Image.fromarray(canvas)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


if __name__ == "__main__":
    sheet(sys.argv[2] if len(sys.argv) > 2 else "train").save(sys.argv[1])
