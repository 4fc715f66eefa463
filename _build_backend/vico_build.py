"""PEP 517 backend: scikit-build-core, compiled against the torch that is already installed.

``pip install .`` builds in isolation, where torch is out of sight; asking for it in ``build-system.requires`` would
download gigabytes to read a few headers. An isolated build still runs the target environment's interpreter, so the
installed torch is found through ``sysconfig``; only an environment without any torch asks pip for one.

``VICO_EXT_TORCH_DIR`` names the torch package folder to build against; ``VICO_EXT_TORCH_REQ`` the requirement asked for
where none is installed (default ``torch>=2.11``).
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import Any

from scikit_build_core import build as _backend
from scikit_build_core.build import (  # noqa: F401  (hooks that need no change)
    build_sdist,
    get_requires_for_build_sdist,
)

# Present from torch 2.9 on: the LibTorch stable ABI, all that the extension compiles against.
_STABLE_ABI_HEADER = Path("include/torch/csrc/stable/library.h")


def _torch_folder() -> str | None:
    """The folder of an installed torch with the stable ABI, found without importing it."""
    candidates = [os.environ.get("VICO_EXT_TORCH_DIR")]
    spec = importlib.util.find_spec("torch")  # found under --no-build-isolation
    if spec is not None and spec.submodule_search_locations:
        candidates.append(next(iter(spec.submodule_search_locations)))
    candidates += [os.path.join(sysconfig.get_path(key), "torch") for key in ("platlib", "purelib")]
    return next((c for c in candidates if c and (Path(c) / _STABLE_ABI_HEADER).is_file()), None)


def _with_torch(requires: list[str]) -> list[str]:
    return requires if _torch_folder() else [*requires, os.environ.get("VICO_EXT_TORCH_REQ", "torch>=2.11")]


def _export_torch_folder() -> None:
    folder = _torch_folder()
    if folder:
        os.environ["VICO_EXT_TORCH_DIR"] = folder


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _with_torch(_backend.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _with_torch(_backend.get_requires_for_build_editable(config_settings))


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    _export_torch_folder()
    return _backend.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    _export_torch_folder()
    return _backend.build_editable(wheel_directory, config_settings, metadata_directory)
