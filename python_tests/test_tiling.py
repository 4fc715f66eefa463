"""Tiles against transformers' own image processor for InternVL, and every kind of image file."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vico_ext.tiling import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    UnreadableImageError,
    choose_grid,
    open_image,
    tile_image,
)


def transformers_tiles(image: Image.Image, **options) -> torch.Tensor:
    module = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    processor = module.GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, crop_to_patches=True
    )
    return torch.as_tensor(np.stack(processor(image, return_tensors="np", **options)["pixel_values"]))


def photograph(name: str) -> Image.Image:
    data = pytest.importorskip("skimage.data")
    return Image.fromarray(getattr(data, name)())


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
@pytest.mark.parametrize("max_tiles", [1, 6, 12])
def test_same_pixels_as_transformers(name, max_tiles):
    image = photograph(name)
    want = transformers_tiles(image, max_patches=max_tiles)
    got = tile_image(image, max_tiles=max_tiles)
    assert got.pixel_values.shape == want.shape
    assert got.pixel_values.dtype == torch.float32
    assert got.pixel_values.is_contiguous()
    torch.testing.assert_close(got.pixel_values, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(300, 40), (40, 300), (640, 480), (1280, 1024), (1000, 999), (896, 448), (33, 100)])
def test_same_tiles_as_transformers_at_odd_sizes(size):
    image = photograph("coffee").resize(size)
    torch.testing.assert_close(tile_image(image).pixel_values, transformers_tiles(image), rtol=0, atol=2e-6)


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 4), st.integers(0, 20))
def test_same_grid_as_transformers(width, height, min_tiles, more):
    module = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    columns, rows = module.get_optimal_tiled_canvas((height, width), (448, 448), min_tiles, min_tiles + more)
    assert choose_grid(width, height, min_tiles=min_tiles, max_tiles=min_tiles + more) == (rows, columns)


def test_same_grid_over_a_sweep_of_aspect_ratios():
    module = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    for width in range(100, 2400, 17):
        for area in (50_000, 448 * 448, 3_000_000):
            height = max(1, area // width)
            columns, rows = module.get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
            assert choose_grid(width, height) == (rows, columns)


def test_ties_go_to_more_tiles_for_large_images_only():
    assert choose_grid(448, 448) == (1, 1)
    assert choose_grid(700, 700) == (2, 2)
    assert choose_grid(2000, 2000) == (3, 3)
    assert choose_grid(2000, 1000, max_tiles=8) == (2, 4)
    assert choose_grid(400, 200, max_tiles=8) == (1, 2)


def test_tiles_are_row_major_with_the_thumbnail_last():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (2, 3, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize((3 * 448, 2 * 448), Image.Resampling.NEAREST)
    tiled = tile_image(image, max_tiles=6)
    assert (tiled.grid, tiled.thumbnail, tiled.tiles, tiled.size) == ((2, 3), True, 7, (1344, 896))
    assert tiled.boxes[1] == (448.0, 0.0, 896.0, 448.0)
    assert tiled.boxes[3] == (0.0, 448.0, 448.0, 896.0)
    assert tiled.boxes[-1] == (0.0, 0.0, 1344.0, 896.0)
    centres = tiled.pixel_values[:6, :, 224, 224]
    want = (torch.tensor(colours).view(6, 3) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(centres, want, rtol=0, atol=1e-6)


def test_one_tile_has_no_thumbnail():
    tiled = tile_image(Image.new("RGB", (1, 1), "red"))
    assert (tiled.grid, tiled.thumbnail, tiled.tiles, tiled.boxes) == ((1, 1), False, 1, ((0.0, 0.0, 1.0, 1.0),))
    assert not tile_image(Image.new("RGB", (900, 450)), thumbnail=False).thumbnail


def test_other_tile_size():
    tiled = tile_image(Image.new("RGB", (500, 100)), tile_size=28)
    assert tiled.pixel_values.shape == (6, 3, 28, 28)


def _stored(image: Image.Image, format: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def test_exif_orientation():
    upright = photograph("chelsea").resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated a quarter turn
    file = _stored(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert np.array_equal(np.asarray(open_image(file)), np.asarray(upright))


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F", "PA"]
)
def test_every_mode(mode):
    gray = photograph("chelsea").resize((32, 24)).convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    elif mode == "PA":
        image = gray.convert("RGBA").quantize().convert("PA")
    else:
        image = (gray if mode in ("L", "I", "F") else gray.convert("RGB")).convert(mode)
    opened = open_image(image)
    assert (opened.mode, opened.size) == ("RGB", (32, 24))
    if mode in ("L", "RGB", "RGBA", "I", "I;16", "F", "CMYK"):
        assert np.abs(np.asarray(opened)[..., 0].astype(int) - np.asarray(gray)).max() <= 1


def test_sixteen_bit_files():
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    opened = np.asarray(open_image(_stored(Image.fromarray(values), "PNG")))
    assert np.abs(opened[..., 0].astype(float) - values / 257).max() <= 0.51


def test_floating_point_ranges():
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32))
    assert np.asarray(open_image(unit))[0, :, 0].tolist() == [0, 128, 255, 0]
    byte = Image.fromarray(np.array([[-4.0, 0.0, 100.4, 900.0]], dtype=np.float32))
    assert np.asarray(open_image(byte))[0, :, 0].tolist() == [0, 0, 100, 255]


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (200, 10, 10, 255))
    assert np.asarray(open_image(_stored(image, "PNG")))[0].tolist() == [[200, 10, 10], [255, 255, 255]]
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([200, 10, 10, 0, 0, 0])
    indexed.putpixel((1, 0), 1)
    for format in ("PNG", "GIF"):
        opened = open_image(_stored(indexed, format, transparency=1))
        assert np.asarray(opened)[0].tolist() == [[200, 10, 10], [255, 255, 255]]


def test_unreadable_files(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("not an image")
    for source in (text, str(text), open(text, "rb")):  # noqa: SIM115 (closed with the test)
        with pytest.raises(UnreadableImageError) as caught:
            tile_image(source)
        assert str(caught.value) == f"cannot read {text}: not an image format that Pillow knows"
    with pytest.raises(UnreadableImageError, match=r"cannot read .*missing.png: .*No such file"):
        tile_image(tmp_path / "missing.png")
    whole = _stored(photograph("chelsea"), "PNG").getvalue()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableImageError, match=r"cannot read .*cut.png: .*truncated"):
        tile_image(tmp_path / "cut.png")
    with pytest.raises(UnreadableImageError, match="cannot read the image: "):
        tile_image(io.BytesIO(b""))


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.new("1", (2000, 2000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match=r"cannot read .*bomb.png: .*decompression bomb"):
        tile_image(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=100)
@given(st.data())
def test_damaged_files_raise_one_error(data):
    format = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    whole = bytearray(_stored(Image.radial_gradient("L").resize((24, 24)), format).getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        opened = open_image(io.BytesIO(whole[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))]))
    except UnreadableImageError:
        return
    assert opened.mode == "RGB"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tiles": 3, "max_tiles": 2}, "got min_tiles=3, max_tiles=2"),
        ({"min_tiles": 0}, "got min_tiles=0, max_tiles=12"),
        ({"tile_size": 0}, "tile_size must be positive, got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        tile_image(Image.new("RGB", (10, 10)), **options)


def test_import_is_light_and_a_missing_pillow_is_explained(tmp_path):
    code = (
        "import sys, torch; sys.modules['PIL'] = None; before = set(sys.modules)\n"
        "import vico_ext, vico_ext.tiling\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not {'transformers', 'tqdm', 'PIL'} & new, new\n"
        "try: vico_ext.tiling.tile_image('x.png')\n"
        "except ModuleNotFoundError as e: print(e)"
    )
    # elsewhere than in the source folder, which has no compiled ops
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "needs Pillow, which is not installed: pip install 'vico_ext[cli]'" in result.stdout
