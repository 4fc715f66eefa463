"""A tile under the pencil: what is drawn on it, what can be asked about it, where its digits and letters lie."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from reproduce.fonts import load_font

__all__ = ["COLORS", "PATCH", "SIDE", "TABS", "Question", "Style", "Tile", "jitter"]

SIDE, PATCH = 64, 8  # of a tile and of a ViT's patch, in pixels
Color = tuple[int, int, int]
COLORS: dict[str, Color] = {
    "red": (205, 45, 45),
    "green": (45, 150, 65),
    "blue": (45, 75, 205),
    "yellow": (225, 190, 30),
    "purple": (140, 55, 165),
    "black": (28, 28, 28),
}


@dataclass(frozen=True)
class Question:
    """What is asked about one tile.

    Attributes:
        skill: what it takes, for scores: fine, medium, sparse, title, label, kind, color, shape, count, switch.
        text: of the question, behind the tile's tab.
        answer: in lower-case letters and digits.
    """

    skill: str
    text: str
    answer: str


@dataclass(frozen=True)
class Style:
    """What the tiles of one page share."""

    font: str
    paper: Color
    ink: Color


# A strip at the left edge tells a page's tiles apart, so that a question can name one by what is to be seen.
TABS: dict[str, Color] = {
    "orange": (245, 140, 30),
    "teal": (0, 160, 165),
    "pink": (240, 110, 180),
    "grey": (125, 125, 130),
}


def jitter(chance: random.Random, color: Color, by: int = 14) -> Color:
    """A color near that one."""
    r, g, b = (min(255, max(0, part + chance.randint(-by, by))) for part in color)
    return r, g, b


@dataclass
class Tile:
    """One tile of a page.

    Attributes:
        chance: where its randomness comes from.
        style: of its page.
        kind: what is on it.
        image: 64 x 64 pixels.
        questions: about it.
        glyphs: x and y of the centre of each digit and letter that can be asked for, half its width and half the
            height of an x, and which it is.
        unread: the same places of those that cannot.
    """

    chance: random.Random
    style: Style
    kind: str
    image: Any = None
    questions: list[Question] = field(default_factory=list)
    glyphs: list[tuple[float, float, float, float, str]] = field(default_factory=list)
    unread: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.image = Image.new("RGB", (SIDE, SIDE), jitter(self.chance, self.style.paper, 5))
        self.pencil = ImageDraw.Draw(self.image)

    def ask(self, skill: str, text: str, answer: str) -> None:
        self.questions.append(Question(skill, text, answer))

    def ink(self) -> Color:
        return jitter(self.chance, self.style.ink)

    def write(self, x: float, baseline: float, text: str, size: int, color: Color, pitch: float) -> None:
        """Writes a line whose characters are to be read, each in the middle of its own ``pitch`` pixels."""
        font = load_font(self.style.font, size)
        for place, character in enumerate(text):
            centre = x + pitch * (place + 0.5)
            self.pencil.text((centre, baseline), character, font=font, fill=color, anchor="ms")
            self.glyphs.append((centre, baseline - 0.36 * size, pitch / 2, 0.36 * size, character))

    def label(self, x: float, baseline: float, text: str, size: int, color: Color) -> None:
        """Writes a line that nobody asks for."""
        font = load_font(self.style.font, size)
        self.pencil.text((x, baseline), text, font=font, fill=color, anchor="ls")
        for place in range(len(text)):
            self.unread.append((x + font.getlength(text[:place]) + 2, baseline - 0.36 * size))

    def tab(self, name: str) -> None:
        """The strip at the left edge."""
        self.pencil.rectangle([0, 0, 2, SIDE], fill=jitter(self.chance, TABS[name]))

    def shift(self) -> int:
        """A pixel to one side or the other."""
        return self.chance.randint(-1, 1)

    def width(self, text: str, size: int) -> float:
        return load_font(self.style.font, size).getlength(text)

    def set_pixels(self, values: np.ndarray) -> None:
        """Replaces the picture by values ``[64, 64, 3]`` from 0 to 255."""
        self.image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
        self.pencil = ImageDraw.Draw(self.image)
