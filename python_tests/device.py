"""Where the tests run: ``VICO_TEST_DEVICE=cuda`` makes CUDA torch's default device, and its absence an error."""

from __future__ import annotations

import os

import pytest
import torch

from vico_ext import _C

__all__ = ["DEVICE", "configure", "cpu_only", "sort_out"]

DEVICE = os.environ.get("VICO_TEST_DEVICE", "cpu")

# Tests that no device changes; they have run on the CPU.
CPU_FILES = {
    "test_checkpoint.py": "files",
    "test_cli.py": "the command line",
    "test_cuda_on_host.py": "kernels run on the CPU",
    "test_import_error.py": "imports",
    "test_readme.py": "the README's examples as they stand",
    "test_tiling.py": "pictures",
    "test_vision_tower.py": "files and pictures",
    "test_visualize.py": "pictures",
}


def cpu_only(reason: str) -> pytest.MarkDecorator:
    """Marks what can only be tested on the CPU."""
    return pytest.mark.cpu_only(reason)


def configure() -> None:
    """Sets the default device; fails where it is not to be had."""
    if DEVICE not in ("cpu", "cuda"):
        raise pytest.UsageError(f"VICO_TEST_DEVICE is cpu or cuda, got {DEVICE!r}")
    if DEVICE == "cpu":
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError("VICO_TEST_DEVICE=cuda, but torch sees no CUDA device")
    if _C.cuda in ("", "host"):
        raise pytest.UsageError("VICO_TEST_DEVICE=cuda, but vico_ext was built without CUDA kernels")
    torch.set_default_device("cuda")


def sort_out(items: list[pytest.Item]) -> None:
    """Skips CPU tests on CUDA, and CUDA tests elsewhere."""
    for item in items:
        if DEVICE == "cpu":
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: VICO_TEST_DEVICE=cuda"))
            continue
        mark = item.get_closest_marker("cpu_only")
        reason = mark.args[0] if mark else CPU_FILES.get(item.path.name)
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"on the CPU only: {reason}"))
