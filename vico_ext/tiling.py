"""InternVL's dynamic resolution: an image becomes a grid of square tiles and a thumbnail.

Source: the image pre-processing that InternVL 1.5 to 3.5 publish with their checkpoints; the same rule is in
transformers' image processor for InternVL. Needs Pillow (``pip install 'vico_ext[cli]'``), imported on first use.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "TiledImage",
    "UnreadableImageError",
    "choose_grid",
    "open_image",
    "tile_image",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Box = tuple[float, float, float, float]


class UnreadableImageError(ValueError):
    """A file that is no image, is damaged, or is too large to decode safely; the message names it and says why."""


@dataclass(frozen=True)
class TiledImage:
    """The tiles of one image, in the order the model sees them: the grid row by row, then the thumbnail.

    Attributes:
        pixel_values: ``[P, 3, S, S]`` float32, normalised.
        grid: rows and columns of the grid.
        thumbnail: whether the last tile is the whole image at tile size.
        boxes: left, top, right, bottom of each tile in pixels of the upright image; the thumbnail's is the whole image.
        size: width and height of the upright image.
    """

    pixel_values: Tensor
    grid: tuple[int, int]
    thumbnail: bool
    boxes: tuple[Box, ...]
    size: tuple[int, int]

    @property
    def tiles(self) -> int:
        """Number of tiles P, thumbnail included."""
        return self.pixel_values.shape[0]


def choose_grid(
    width: int, height: int, *, tile_size: int = 448, min_tiles: int = 1, max_tiles: int = 12
) -> tuple[int, int]:
    """Rows and columns of the grid whose aspect ratio is nearest to width / height.

    Among grids i x j (columns x rows) with min_tiles <= i j <= max_tiles, taken by growing i j, the nearest i / j wins;
    of equally near ones a later one wins only if the image has more than half the pixels of its tiles, so that small
    images are not blown up.

    Raises:
        ValueError: a size is not positive, or max_tiles < min_tiles.
    """
    if width < 1 or height < 1:
        raise ValueError(f"width and height must be positive, got {width} x {height}")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"1 <= min_tiles <= max_tiles must hold, got min_tiles={min_tiles}, max_tiles={max_tiles}")
    if tile_size < 1:
        raise ValueError(f"tile_size must be positive, got {tile_size}")
    candidates = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    ratio = width / height
    best, nearest = (1, 1), float("inf")
    for columns, rows in sorted(candidates, key=lambda grid: grid[0] * grid[1]):
        distance = abs(ratio - columns / rows)
        large_enough = width * height > 0.5 * tile_size * tile_size * columns * rows
        if distance < nearest or (distance == nearest and large_enough):
            best, nearest = (rows, columns), distance
    return best


def open_image(source: str | os.PathLike[str] | IO[bytes] | Image.Image) -> Image.Image:
    """An upright RGB image with 8 bits per channel, fully decoded.

    EXIF orientation is applied. 16-bit and floating-point images are scaled down to 8 bits (floating-point ones hold
    0 to 1, or else 0 to 255). Transparent pixels are laid over white, as a viewer shows them: without that, text on a
    transparent page may turn into black on black. Opaque 8-bit images are as InternVL's own processing gives them.

    Raises:
        UnreadableImageError: not an image, damaged, or so large that Pillow suspects a decompression bomb.
        ModuleNotFoundError: Pillow is not installed.
    """
    Image, ImageOps = _pillow()
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
    else:
        name = getattr(source, "filename", None) or getattr(source, "name", None) or "the image"
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image = _to_rgb(ImageOps.exif_transpose(image))
        if not image.width or not image.height:
            raise ValueError("it has no pixels")
        return image
    except Exception as error:  # damage shows as any of a dozen kinds, from SyntaxError to struct.error
        reason = "not an image format that Pillow knows" if type(error).__name__ == "UnidentifiedImageError" else error
        raise UnreadableImageError(f"cannot read {name}: {reason or type(error).__name__}") from error


def tile_image(
    image: str | os.PathLike[str] | IO[bytes] | Image.Image,
    *,
    tile_size: int = 448,
    min_tiles: int = 1,
    max_tiles: int = 12,
    thumbnail: bool = True,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> TiledImage:
    """Cuts an image into tiles as InternVL does: nearest grid, bicubic resize to it, thumbnail after several tiles.

    Args:
        image: a path, an open binary file, or a Pillow image; read by :func:`open_image`.
        tile_size: side S of a tile in pixels.
        min_tiles: fewest tiles of the grid.
        max_tiles: most tiles of the grid; the thumbnail comes on top.
        thumbnail: whether the whole image follows as one more tile where the grid has more than one.
        mean: per channel, subtracted from values in [0, 1].
        std: per channel, divided by.

    Raises:
        UnreadableImageError: the image cannot be read.
        ValueError: a size is not positive, or max_tiles < min_tiles.
    """
    picture = open_image(image)
    rows, columns = choose_grid(*picture.size, tile_size=tile_size, min_tiles=min_tiles, max_tiles=max_tiles)
    pixels = _resized(picture, columns * tile_size, rows * tile_size)
    tiles = pixels.reshape(rows, tile_size, columns, tile_size, 3).swapaxes(1, 2).reshape(-1, tile_size, tile_size, 3)
    boxes = [_box(picture.size, (rows, columns), row, column) for row in range(rows) for column in range(columns)]
    with_thumbnail = thumbnail and len(tiles) > 1
    if with_thumbnail:
        tiles = np.concatenate([tiles, _resized(picture, tile_size, tile_size)[None]])
        boxes.append((0.0, 0.0, float(picture.width), float(picture.height)))
    values = torch.tensor(tiles).permute(0, 3, 1, 2).float().div_(255)
    values = values.sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1)).contiguous()
    return TiledImage(values, (rows, columns), with_thumbnail, tuple(boxes), picture.size)


def _pillow():  # type: ignore[no-untyped-def]  # two modules of an optional dependency
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "vico_ext.tiling needs Pillow, which is not installed: pip install 'vico_ext[cli]'", name="PIL"
        ) from error
    return Image, ImageOps


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = _pillow()[0].new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    # load() first: convert() of an image that is RGB already is a copy that may stay undecoded.
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grayscale of more than 8 bits, scaled by its format's range."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0)
    top = float(values.max(initial=0.0))
    if image.mode.startswith("I"):
        scale = 255 / 65535 if image.mode.startswith("I;16") or top > 255 else 1.0
    else:
        scale = 255.0 if top <= 1 else 1.0
    return _pillow()[0].fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))


def _resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    """[height, width, 3] uint8."""
    return np.asarray(image.resize((width, height), resample=_pillow()[0].Resampling.BICUBIC))


def _box(size: tuple[int, int], grid: tuple[int, int], row: int, column: int) -> Box:
    (width, height), (rows, columns) = size, grid
    return (
        column * width / columns,
        row * height / rows,
        (column + 1) * width / columns,
        (row + 1) * height / rows,
    )
