"""Tiles with text: fine, medium and sparse print, titles, buttons, switches, and print beside a picture."""

from __future__ import annotations

import string
from collections.abc import Sequence

from reproduce.drawing import COLORS, PATCH, SIDE, Tile, jitter
from reproduce.pictures import draw_shape
from reproduce.words import LABELS

__all__ = ["button", "fine", "medium", "mixed", "sheet", "sparse", "switches", "title"]

# Characters that are asked for stand on a fixed grid, give or take a pixel, as a typewriter's or a terminal's do: fine
# ones in a patch each, large ones in the four patches of a visual token. A model this small takes minutes to learn to
# read them there, and far longer where glyphs lie anywhere.
_FINE, _LARGE = (10, PATCH), (18, 2 * PATCH)  # size and pitch in pixels
_DIGITS = 3  # of a number in fine print
_SIGNS = (string.digits, string.ascii_lowercase, string.ascii_lowercase)  # of large print on sheets


def _number(tile: Tile, digits: int) -> str:
    return "".join(tile.chance.choice(string.digits) for _ in range(digits))


def _line(tile: Tile, family: str, row: int, number: str, column: int) -> None:
    """A label at the left and a number from that column on, in a row of patches."""
    size, pitch = _FINE
    x, baseline = PATCH * column + tile.shift(), PATCH * row + 7.5 + tile.shift()
    baseline = min(max(baseline, 7.5), SIDE - 1.5)
    label, left = tile.chance.choice(LABELS[family]), 4 + tile.chance.randint(0, 2)
    while label and left + tile.width(label, size) > x - 2:
        label = label[:-1]
    tile.label(left, baseline, label, size, tile.ink())
    tile.write(x, baseline, number, size, tile.ink(), pitch)


def fine(tile: Tile, family: str) -> None:
    """Four lines of ten pixels: little of them is left at the lower rate."""
    first, column = tile.chance.randint(0, 1), 4
    for line in range(4):
        row, number = first + 2 * line, _number(tile, _DIGITS)
        if family == "table" and row:
            y = PATCH * row - 4
            tile.pencil.line([(0, y), (SIDE, y)], fill=jitter(tile.chance, (185, 190, 205)))
        _line(tile, family, row, number, column)
        tile.ask("fine", f"line {line + 1}", number)
    if family == "table":
        x = PATCH * column - 4
        tile.pencil.line([(x, 0), (x, SIDE)], fill=(185, 190, 205))
    tile.ask("kind", "kind", "text")


def medium(tile: Tile, family: str) -> None:
    """Two or three lines of eighteen pixels: whether the lower rate will do is to be found out."""
    size, pitch = _LARGE
    lines, column = tile.chance.randint(2, 3), 2 * tile.chance.randint(0, 2)
    first = 2 * tile.chance.randint(0, 4 - lines)
    for line in range(lines):
        number, baseline = _number(tile, 2), PATCH * (first + 2 * line) + 15 + tile.shift()
        label = tile.chance.choice(LABELS[family])[:column]
        tile.label(4 + tile.chance.randint(0, 2), baseline, label, 12, tile.ink())
        tile.write(PATCH * column + tile.shift(), baseline, number, size, tile.ink(), pitch)
        tile.ask("medium", f"line {line + 1}", number)
    tile.ask("kind", "kind", "text")


def sparse(tile: Tile, family: str) -> None:
    """A single fine line on an empty tile."""
    number = _number(tile, _DIGITS)
    _line(tile, family, tile.chance.randint(0, 7), number, 2 * tile.chance.randint(1, 2))
    tile.ask("sparse", "line 1", number)


def mixed(tile: Tile, family: str) -> None:
    """A picture above two fine lines."""
    color = tile.chance.choice(sorted(COLORS))
    shape = draw_shape(tile, tile.chance.randint(16, 48), 17, tile.chance.randint(10, 13), color)
    row, column = tile.chance.randint(4, 5), 4
    for line in range(2):
        number = _number(tile, _DIGITS)
        _line(tile, family, row + 2 * line, number, column)
        tile.ask("fine", f"line {line + 1}", number)
    tile.ask("color", "color", color)
    tile.ask("shape", "shape", shape)


def _large(tile: Tile, text: str, top: int, color: tuple[int, int, int]) -> None:
    size, pitch = _LARGE
    left = tile.chance.randint(0, SIDE // pitch - len(text)) * pitch
    tile.write(left + tile.shift(), PATCH * top + 15 + tile.shift(), text, size, color, pitch)


def title(tile: Tile, words: Sequence[str]) -> None:
    """A word or a number in large print."""
    text = tile.chance.choice(words) if tile.chance.random() < 0.6 else _number(tile, 2)
    color = tile.chance.choice([name for name in sorted(COLORS) if name != "yellow"])
    if sum(tile.style.paper) < 300:  # a dark page
        ink = jitter(tile.chance, (225, 225, 215))
    else:
        ink = jitter(tile.chance, COLORS[color])
        tile.ask("color", "color", color)
    _large(tile, text, 2 * tile.chance.randint(0, 3), ink)
    tile.ask("title", "title", text)


def button(tile: Tile, words: Sequence[str]) -> None:
    """A button with a label."""
    color = tile.chance.choice([name for name in sorted(COLORS) if name != "yellow"])
    text, top = tile.chance.choice(words), 2 * tile.chance.randint(1, 2)
    box = [1, PATCH * top - 6 + tile.shift(), 62, PATCH * top + 22 + tile.shift()]
    tile.pencil.rounded_rectangle(box, tile.chance.randint(2, 9), fill=jitter(tile.chance, COLORS[color]))
    _large(tile, text, top, (255, 255, 255))
    tile.ask("label", "label", text)
    tile.ask("color", "color", color)


def switches(tile: Tile) -> None:
    """Two switches, each on or off."""
    for row in range(2):
        on = tile.chance.random() < 0.5
        top = 8 + 28 * row + tile.chance.randint(-2, 2)
        left = tile.chance.randint(8, 16)
        fill = jitter(tile.chance, (60, 170, 90) if on else (150, 150, 155))
        tile.pencil.rounded_rectangle([left, top, left + 38, top + 20], 10, fill=fill)
        knob = left + (20 if on else 2)
        tile.pencil.ellipse([knob, top + 2, knob + 16, top + 18], fill=(250, 250, 250))
        tile.ask("switch", f"line {row + 1}", "on" if on else "off")


def sheet(tile: Tile) -> None:
    """Lines of random digits, and of letters where they are large: to learn to read from, as no page has as many."""
    row, colored = 0, tile.chance.random() < 0.35
    if colored:
        name = tile.chance.choice([name for name in sorted(COLORS) if name != "yellow"])
        tile.pencil.rectangle([0, 0, SIDE, SIDE], fill=jitter(tile.chance, COLORS[name]))
    while row < SIDE // PATCH:
        fine = tile.chance.random() < 0.25
        (size, pitch), signs = (_FINE, string.digits) if fine else (_LARGE, tile.chance.choice(_SIGNS))
        high = pitch // PATCH
        column = high * tile.chance.randint(0, 3 // high)
        text = "".join(tile.chance.choice(signs) for _ in range(int((SIDE / PATCH - column) * PATCH / pitch)))
        size += tile.chance.randint(-1, 1) * high  # other sizes help with other fonts
        ink = (255, 255, 255) if colored else tile.ink()
        baseline = PATCH * (row + high) - 0.5 - 0.5 * (high - 1) + tile.shift()
        tile.write(PATCH * column + tile.shift(), baseline, text, size, ink, pitch)
        row += high
        row += row % 2 if tile.chance.random() < 0.8 else 0
