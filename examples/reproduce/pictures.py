"""Tiles without text: shapes, dots, and what looks as dense as print and is not."""

from __future__ import annotations

import math

import numpy as np

from reproduce.drawing import COLORS, SIDE, Tile, jitter

__all__ = ["DECOYS", "SHAPES", "decoy", "dots", "draw_shape", "shape"]

SHAPES = ("circle", "square", "wedge", "star")
DECOYS = ("stripes", "checks", "noise", "leaves", "greek", "bars", "slope")


def draw_shape(tile: Tile, x: float, y: float, radius: float, color: str) -> str:
    """Draws one of the shapes; gives back which."""
    kind, fill = tile.chance.choice(SHAPES), jitter(tile.chance, COLORS[color])
    if sum(tile.style.paper) < 300 and color == "black":
        tile.pencil.ellipse([x - radius - 3, y - radius - 3, x + radius + 3, y + radius + 3], fill=(235, 235, 230))
    if kind == "circle":
        tile.pencil.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)
    elif kind == "square":
        radius *= 0.9
        tile.pencil.rectangle([x - radius, y - radius, x + radius, y + radius], fill=fill)
    elif kind == "wedge":
        tile.pencil.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    else:
        turns = [(radius * (1.15 if i % 2 == 0 else 0.45), math.pi * (i / 5 - 0.5)) for i in range(10)]
        tile.pencil.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in turns], fill=fill)
    return kind


def shape(tile: Tile) -> None:
    """One large shape."""
    color = tile.chance.choice(sorted(COLORS))
    x, y = 32 + tile.chance.randint(-6, 6), 32 + tile.chance.randint(-6, 6)
    kind = draw_shape(tile, x, y, tile.chance.randint(14, 22), color)
    tile.ask("color", "color", color)
    tile.ask("shape", "shape", kind)


def dots(tile: Tile) -> None:
    """One to four spots."""
    color = tile.chance.choice([name for name in sorted(COLORS) if name != "black"])
    number = tile.chance.randint(1, 4)
    for x, y in tile.chance.sample([(16, 16), (48, 16), (16, 48), (48, 48)], number):
        x, y, radius = x + tile.chance.randint(-3, 3), y + tile.chance.randint(-3, 3), tile.chance.randint(7, 11)
        tile.pencil.ellipse([x - radius, y - radius, x + radius, y + radius], fill=jitter(tile.chance, COLORS[color]))
    tile.ask("count", "count", str(number))
    tile.ask("color", "color", color)


def decoy(tile: Tile) -> None:
    """Edges everywhere and nothing to read: textures, noise, foliage, greeked text, a bar code; or a smooth slope."""
    kind = tile.chance.choice(DECOYS)
    tile.kind = kind
    if kind in ("leaves", "greek", "bars"):
        {"leaves": _leaves, "greek": _greek, "bars": _bars}[kind](tile)
    else:
        _texture(tile, kind)
    tile.ask("kind", "kind", kind)


def _texture(tile: Tile, kind: str) -> None:
    rng = np.random.default_rng(tile.chance.getrandbits(63))
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind == "stripes":
        mask = (np.sin(along * 2 * math.pi / rng.uniform(4, 9)) > 0).astype(float)
    elif kind == "checks":
        size = int(rng.integers(3, 9))
        mask = (((x + rng.integers(size)) // size + (y + rng.integers(size)) // size) % 2).astype(float)
    elif kind == "noise":
        mask = rng.random((SIDE, SIDE))
    else:
        mask = (along - along.min()) / np.ptp(along)
    one = np.array(jitter(tile.chance, tile.chance.choice(sorted(COLORS.values())), 40))
    other = np.array(jitter(tile.chance, (235, 235, 228), 10))
    tile.set_pixels(one * mask[..., None] + other * (1 - mask[..., None]) + rng.normal(0, 5, (SIDE, SIDE, 3)))


def _leaves(tile: Tile) -> None:
    for _ in range(tile.chance.randint(90, 150)):
        x, y = tile.chance.uniform(-4, SIDE + 4), tile.chance.uniform(-4, SIDE + 4)
        long, wide, angle = tile.chance.uniform(4, 9), tile.chance.uniform(1, 3), tile.chance.uniform(0, math.pi)
        c, s = math.cos(angle), math.sin(angle)
        corners = [(long, 0), (0, wide), (-long, 0), (0, -wide)]
        green = jitter(
            tile.chance, tile.chance.choice([(60, 120, 50), (95, 150, 60), (40, 85, 45), (150, 140, 60)]), 20
        )
        tile.pencil.polygon([(x + a * c - b * s, y + a * s + b * c) for a, b in corners], fill=green)


def _greek(tile: Tile) -> None:
    """Lines of strokes where words would be, as editors draw text too small to show."""
    top = tile.chance.randint(3, 6)
    for row in range(5):
        x = 2.0 + tile.chance.randint(0, 3)
        y = top + 12 * row
        while x < SIDE - 4:
            end = min(SIDE - 2, x + tile.chance.randint(4, 14))
            for stroke in np.arange(x, end, 2):
                high = tile.chance.randint(0, 3)
                tile.pencil.line([(stroke, y + high), (stroke, y + 7)], fill=tile.ink())
            x = end + tile.chance.randint(3, 5)


def _bars(tile: Tile) -> None:
    x, top, bottom = 3, tile.chance.randint(4, 12), SIDE - tile.chance.randint(4, 12)
    while x < SIDE - 4:
        wide = tile.chance.randint(1, 3)
        tile.pencil.rectangle([x, top, x + wide - 1, bottom], fill=tile.ink())
        x += wide + tile.chance.randint(1, 3)
