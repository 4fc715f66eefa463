"""The JSONL file: finds its lines, checks each, and says exactly what is wrong with those that are not right."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vico_ext.tiling import UnreadableImageError, choose_grid, tile_image
from vico_ext.training.chat import IMAGE_TAG, Turn

__all__ = ["BadRecordError", "Corpus", "Item", "Problem", "Record", "Tiling", "parse_record"]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_CHARACTERS_PER_TOKEN = 3  # for ordering by length only


class BadRecordError(ValueError):
    """A line of the data that cannot be used."""


@dataclass(frozen=True)
class Problem:
    """Something that was wrong with the data or with what came of it.

    Attributes:
        kind: "record", "image" or "loss".
        line: of the data, from 1 on.
        message: what was wrong.
    """

    kind: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


@dataclass(frozen=True)
class Record:
    """One line: a conversation about images.

    Attributes:
        images: paths as written.
        turns: the last one is the assistant's.
        family: for scores by family; empty where the line names none.
        sizes: (width, height) of the images, where the line has them.
    """

    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    family: str = ""
    sizes: tuple[tuple[int, int], ...] = ()

    @property
    def answer(self) -> str:
        """The last message."""
        return self.turns[-1].text


@dataclass(frozen=True)
class Item:
    """Lines that are used together: one conversation, or several about the same images.

    Attributes:
        lines: numbers from 1 on.
        offsets: where they start in the file.
        length: estimate in tokens, of all of it.
    """

    lines: tuple[int, ...]
    offsets: tuple[int, ...]
    length: int


def parse_record(line: str | bytes) -> Record:
    """A line of the file.

    ``{"image": path or [paths], "conversations": [{"from": "human" | "gpt" | "system", "value": text}, ...]}``, as
    InternVL's own training data; ``images``, ``messages``, ``role`` and ``content`` are understood as well. A first
    message without any ``<image>`` gets one in front for each image.

    Raises:
        BadRecordError: with what was wanted and what came.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadRecordError(f"must be a JSON object, got {type(content).__name__}")
    images = content.get("image", content.get("images"))
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not images or not all(isinstance(path, str) and path for path in images):
        raise BadRecordError(f"'image' must be a path or a list of paths, got {images!r}")
    turns = _turns(content.get("conversations", content.get("messages")))
    tags = sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role != "assistant")
    if tags == 0:
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", f"{IMAGE_TAG}\n" * len(images) + turns[first].text)
    elif tags != len(images):
        raise BadRecordError(f"there are {tags} {IMAGE_TAG} tags and {len(images)} images")
    family = content.get("family", "")
    if not isinstance(family, str):
        raise BadRecordError(f"'family' must be text, got {family!r}")
    return Record(tuple(images), tuple(turns), family, _sizes(content, len(images)))


def _turns(messages: Any) -> list[Turn]:
    if not isinstance(messages, list) or not messages:
        raise BadRecordError(f"'conversations' must be a list of messages, got {messages!r}")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise BadRecordError(f"message {number} must be an object, got {message!r}")
        role, text = message.get("from", message.get("role")), message.get("value", message.get("content"))
        if role not in _ROLES:
            raise BadRecordError(f"message {number} is from {role!r}, expected one of {', '.join(_ROLES)}")
        if not isinstance(text, str) or not text.strip():
            raise BadRecordError(f"message {number} must have text, got {text!r}")
        turns.append(Turn(_ROLES[role], text))
    spoken = [turn.role for turn in turns[turns[0].role == "system" :]]
    if len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        raise BadRecordError(
            f"messages must alternate between user and assistant, who is last, got {', '.join(spoken)}"
        )
    return turns


def _sizes(content: Mapping[str, Any], images: int) -> tuple[tuple[int, int], ...]:
    sides = [content.get(name) for name in ("width", "height")]
    listed = [side if isinstance(side, list) else [side] for side in sides]
    if any(len(side) != images or not all(isinstance(n, int) and n > 0 for n in side) for side in listed):
        return ()
    return tuple(zip(*listed, strict=True))


