"""Tiles with text: fine, medium and sparse print, titles, buttons, switches, and print beside a picture."""

from __future__ import annotations

from collections.abc import Sequence

from reproduce.drawing import COLORS, SIDE, Tile, jitter
from reproduce.pictures import draw_shape
from reproduce.words import LABELS

__all__ = ["button", "fine", "medium", "mixed", "sparse", "switches", "title"]

_SIZE, _PITCH = 10, 12  # pixels of fine print, and from line to line


def _number(tile: Tile, digits: int) -> str:
    return "".join(tile.chance.choice("0123456789") for _ in range(digits))


def _line(tile: Tile, family: str, baseline: float, size: int, number: str, right: float) -> None:
    """A label at the left and a number that ends at ``right``."""
    start = right - tile.width(number, size)
    label = tile.chance.choice(LABELS[family])
    left = 2 + tile.chance.randint(0, 2)
    while label and left + tile.width(label, size) > start - 2:
        label = label[:-1]
    tile.write(left, baseline, label, size, tile.ink(), read=False)
    tile.write(start, baseline, number, size, tile.ink(), read=True)


def fine(tile: Tile, family: str) -> None:
    """Five lines of ten pixels: nothing of them is left at the lower rate."""
    top = tile.chance.randint(9, 12)
    right = SIDE - tile.chance.randint(1, 5)
    for row in range(5):
        number = _number(tile, 4)
        baseline = top + _PITCH * row
        if family == "table" and row:
            tile.pencil.line([(0, baseline - 10), (SIDE, baseline - 10)], fill=jitter(tile.chance, (185, 190, 205)))
        _line(tile, family, baseline, _SIZE, number, right)
        tile.ask("fine", f"line {row + 1}", number)
    if family == "table":
        x = SIDE - 32
        tile.pencil.line([(x, 0), (x, SIDE)], fill=(185, 190, 205))
    tile.ask("kind", "kind", "text")


def medium(tile: Tile, family: str) -> None:
    """Three lines of fourteen to sixteen pixels: whether the lower rate will do is to be found out."""
    size = tile.chance.randint(14, 16)
    top = tile.chance.randint(15, 18)
    right = SIDE - tile.chance.randint(1, 5)
    for row in range(3):
        number = _number(tile, 2)
        _line(tile, family, top + 20 * row, size, number, right)
        tile.ask("medium", f"line {row + 1}", number)
    tile.ask("kind", "kind", "text")


def sparse(tile: Tile, family: str) -> None:
    """A single fine line on an empty tile."""
    number = _number(tile, 4)
    right = tile.chance.randint(40, SIDE - 2)
    _line(tile, family, 10 + _PITCH * tile.chance.randint(0, 4) + tile.chance.randint(0, 4), _SIZE, number, right)
    tile.ask("sparse", "line 1", number)


def mixed(tile: Tile, family: str) -> None:
    """A picture above two fine lines."""
    color = tile.chance.choice(sorted(COLORS))
    shape = draw_shape(tile, tile.chance.randint(16, 48), 17, tile.chance.randint(10, 13), color)
    right = SIDE - tile.chance.randint(1, 5)
    for row in range(2):
        number = _number(tile, 4)
        _line(tile, family, 46 + _PITCH * row, _SIZE, number, right)
        tile.ask("fine", f"line {row + 1}", number)
    tile.ask("color", "color", color)
    tile.ask("shape", "shape", shape)


def title(tile: Tile, words: Sequence[str]) -> None:
    """A word or a number that fills the tile."""
    text = tile.chance.choice(words) if tile.chance.random() < 0.6 else _number(tile, 2)
    size = 40
    while tile.width(text, size) > SIDE - 4:
        size -= 1
    color = tile.chance.choice([name for name in sorted(COLORS) if name != "yellow"])
    if sum(tile.style.paper) < 300:  # a dark page
        ink = jitter(tile.chance, (225, 225, 215))
    else:
        ink = jitter(tile.chance, COLORS[color])
        tile.ask("color", "color", color)
    left = (SIDE - tile.width(text, size)) / 2 + tile.chance.randint(-1, 1)
    tile.write(left, 32 + 0.36 * size + tile.chance.randint(-5, 5), text, size, ink, read=True)
    tile.ask("title", "title", text)


def button(tile: Tile, words: Sequence[str]) -> None:
    """A button with a label."""
    color = tile.chance.choice([name for name in sorted(COLORS) if name != "yellow"])
    text = tile.chance.choice(words)
    box = [3, 15 + tile.chance.randint(-3, 3), 61, 49 + tile.chance.randint(-3, 3)]
    tile.pencil.rounded_rectangle(box, tile.chance.randint(2, 9), fill=jitter(tile.chance, COLORS[color]))
    size = 24
    while tile.width(text, size) > SIDE - 14:
        size -= 1
    tile.write((SIDE - tile.width(text, size)) / 2, 32 + 0.36 * size, text, size, (255, 255, 255), read=True)
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
