"""Banks of tiles: rendered once per split and seed, kept as arrays, put together into endless pages.

Splits differ in their seeds, their fonts and the words of their titles; ``seen`` is new tiles of training's fonts and
words.
"""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reproduce import fonts, pictures, texts
from reproduce.drawing import SIDE, Question, Style, Tile
from reproduce.words import HELD_OUT_WORDS, WORDS

__all__ = ["FAMILIES", "GLYPHS", "PATCHES", "SPLITS", "TILE_KINDS", "Bank", "render_tile"]

SPLITS = {"train": 1, "seen": 2, "validation": 3, "test": 4}
PATCHES, PATCH = 64, 8  # of a tile, and their side in pixels
GLYPHS = "0123456789abcdefghijklmnopqrstuvwxyz"
NO_GLYPH, UNREAD = len(GLYPHS), -100
STYLES = 16  # per family and split

# What the tiles of a family's pages show, and how often. Fine print in a fifth to a third of them.
FAMILIES: dict[str, dict[str, float]] = {
    "document": {"fine": 15, "mixed": 10, "sparse": 6, "medium": 12, "title": 22, "blank": 15, "decoy": 20},
    "receipt": {"fine": 20, "sparse": 6, "medium": 12, "title": 24, "blank": 18, "decoy": 20},
    "table": {"fine": 22, "sparse": 6, "medium": 14, "title": 24, "blank": 18, "decoy": 16},
    "code": {"fine": 20, "sparse": 10, "title": 24, "blank": 22, "decoy": 24},
    "screen": {"fine": 10, "medium": 12, "button": 26, "switches": 22, "dots": 10, "title": 12, "decoy": 8},
    "picture": {"mixed": 14, "shape": 26, "dots": 16, "title": 8, "decoy": 36},
}
TILE_KINDS = (
    "fine", "mixed", "sparse", "medium", "title", "blank", "button", "switches", "dots", "shape", *pictures.DECOYS
)  # fmt: skip
_PAPERS = {
    "document": [(250, 249, 244), (240, 236, 226)],
    "receipt": [(247, 246, 240), (236, 233, 222)],
    "table": [(228, 234, 243), (243, 246, 238)],
    "code": [(30, 32, 40), (20, 30, 30), (245, 245, 245)],
    "screen": [(222, 228, 236), (238, 238, 242)],
    "picture": [(240, 240, 240), (250, 245, 225), (222, 236, 245)],
}


def words_of(split: str) -> tuple[str, ...]:
    """Words that titles and buttons of a split show."""
    if split in ("train", "seen"):
        return WORDS
    return HELD_OUT_WORDS[::2] if split == "validation" else HELD_OUT_WORDS[1::2]


def style_of(split: str, family: str, number: int) -> Style:
    """One of a family's looks."""
    chance = random.Random(f"{split} {family} {number}")
    known = {"validation": fonts.VALIDATION, "test": fonts.TEST}.get(split, fonts.TRAIN)
    if family == "code":  # where the split has one
        known = tuple(name for name in known if name in fonts.MONO) or known
    paper = chance.choice(_PAPERS[family])
    dark = sum(paper) < 300
    ink = chance.choice([(205, 222, 200), (220, 220, 225), (240, 205, 150)] if dark else
                        [(30, 30, 30), (25, 45, 95), (75, 30, 30)])  # fmt: skip
    return Style(known[number % len(known)], paper, ink)


def render_tile(split: str, family: str, style: int, number: int, seed: int = 0) -> Tile:
    """The tile of that number, the same ever again."""
    chance = random.Random(f"{seed} {split} {family} {style} {number}")
    weights = FAMILIES[family]
    kind = chance.choices(list(weights), list(weights.values()))[0]
    tile = Tile(chance, style_of(split, family, style), kind)
    if kind in ("fine", "medium", "sparse", "mixed"):
        getattr(texts, kind)(tile, family if family != "picture" else "document")
    elif kind in ("title", "button"):
        words = words_of(split)
        if split in ("train", "seen") and chance.random() < 0.6:  # so that letters are learnt, and not words
            words = ("".join(chance.choice(string.ascii_lowercase) for _ in range(3)),)
        getattr(texts, kind)(tile, words)
    elif kind == "switches":
        texts.switches(tile)
    elif kind == "blank":
        tile.ask("kind", "kind", "blank")
    else:
        getattr(pictures, kind)(tile)
    return tile


