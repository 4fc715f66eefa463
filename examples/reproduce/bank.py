"""Banks of tiles: rendered once per split and seed, kept as arrays, put together into endless pages.

Splits differ in their seeds, their fonts and the words of their titles; ``seen`` is new tiles of training's fonts and
words.
"""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from reproduce import fonts, pictures, texts
from reproduce.drawing import PATCH, SIDE, TABS, Question, Style, Tile
from reproduce.words import HELD_OUT_WORDS, WORDS

__all__ = ["FAMILIES", "GLYPHS", "NO_GLYPH", "PATCHES", "SPLITS", "TILE_KINDS", "UNREAD", "Bank", "render_tile"]

SPLITS = {"train": 1, "seen": 2, "validation": 3, "test": 4}
PATCHES = (SIDE // PATCH) ** 2  # of a tile
GLYPHS = "0123456789abcdefghijklmnopqrstuvwxyz"
NO_GLYPH, UNREAD = len(GLYPHS), -100
STYLES = 26  # per family and split

# What the tiles of a family's pages show, and how often. A quarter of all has something to read, as much of it as a
# page's questions are about.
FAMILIES: dict[str, dict[str, float]] = {
    "document": {"fine": 12, "mixed": 6, "sparse": 3, "medium": 3, "title": 5, "blank": 30, "decoy": 41},
    "receipt": {"fine": 20, "sparse": 3, "medium": 4, "title": 4, "blank": 30, "decoy": 39},
    "table": {"fine": 20, "sparse": 3, "medium": 4, "title": 4, "blank": 30, "decoy": 39},
    "code": {"fine": 18, "sparse": 6, "title": 4, "blank": 36, "decoy": 36},
    "screen": {"fine": 6, "medium": 4, "button": 10, "title": 2, "switches": 36, "dots": 22, "decoy": 20},
    "picture": {"mixed": 12, "title": 3, "shape": 35, "dots": 20, "decoy": 30},
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
    tile.tab(list(TABS)[number % len(TABS)])
    return tile


def glyphs_of(tile: Tile) -> np.ndarray:
    """``[64]``: the glyph that covers each patch's centre; NO_GLYPH, or UNREAD where print is that nobody asks for."""
    side = SIDE // PATCH
    centres = (np.arange(side) + 0.5) * PATCH
    found = np.full((side, side), NO_GLYPH, np.int8)
    for x, y in tile.unread:
        found[np.ix_(abs(centres - y) < PATCH / 2, abs(centres - x) < PATCH / 2)] = UNREAD
    for x, y, wide, high, character in tile.glyphs:
        rows, columns = abs(centres - y) < max(high, PATCH / 2), abs(centres - x) < wide
        found[np.ix_(rows, columns)] = GLYPHS.index(character)
    return found.flatten()


@dataclass(frozen=True, eq=False)
class Bank:
    """Tiles of a split.

    Attributes:
        split: which.
        pixels: ``[n, 64, 64, 3]`` uint8.
        glyphs: ``[n, 64]`` int8, index into GLYPHS, NO_GLYPH or UNREAD: see :func:`glyphs_of`.
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

    @property
    def tabs(self) -> np.ndarray:
        """``[n]``, the number of each tile's tab."""
        return np.arange(len(self)) % len(TABS)

    def first(self, tiles: int) -> Bank:
        """The first so many tiles, as a bank rendered to that size has them."""
        return Bank(
            self.split, self.pixels[:tiles], self.glyphs[:tiles], self.kinds[:tiles], self.families[:tiles],
            self.styles[:tiles], self.questions[:tiles],
        )  # fmt: skip

    @classmethod
    def render(cls, split: str, tiles: int, seed: int = 0) -> Bank:
        """So many tiles, over tabs, families and styles in turn."""
        made, places = [], []
        for number in range(tiles):
            round_of_tabs = number // len(TABS)
            family = list(FAMILIES)[round_of_tabs % len(FAMILIES)]
            style = round_of_tabs // len(FAMILIES) % STYLES
            made.append(render_tile(split, family, style, number, seed))
            places.append((family, style))
        return cls._of(split, made, places)

    @classmethod
    def sheets(cls, tiles: int, seed: int = 0) -> Bank:
        """So many tiles full of random print in training's fonts."""
        made = []
        for number in range(tiles):
            chance = random.Random(f"{seed} sheet {number}")
            family, style = chance.choice(list(FAMILIES)), chance.randrange(STYLES)
            tile = Tile(chance, style_of("train", family, style), "sheet")
            tile.style = replace(tile.style, font=fonts.TRAIN[number % len(fonts.TRAIN)])
            texts.sheet(tile)
            tile.tab(list(TABS)[number % len(TABS)])
            made.append(tile)
        return cls._of("train", made, [("sheet", 0)] * tiles)

    @classmethod
    def _of(cls, split: str, made: list[Tile], places: list[tuple[str, int]]) -> Bank:
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
