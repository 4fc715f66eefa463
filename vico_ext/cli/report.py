"""The JSON report and the table of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vico_ext._files import replacing

__all__ = ["describe_image", "table", "totals", "write_json"]

ImageReport = dict[str, Any]


def describe_image(
    name: str, tiled: Any, p: Sequence[float], compress: Sequence[bool], tokens: tuple[int, int]
) -> ImageReport:
    """One image's entry: size, grid, and per tile where it is, its p, its rate and its tokens."""
    rows, columns = tiled.grid
    tiles = []
    for index, (box, probability, compressed) in enumerate(zip(tiled.boxes, p, compress, strict=True)):
        thumbnail = tiled.thumbnail and index == rows * columns
        tiles.append(
            {
                "index": index,
                "row": None if thumbnail else index // columns,
                "column": None if thumbnail else index % columns,
                "thumbnail": thumbnail,
                "box": [round(edge, 2) for edge in box],
                "p": probability,
                "compressed": bool(compressed),
                "tokens": tokens[1] if compressed else tokens[0],
            }
        )
    return {
        "file": name,
        "width": tiled.size[0],
        "height": tiled.size[1],
        "grid": {"rows": rows, "columns": columns},
        "thumbnail": tiled.thumbnail,
        "tiles": tiles,
        "tiles_compressed": sum(map(bool, compress)),
        "tokens_before": len(tiles) * tokens[0],
        "tokens_after": sum(tile["tokens"] for tile in tiles),
    }


def totals(images: Sequence[ImageReport]) -> dict[str, Any]:
    """Sums over images, and what share of the tokens is gone."""
    before = sum(image["tokens_before"] for image in images)
    after = sum(image["tokens_after"] for image in images)
    return {
        "images": len(images),
        "tiles": sum(len(image["tiles"]) for image in images),
        "tiles_compressed": sum(image["tiles_compressed"] for image in images),
        "tokens_before": before,
        "tokens_after": after,
        "tokens_saved_share": round(1 - after / before, 6) if before else 0.0,
    }


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, complete or not at all; NaN, which JSON has no word for, is an error."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] | None = None) -> str:
    """Columns as wide as they must be: the first flush left, numbers flush right."""
    body = [list(row) for row in rows] + ([list(total)] if total else [])
    widths = [max(len(line[i]) for line in [list(header), *body]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    rule = "-" * len(line(header).ljust(sum(widths) + 2 * (len(widths) - 1)))
    lines = [line(header), rule, *(line(row) for row in rows)]
    return "\n".join([*lines, rule, line(total)] if total else lines)