def glyphs_of(tile: Tile) -> np.ndarray:
    """``[64, 2]``: per patch the first two glyphs whose centres lie in it, from left to right.

    A glyph larger than a patch is also that of the patches whose centres it covers, where they have none of their own.
    """
    side = SIDE // PATCH
    found = np.full((side, side, 2), NO_GLYPH, np.int8)
    for x, y, _, _, character in sorted(tile.glyphs):
        column, row = int(x // PATCH), int(y // PATCH)
        if 0 <= column < side and 0 <= row < side:
            free = np.flatnonzero(found[row, column] == NO_GLYPH)
            if len(free):
                found[row, column, free[0]] = GLYPHS.index(character)
    centres = (np.arange(side) + 0.5) * PATCH
    for x, y, wide, high, character in tile.glyphs:
        if min(wide, high) > PATCH / 2:
            covered = (abs(centres - y) < high)[:, None] & (abs(centres - x) < wide)
            found[covered & (found[:, :, 0] == NO_GLYPH), 0] = GLYPHS.index(character)
    for x, y in tile.unread:
        column, row = int(x // PATCH), int(y // PATCH)
        if 0 <= column < side and 0 <= row < side:
            place = found[row, column]
            place[place == NO_GLYPH] = UNREAD
    return found.reshape(PATCHES, 2)


@dataclass(frozen=True, eq=False)
class Bank:
    """Tiles of a split.

    Attributes:
        split: which.
        pixels: ``[n, 64, 64, 3]`` uint8.
        glyphs: ``[n, 64, 2]`` int8, index into GLYPHS, NO_GLYPH, or UNREAD where either would be wrong to say.
        kinds: of each tile.
        families: of each tile.
        styles: of each tile.
        questions: of each tile.
    """

    split: str
    pixels: np.ndarray
    glyphs: np.ndarray
    kinds: tuple[str, ...]
    families: tuple[str, ...]
    styles: tuple[int, ...]
    questions: tuple[tuple[Question, ...], ...]

    def __len__(self) -> int:
        return len(self.kinds)

    def first(self, tiles: int) -> Bank:
        """The first so many tiles, as a bank rendered to that size has them."""
        return Bank(
            self.split, self.pixels[:tiles], self.glyphs[:tiles], self.kinds[:tiles], self.families[:tiles],
            self.styles[:tiles], self.questions[:tiles],
        )  # fmt: skip

    @classmethod
    def render(cls, split: str, tiles: int, seed: int = 0) -> Bank:
        """So many tiles, over families and styles in turn."""
        made, places = [], []
        for number in range(tiles):
            family = list(FAMILIES)[number % len(FAMILIES)]
            style = number // len(FAMILIES) % STYLES
            made.append(render_tile(split, family, style, number, seed))
            places.append((family, style))
        return cls(
            split,
            np.stack([np.asarray(tile.image) for tile in made]),
            np.stack([glyphs_of(tile) for tile in made]),
            tuple(tile.kind for tile in made),
            tuple(family for family, _ in places),
            tuple(style for _, style in places),
            tuple(tuple(tile.questions) for tile in made),
        )

    @classmethod
    def cached(cls, split: str, tiles: int, seed: int, folder: Path) -> Bank:
        """:meth:`render`, or what it gave before, from a file in ``folder``; delete it when the drawing changes."""
        path = folder / f"{split}-{tiles}-{seed}.npz"
        if path.exists():
            with np.load(path) as file:
                about = json.loads(str(file["about"]))
                asked = tuple(tuple(Question(*one) for one in own) for own in about["questions"])
                return cls(
                    split, file["pixels"], file["glyphs"], tuple(about["kinds"]), tuple(about["families"]),
                    tuple(about["styles"]), asked,
                )  # fmt: skip
        bank = cls.render(split, tiles, seed)
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "kinds": bank.kinds,
            "families": bank.families,
            "styles": bank.styles,
            "questions": [[(q.skill, q.text, q.answer) for q in own] for own in bank.questions],
        }
        partial = path.with_suffix(".part.npz")
        np.savez(partial, pixels=bank.pixels, glyphs=bank.glyphs, about=json.dumps(about))
        partial.replace(path)
        return bank
