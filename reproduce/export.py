"""Pages as files: images and a JSONL of conversations, as ``vico train`` and ``vico eval`` read them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from reproduce.bank import Bank
from reproduce.drawing import SIDE
from reproduce.pages import Page, Pages

__all__ = ["page_image", "write_pages"]


def page_image(bank: Bank, page: Page) -> Image.Image:
    """The page's four tiles, two in a row; cut at 64 pixels it gives them back, bit by bit."""
    canvas = np.empty((2 * SIDE, 2 * SIDE, 3), np.uint8)
    for place, tile in enumerate(page.tiles):
        top, left = place // 2 * SIDE, place % 2 * SIDE
        canvas[top : top + SIDE, left : left + SIDE] = bank.pixels[tile]
    return Image.fromarray(canvas)


def write_pages(folder: Path, bank: Bank, count: int, seed: int, questions: int = 8) -> Path:
    """Writes so many pages below ``folder`` and one line per question, those of a page behind each other.

    Returns:
        The JSONL file. Besides what training reads, a line has the skill, the tile asked about and the tiles' kinds.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    drawn = Pages(bank, seed)
    lines = []
    for number in range(count):
        page = drawn.draw(questions=questions)
        name = f"images/{number:06d}.png"
        page_image(bank, page).save(folder / name)
        for one in page.asked:
            lines.append({
                "image": name,
                "width": 2 * SIDE,
                "height": 2 * SIDE,
                "family": page.family,
                "skill": one.question.skill,
                "tile": one.place,
                "kinds": [bank.kinds[tile] for tile in page.tiles],
                "conversations": [
                    {"from": "human", "value": f"<image>\n{one.text}"},
                    {"from": "gpt", "value": one.question.answer},
                ],
            })  # fmt: skip
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
