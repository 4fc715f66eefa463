"""Pictures of a routing decision: every tile shaded by its rate and probability. Needs Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

__all__ = ["route_picture"]

Color = tuple[int, int, int]

# Blue and orange stay apart for every kind of colour vision.
_FULL: Color = (29, 78, 216)
_COMPRESSED: Color = (234, 88, 12)
_INK: Color = (24, 24, 27)
_GRAY: Color = (113, 113, 122)
_PAPER: Color = (250, 250, 249)

_LONGEST = (1150, 950)  # pixels that the picture of the tiles may take, width and height
_SMALLEST_CELL = 104  # below that no label is legible
_PIXELS_SHOW = 4  # times that an image is magnified
_MARGIN = 28
_PANEL = 316
_HEADER = 64


def route_picture(
    image: Image.Image,
    grid: tuple[int, int],
    p: Sequence[float],
    compress: Sequence[bool],
    *,
    thumbnail: bool,
    tokens: tuple[int, int] = (256, 64),
    title: str = "",
    policy: str = "",
    note: str = "",
) -> Image.Image:
    """The image with each tile tinted by its rate, the stronger the surer the router is, and its visual tokens drawn.

    Args:
        image: the upright RGB image that was cut.
        grid: rows and columns of the tiles.
        p: per tile, row by row and then the thumbnail, the probability that the smaller number of tokens is enough.
        compress: per tile, whether it gets the smaller number.
        thumbnail: whether the last tile is the thumbnail.
        tokens: visual tokens of a whole and of a compressed tile.
        title: heading, such as the file's name.
        policy: named beside the legend.
        note: a caution printed below the legend, such as that weights are untrained.

    Returns:
        An RGB picture with a side panel: thumbnail, legend, token counts.

    Raises:
        ValueError: `p` and `compress` do not have one entry for each tile.
    """
    from PIL import Image, ImageDraw

    rows, columns = grid
    count = rows * columns + int(thumbnail)
    if len(p) != count or len(compress) != count:
        raise ValueError(f"p and compress must have {count} entries for grid {grid}, got {len(p)} and {len(compress)}")
    cell_width, cell_height = _cell_size(image.size, grid)
    width, height = cell_width * columns, cell_height * rows
    panel = _Panel(p, compress, thumbnail, tokens, policy, note)
    canvas_height = _HEADER + max(height, panel.height()) + _MARGIN
    canvas = Image.new("RGB", (width + _PANEL + 3 * _MARGIN, canvas_height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    tiles = "1 tile" if count == 1 else f"{columns} x {rows} tiles{' + thumbnail' if thumbnail else ''}"
    heading = f"{image.width} x {image.height} pixels, {tiles}"
    left = _fitted(title, _font(24), canvas.width - 2 * _MARGIN - 24 - _width(heading, _font(17)))
    draw.text((_MARGIN, 18), left, font=_font(24), fill=_INK)
    draw.text((canvas.width - _MARGIN, 24), heading, font=_font(17), fill=_GRAY, anchor="ra")

    pixels = _resized(image, width, height)
    for index in range(rows * columns):
        x, y = index % columns * cell_width, index // columns * cell_height
        cell = pixels.crop((x, y, x + cell_width, y + cell_height))
        canvas.paste(_tile(cell, p[index], compress[index], tokens), (_MARGIN + x, _HEADER + y))
    panel.draw_on(canvas, image, width + 2 * _MARGIN, _HEADER)
    return canvas


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """At this size; what is much smaller shows as the pixels that it has, not as a blur."""
    from PIL import Image

    tiny = width >= _PIXELS_SHOW * image.width and height >= _PIXELS_SHOW * image.height
    return image.resize((width, height), Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS)


def _cell_size(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Pixels of a tile in the picture: the image's aspect ratio is kept unless labels would not fit."""
    rows, columns = grid
    scale = min(_LONGEST[0] / size[0], _LONGEST[1] / size[1])
    return (
        max(_SMALLEST_CELL, round(size[0] * scale / columns)),
        max(_SMALLEST_CELL, round(size[1] * scale / rows)),
    )


def _tile(cell: Image.Image, p: float, compressed: bool, tokens: tuple[int, int]) -> Image.Image:
    """One tile: its pixels, tinted; the lattice of its visual tokens; its label."""
    from PIL import Image, ImageDraw

    color = _COMPRESSED if compressed else _FULL
    count = tokens[int(compressed)]
    width, height = cell.size
    lattice = Image.new("RGBA", cell.size, (255, 255, 255, 0))
    draw = ImageDraw.Draw(lattice)
    side = round(count**0.5)
    for i in range(1, side):
        x, y = round(i * width / side), round(i * height / side)
        # White beside the tile's colour: one of them shows, whatever is below.
        for offset, shade in ((0, (255, 255, 255, 70)), (1, (*color, 70))):
            draw.line([(x + offset, 0), (x + offset, height)], fill=shade)
            draw.line([(0, y + offset), (width, y + offset)], fill=shade)
    edge = 3
    draw.rectangle([0, 0, width - 1, height - 1], outline=(255, 255, 255, 255), width=1)
    draw.rectangle([1, 1, width - 2, height - 2], outline=(*color, 255), width=edge)
    tint = Image.new("RGBA", cell.size, (*color, _tint(p, compressed)))
    tinted = Image.alpha_composite(Image.alpha_composite(cell.convert("RGBA"), tint), lattice)
    _label(tinted, str(count), f"p {p:.3f}", color, edge)
    return tinted.convert("RGB")


