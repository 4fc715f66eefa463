"""The reference's hidden states on disk: one file per line of the data, so that no second model is held."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from vico_ext._files import replacing

__all__ = ["ReferenceCache"]

_PER_FOLDER = 1000


class ReferenceCache:
    """Hidden states ``[N, H]`` of each line's answer tokens.

    Args:
        folder: that holds them.
        made_of: what they depend on; written at the first use, compared at every other.

    Raises:
        ValueError: the folder's were made of something else.
    """

    def __init__(self, folder: Path, made_of: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        about, wanted = folder / "cache.json", json.loads(json.dumps(dict(made_of)))
        if about.is_file():
            found = json.loads(about.read_text(encoding="utf-8"))
            changed = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            if changed:
                raise ValueError(
                    f"{folder} was made with another {', '.join(changed)}: choose another reference_cache, or remove it"
                )
        else:
            with replacing(about) as temporary:
                temporary.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")

    def path(self, line: int) -> Path:
        """The file of a line."""
        return self.folder / f"{line // _PER_FOLDER:06d}" / f"{line}.safetensors"

    def holds(self, line: int) -> bool:
        """Whether a line's hidden states are there; they are complete if so."""
        return self.path(line).is_file()

    def read(self, line: int) -> Tensor:
        """A line's hidden states."""
        return load_file(self.path(line))["hidden"]

    def write(self, line: int, hidden: Tensor) -> None:
        """Keeps a line's hidden states."""
        path = self.path(line)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            save_file({"hidden": hidden.detach().cpu().contiguous()}, temporary)
