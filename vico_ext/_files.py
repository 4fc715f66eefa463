"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "replacing_all", "sync_folder"]


@contextmanager
def replacing_all(*, entry_points: Sequence[Path] = ()) -> Iterator[Callable[[Path], Path]]:
    """Yields ``stage(path)``, which gives a temporary path beside `path` to write to; all take their places at the end.

    Everything is on disk before anything takes its place; then the `entry_points` go, and the staged files are renamed
    in the order they were staged. So with the new entry point staged last, a reader that starts at an entry point finds
    the old files, nothing, or the new files, never a mixture. An exception leaves the old files as they were.
    """
    staged: list[tuple[Path, Path]] = []
    modes: dict[Path, int] = {}

    def stage(path: Path) -> Path:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        temporary.touch()
        staged.append((temporary, path))
        modes[temporary] = temporary.stat().st_mode
        return temporary

    try:
        yield stage
        for temporary, _ in staged:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, modes[temporary])  # safetensors replaces the file by one that only its owner may read
        for path in entry_points:
            path.unlink(missing_ok=True)
        for temporary, path in staged:
            os.replace(temporary, path)
        for folder in {path.parent for _, path in staged}:
            sync_folder(folder)
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what was written there replaces `path` in one step, or never."""
    with replacing_all() as stage:
        yield stage(path)


def sync_folder(path: Path) -> None:
    """Makes renames last through a power failure, where the system can open folders."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