@dataclass(frozen=True)
class Tiling:
    """How images are cut; see :func:`vico_ext.tiling.tile_image`."""

    tile_size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool

    def tiles(self, width: int, height: int) -> int:
        """Tiles of an image of that size."""
        limits = {"min_tiles": self.min_tiles, "max_tiles": self.max_tiles}
        rows, columns = choose_grid(width, height, tile_size=self.tile_size, **limits)
        return rows * columns + (self.thumbnail and rows * columns > 1)

    def cut(self, path: Path) -> Tensor:
        """The tiles ``[P, 3, S, S]`` of an image file."""
        return tile_image(
            path,
            tile_size=self.tile_size,
            min_tiles=self.min_tiles,
            max_tiles=self.max_tiles,
            thumbnail=self.thumbnail,
        ).pixel_values


@dataclass(frozen=True)
class Corpus:
    """The usable lines of a file, and the problems of the others.

    Attributes:
        path: the file.
        image_root: folder of relative image paths.
        items: in the order of their first lines.
        problems: found while reading.
    """

    path: Path
    image_root: Path
    items: tuple[Item, ...]
    problems: tuple[Problem, ...]

    @classmethod
    def scan(
        cls, path: Path, image_root: Path, tiling: Tiling, *, questions: int = 0, measure: bool, tokens_per_tile: int
    ) -> Corpus:
        """Reads all lines once.

        Args:
            path: the file.
            image_root: folder of relative image paths.
            tiling: how images are cut.
            questions: 0 makes an item of each line; else lines about the same images go together, at most so many.
            measure: whether lengths are wanted; images of lines without width and height are opened for theirs.
            tokens_per_tile: of a whole tile.
        """
        found: list[tuple[tuple[str, ...], Item]] = []
        problems: list[Problem] = []
        tiles: dict[tuple[str, ...], int] = {}
        for number, offset, line in _lines(path):
            try:
                record = parse_record(line)
                if measure and record.images not in tiles:
                    sizes = record.sizes or [_size(image_root / image) for image in record.images]
                    tiles[record.images] = sum(tiling.tiles(*size) for size in sizes)
            except (BadRecordError, UnreadableImageError) as error:
                kind = "record" if isinstance(error, BadRecordError) else "image"
                problems.append(Problem(kind, number, str(error)))
                continue
            text = sum(len(turn.text) for turn in record.turns) // _CHARACTERS_PER_TOKEN
            length = tiles.get(record.images, 0) * tokens_per_tile + text
            found.append((record.images, Item((number,), (offset,), length)))
        items = _together(found, questions) if questions else [item for _, item in found]
        return cls(path, image_root, tuple(items), tuple(problems))

    def read(self, item: Item) -> list[Record]:
        """The records of an item."""
        records = []
        with open(self.path, "rb") as file:
            for offset in item.offsets:
                file.seek(offset)
                records.append(parse_record(file.readline()))
        return records


def _together(found: list[tuple[tuple[str, ...], Item]], most: int) -> list[Item]:
    """Items about the same images as one, of at most so many lines."""
    groups: dict[tuple[str, ...], list[Item]] = {}
    for images, item in found:
        groups.setdefault(images, []).append(item)
    merged = []
    for own in groups.values():
        for start in range(0, len(own), most):
            part = own[start : start + most]
            lines, offsets = zip(*((item.lines[0], item.offsets[0]) for item in part), strict=True)
            merged.append(Item(lines, offsets, sum(item.length for item in part)))
    return sorted(merged, key=lambda item: item.lines)


def _size(path: Path) -> tuple[int, int]:
    """Width and height from the file's header."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # damage shows as any of a dozen kinds, as in vico_ext.tiling
        raise UnreadableImageError(f"cannot read {path}: {error or type(error).__name__}") from error


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of each line that is not blank."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, offset, line
            offset += len(line)
