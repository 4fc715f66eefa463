"""Versions and build facts, for ``vico info`` and for every report."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from vico_ext import __version__
from vico_ext._load import _C

__all__ = ["build_facts", "versions"]


def versions() -> dict[str, str | None]:
    """Versions of what takes part in a result; None for optional packages that are not installed."""
    found: dict[str, str | None] = {
        "vico_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for package in ("transformers", "pillow", "safetensors", "tqdm"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def build_facts() -> dict[str, Any]:
    """What was built, and what this machine makes of it."""
    ops = sorted({name.removeprefix("vico::") for name in torch._C._dispatch_get_all_op_names() if "vico::" in name})
    return {
        "compiler": _C.compiler,
        "instruction_set": _C.cpu_arch(),
        "ops": ops,
        "cpu_threads": torch.get_num_threads(),
        "cuda_kernels": _C.cuda.split(),  # architectures, as CMake names them; ["host"] in the test build
        "cuda_available": torch.cuda.is_available(),
        "platform": platform.platform(),
    }
