"""Pictures of a routing decision: what is drawn is what was decided."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vico_ext.visualize import route_picture


def test_pictures_are_tinted_by_rate_and_probability():
    white = Image.new("RGB", (400, 100), "white")
    picture = route_picture(white, (1, 4), [0.9, 0.6, 0.4, 0.1], [True, True, False, False], thumbnail=False)
    row = np.asarray(picture).astype(int)[64 + 200 : 64 + 280, 28 : 28 + 4 * 288]  # below the labels
    sure, unsure, barely, firmly = (np.median(cell, axis=(0, 1)) for cell in np.split(row, 4, axis=1))
    assert sure[0] > sure[2]  # orange
    assert firmly[2] > firmly[0]  # blue
    assert sure.sum() < unsure.sum()
    assert firmly.sum() < barely.sum()


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (30, 20)])
@pytest.mark.parametrize("thumbnail", [False, True])
def test_pictures_of_any_size_stay_within_reason(size, thumbnail):
    tiles = 12 + thumbnail
    grid = (12, 1) if size[0] < size[1] else (1, 12)
    image = Image.new("RGB", size)
    options = {"thumbnail": thumbnail, "title": "x" * 300, "policy": "p" * 200, "note": "many words " * 9}
    picture = route_picture(image, grid, [0.5] * tiles, [True] * tiles, **options)
    assert max(picture.size) < 2000


@pytest.mark.parametrize(("side", "blurred"), [(32, False), (400, True)])
def test_tiny_images_show_their_pixels(side, blurred):
    """Two colours stay two where pixels are large; else the edge between them is smooth."""
    image = Image.new("RGB", (side, side), "black")
    image.paste("white", (side * 13 // 32, 0, side, side))
    picture = route_picture(image, (1, 1), [0.5], [False], thumbnail=False)
    across = np.asarray(picture.convert("L"))[64 + 740, 28 + 362 : 28 + 410]  # between two lines of the lattice
    assert len(np.unique(across)) > 1
    assert (len(np.unique(across)) > 2) == blurred


def test_pictures_need_an_entry_per_tile():
    with pytest.raises(ValueError, match=r"must have 3 entries for grid \(1, 2\), got 2 and 3"):
        route_picture(Image.new("RGB", (2, 1)), (1, 2), [0.5] * 2, [True] * 3, thumbnail=True)
