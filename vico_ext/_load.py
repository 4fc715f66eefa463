"""Loads the compiled ops, and turns a failure to do so into causes and cures."""

from __future__ import annotations

import importlib
from types import ModuleType

_OLDEST_TORCH = (2, 11)


class CompiledOpsError(ImportError):
    """The compiled part of vico_ext could not be loaded; the message says what to do."""


def _import_torch() -> ModuleType:
    try:
        torch = importlib.import_module("torch")  # loads libtorch_cpu, which _C needs by its name alone
    except ImportError as error:
        raise CompiledOpsError(
            f"vico_ext needs PyTorch, and `import torch` failed: {error}.\nInstall it: pip install 'torch>=2.11'"
        ) from error
    version = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in torch.__version__.split(".")[:2])
    if version < _OLDEST_TORCH:
        raise CompiledOpsError(
            f"vico_ext needs torch 2.11 or newer, found {torch.__version__} in {torch.__path__[0]}.\n"
            "Upgrade it: pip install -U 'torch>=2.11'"
        )
    return torch


def _import_compiled() -> ModuleType:
    torch = _import_torch()
    try:
        return importlib.import_module("vico_ext._C")
    except ModuleNotFoundError as error:
        if error.name != "vico_ext._C":
            raise
        raise CompiledOpsError(
            "vico_ext is here, its compiled ops (vico_ext._C) are not. Usual causes:\n"
            "  - Python runs in the source folder and picks up the sources instead of the installed package:\n"
            "    change to another folder, or install in place with `pip install -e .`.\n"
            "  - It was built for another Python version: reinstall with this one, `pip install --force-reinstall .`"
        ) from error
    except ImportError as error:
        raise CompiledOpsError(
            f"The compiled ops of vico_ext do not load with torch {torch.__version__}: {error}.\nUsual causes:\n"
            "  - 'undefined symbol': the ops were built against a newer torch, or this torch is damaged:\n"
            "    rebuild against the torch that is installed, `pip install --force-reinstall --no-deps .`.\n"
            "  - 'GLIBC' or 'GLIBCXX not found': they were built on a newer system: rebuild on this machine.\n"
            "  - 'cannot open shared object file': the torch package is incomplete: reinstall torch."
        ) from error


_C = _import_compiled()
