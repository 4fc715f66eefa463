"""Pages as files: images and a JSONL of conversations, as ``vico train`` and ``vico eval`` read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reproduce.bank import Bank
from reproduce.drawing import SIDE
from reproduce.pages import Asked, Page, Pages
from vico_ext._files import replacing

__all__ = ["page_image", "write_pages"]


def page_image(bank: Bank, page: Page) -> Image.Image:
    """The page's four tiles, two in a row; cut at 64 pixels it gives them back, bit by bit."""
    canvas = np.empty((2 * SIDE, 2 * SIDE, 3), np.uint8)
    for place, tile in enumerate(page.tiles):
        top, left = place // 2 * SIDE, place % 2 * SIDE
        canvas[top : top + SIDE, left : left + SIDE] = bank.pixels[tile]
    return Image.fromarray(canvas)


def write_pages(folder: Path, pages: Pages, count: int, *, questions: int = 8, together: bool = False) -> Path:
    """Writes so many pages below ``folder``, and their questions as conversations.

    Args:
        folder: is made.
        pages: draws them.
        count: how many.
        questions: of a page at most.
        together: one conversation per page, which trains faster; else one per question, those of a page in a row.

    Returns:
        The JSONL file. Besides what training reads, lines have the tiles' kinds, and lines of one question its skill
        and tile.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    bank = pages.bank
    lines: list[dict[str, Any]] = []
    for number in range(count):
        page = pages.draw(questions)
        name = f"images/{number:06d}.png"
        page_image(bank, page).save(folder / name, compress_level=1)
        about = {"image": name, "width": 2 * SIDE, "height": 2 * SIDE, "family": page.family}
        about["kinds"] = [bank.kinds[tile] for tile in page.tiles]
        if together:
            lines.append({**about, "conversations": _turns(page.asked)})
        else:
            lines += [
                {**about, "skill": one.question.skill, "tile": one.place, "conversations": _turns([one])}
                for one in page.asked
            ]
    path = folder / "data.jsonl"
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _turns(asked: Sequence[Asked]) -> list[dict[str, str]]:
    turns = []
    for number, one in enumerate(asked):
        turns.append({"from": "human", "value": one.text if number else f"<image>\n{one.text}"})
        turns.append({"from": "gpt", "value": one.question.answer})
    return turns