def _label(tile: Image.Image, count: str, probability: str, color: Color, edge: int) -> None:
    """The number of tokens, large, and p below it, on a chip of the tile's colour."""
    from PIL import ImageDraw

    size = max(15, min(26, min(tile.size) // 7))
    large, small = _font(size), _font(max(12, round(size * 0.68)))
    width = max(_width(count, large), _width(probability, small)) + size
    height = round(size * 2.35)
    draw = ImageDraw.Draw(tile)
    x, y = edge + 5, edge + 5
    draw.rounded_rectangle([x, y, x + width, y + height], radius=size // 4, fill=(*_darker(color), 255))
    draw.text((x + width / 2, y + size * 0.78), count, font=large, fill="white", anchor="mm")
    draw.text((x + width / 2, y + size * 1.75), probability, font=small, fill="white", anchor="mm")


class _Panel:
    """The side panel: thumbnail, legend, token counts."""

    def __init__(
        self,
        p: Sequence[float],
        compress: Sequence[bool],
        thumbnail: bool,
        tokens: tuple[int, int],
        policy: str,
        note: str,
    ) -> None:
        self.p, self.compress, self.thumbnail, self.tokens = p, compress, thumbnail, tokens
        self.policy, self.note = policy, note
        self.side = 224

    def height(self) -> int:
        """Pixels needed, whatever is in it."""
        return (self.side + 56 if self.thumbnail else 0) + 360 + 22 * len(self._note_lines())

    def draw_on(self, canvas: Image.Image, image: Image.Image, x: int, y: int) -> None:
        """Draws the panel with its upper left corner at (x, y)."""
        from PIL import ImageDraw

        draw = ImageDraw.Draw(canvas)
        if self.thumbnail:
            small = _resized(image, self.side, self.side)
            canvas.paste(_tile(small, self.p[-1], self.compress[-1], self.tokens), (x, y))
            draw.text((x, y + self.side + 8), "thumbnail: the whole image as one tile", font=_font(15), fill=_GRAY)
            y += self.side + 56
        y = self._counts(draw, x, y)
        y = self._legend(draw, canvas, x, y + 18)
        if self.policy:
            draw.text((x, y), _fitted(f"policy {self.policy}", _font(15), _PANEL), font=_font(15), fill=_GRAY)
            y += 26
        for line in self._note_lines():
            draw.text((x, y), line, font=_font(15), fill=_darker(_COMPRESSED))
            y += 22

    def _counts(self, draw: ImageDraw.ImageDraw, x: int, y: int) -> int:
        full, few = self.tokens
        tiles, compressed = len(self.compress), sum(map(bool, self.compress))
        before, after = tiles * full, (tiles - compressed) * full + compressed * few
        draw.text((x, y), f"{after} visual tokens", font=_font(30), fill=_INK)
        saved = f"{100 * (1 - after / before):.0f}% fewer than {before}" if after < before else f"all of {before}"
        draw.text((x, y + 40), saved, font=_font(18), fill=_INK)
        share = f"{compressed} of {tiles} {'tile' if tiles == 1 else 'tiles'} compressed"
        draw.text((x, y + 66), share, font=_font(18), fill=_INK)
        bar = y + 98
        kept = round(_PANEL * after / before)
        draw.rectangle([x, bar, x + _PANEL, bar + 10], fill=(228, 228, 231))
        draw.rectangle([x, bar, x + kept, bar + 10], fill=_INK)
        return bar + 22

    def _legend(self, draw: ImageDraw.ImageDraw, canvas: Image.Image, x: int, y: int) -> int:
        from PIL import Image

        lines = (
            (_FULL, False, f"{self.tokens[0]} tokens: kept whole"),
            (_COMPRESSED, True, f"{self.tokens[1]} tokens: compressed"),
        )
        for color, compressed, text in lines:
            draw.rectangle([x, y, x + 20, y + 20], fill=color)
            draw.text((x + 30, y + 10), text, font=_font(17), fill=_INK, anchor="lm")
            ramp = Image.new("RGB", (_PANEL, 12))
            for i in range(_PANEL):
                alpha = _tint(i / (_PANEL - 1), compressed) / 255
                shade = tuple(round(255 - alpha * (255 - c)) for c in color)
                ramp.paste(shade, (i, 0, i + 1, 12))
            canvas.paste(ramp, (x, y + 28))
            y += 50
        draw.text((x, y - 6), "p = 0", font=_font(14), fill=_GRAY)
        draw.text((x + _PANEL, y - 6), "p = 1", font=_font(14), fill=_GRAY, anchor="ra")
        draw.text((x, y + 18), "p: the router's probability that", font=_font(15), fill=_GRAY)
        draw.text((x, y + 38), f"{self.tokens[1]} tokens are enough for the tile.", font=_font(15), fill=_GRAY)
        return y + 68

    def _note_lines(self) -> list[str]:
        lines: list[str] = []
        for word in self.note.split():
            if lines and _width(f"{lines[-1]} {word}", _font(15)) <= _PANEL:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return lines


def _tint(p: float, compressed: bool) -> int:
    """Opacity of a tile's colour: the surer the router is of the rate the tile got, the stronger."""
    return round(255 * (0.08 + 0.36 * (p if compressed else 1 - p)))


def _darker(color: Color) -> Color:
    r, g, b = (round(c * 0.72) for c in color)
    return r, g, b


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: no font of the system is needed."""
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def _width(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return round(font.getlength(text))


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, cut in the middle with dots where it is too wide."""
    if _width(text, font) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        short = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
        if _width(short, font) <= width:
            return short
    return ""
