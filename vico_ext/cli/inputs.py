"""Which files are meant: images, folders of images, glob patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from vico_ext.cli.errors import CliError

__all__ = ["expand_images", "picture_names"]

_LONGEST_STEM = 200


def expand_images(arguments: Sequence[str]) -> list[Path]:
    """Files in the order given, each once; a folder gives the images directly in it, sorted by name.

    A file that does not exist stays in the list: it is reported with the other unreadable ones.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        if not argument:
            raise CliError("IMAGE must be a file, a folder or a pattern, got an empty name")
        path = Path(argument)
        if path.is_dir():
            images = sorted(p for p in path.iterdir() if p.suffix.lower() in _suffixes() and p.is_file())
            if not images:
                raise CliError(f"no images in the folder {argument}")
            found |= dict.fromkeys(images)
        elif not path.exists() and glob.has_magic(argument):
            matches = sorted(Path(name) for name in glob.glob(argument, recursive=True) if Path(name).is_file())
            if not matches:
                raise CliError(f"no file matches {argument}")
            found |= dict.fromkeys(matches)
        else:
            found[path] = None
    return list(found)


def picture_names(images: Sequence[Path]) -> list[str]:
    """A file name for each image's picture; equal stems get numbers, and very long ones are cut."""
    taken: set[str] = set()
    names = []
    for image in images:
        stem = _cut(image.stem)
        name, number = f"{stem}.route.png", 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}.route.png"
        taken.add(name.lower())
        names.append(name)
    return names


def _cut(stem: str) -> str:
    """What of a name leaves room, in the 255 bytes of a file system, for an ending and for a temporary name's."""
    while len(os.fsencode(stem)) > _LONGEST_STEM:
        stem = stem[:-1]
    return stem


def _suffixes() -> set[str]:
    from PIL import Image

    readable = Image.registered_extensions().items()
    return {suffix for suffix, format in readable if format in Image.OPEN and format not in ("PDF", "MPEG", "HDF5")}
