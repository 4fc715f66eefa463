"""Images for the demo: photographs that come with scikit-image and scikit-learn, a dense page, a sparse slide."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageFont

__all__ = ["write_inputs"]

_PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")
_SKLEARN = ("china.jpg", "flower.jpg")

_PARAGRAPHS = (
    "Section {n}. The lessee shall keep the premises, its fixtures and all appurtenances in good order, and shall give "
    "written notice of any defect within {a} days of its discovery. Failing such notice, repairs that the lessor "
    "undertakes are charged at cost plus {b} per cent.",
    "({n}.1) Sums due under the foregoing are payable on the {c}th day of the month, without deduction or set-off, to "
    "the account named in Schedule {d}; interest accrues daily at {b}.{a} per cent on whatever remains unpaid.",
    "({n}.2) Where the index published for the preceding year rises by more than {e} points, the rent is adjusted in "
    "proportion, rounded to the next full amount, and the lessor states the computation in a table such as that on "
    "page {f}.",
)


def write_inputs(folder: Path) -> list[Path]:
    """Writes the images as PNG files and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {**_photographs(), "page": _page(), "slide": _slide()}
    paths = []
    for name, image in images.items():
        path = folder / f"{name}.png"
        image.save(path)
        paths.append(path)
    return paths


def _photographs() -> dict[str, Image.Image]:
    """Those of scikit-image and, where it is installed, scikit-learn; the packages hold them, nothing is downloaded."""
    from importlib.util import find_spec

    from PIL import Image

    found: dict[str, Image.Image] = {}
    if find_spec("skimage") is not None:
        from skimage import data

        found |= {name: Image.fromarray(getattr(data, name)()) for name in _PHOTOGRAPHS}
    if find_spec("sklearn") is not None:
        from sklearn.datasets import load_sample_image

        found |= {name.partition(".")[0]: Image.fromarray(load_sample_image(name)) for name in _SKLEARN}
    return found


def _font(size: int, style: str = "DejaVuSerif") -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A DejaVu font, which comes with matplotlib; Pillow's own where matplotlib is not installed."""
    from importlib.util import find_spec

    from PIL import ImageFont

    spec = find_spec("matplotlib")
    if spec is not None and spec.submodule_search_locations:
        path = Path(next(iter(spec.submodule_search_locations))) / "mpl-data" / "fonts" / "ttf" / f"{style}.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size=size)


def _page() -> Image.Image:
    """A page of small print in two columns, with a table at its foot: A4 at 120 dots per inch."""
    from PIL import Image, ImageDraw

    width, height, margin, gutter = 992, 1403, 72, 36
    page = Image.new("RGB", (width, height), (253, 253, 250))
    draw = ImageDraw.Draw(page)
    draw.text((margin, 56), "Agreement of Lease", font=_font(30, "DejaVuSerif-Bold"), fill=(15, 15, 15))
    draw.line([(margin, 106), (width - margin, 106)], fill=(60, 60, 60), width=2)
    font, leading = _font(13), 18
    column = (width - 2 * margin - gutter) // 2
    number = 0
    for left in (margin, margin + column + gutter):
        y = 124
        while True:
            values = dict(
                zip("abcdef", (7 + number * 3 % 9, 2 + number % 5, 3 + number % 20, 1 + number % 4, 4, 11), strict=True)
            )
            lines = _wrapped(_PARAGRAPHS[number % 3].format(n=1 + number // 3, **values), font, column)
            if y + leading * len(lines) > 1120:
                break
            for line in lines:
                draw.text((left, y), line, font=font, fill=(25, 25, 25))
                y += leading
            y += 8
            number += 1
    mono = _font(13, "DejaVuSansMono")
    for row in range(9):
        y = 1146 + row * 22
        if row == 0:
            draw.rectangle([margin, y - 3, width - margin, y + 19], fill=(226, 226, 222))
        cells = ("Year", "Index", "Change", "Rent", "Due") if row == 0 else _table_row(row)
        for i, cell in enumerate(cells):
            draw.text((margin + 10 + i * 170, y), cell, font=mono, fill=(25, 25, 25))
        draw.line([(margin, y + 19), (width - margin, y + 19)], fill=(150, 150, 150))
    return page


def _table_row(row: int) -> tuple[str, ...]:
    return (
        str(2015 + row),
        f"{101.3 + 2.7 * row:.1f}",
        f"+{0.9 + row * 0.3:.1f}",
        f"{1180 + 37 * row}.50",
        f"{row:02d}-01",
    )


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _slide() -> Image.Image:
    """A 16:9 slide: a title, three short points, a bar chart, and much empty space."""
    from PIL import Image, ImageDraw

    slide = Image.new("RGB", (1600, 900), (255, 255, 255))
    draw = ImageDraw.Draw(slide)
    draw.rectangle([0, 0, 1600, 14], fill=(30, 64, 175))
    draw.text((110, 96), "Where the tokens go", font=_font(68, "DejaVuSans-Bold"), fill=(23, 37, 84))
    for i, point in enumerate(("Text needs detail", "Sky does not", "A router can tell")):
        y = 330 + i * 120
        draw.ellipse([116, y + 16, 138, y + 38], fill=(30, 64, 175))
        draw.text((170, y), point, font=_font(44, "DejaVuSans"), fill=(40, 40, 48))
    for i, value in enumerate((320, 130, 60)):
        x = 1080 + i * 130
        draw.rectangle([x, 760 - value, x + 90, 760], fill=((30, 64, 175), (96, 165, 250), (191, 219, 254))[i])
    draw.line([(1050, 761), (1480, 761)], fill=(90, 90, 100), width=3)
    return slide
