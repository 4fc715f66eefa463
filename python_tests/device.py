"""Where the tests run: ``VICO_TEST_DEVICE=cuda`` makes CUDA torch's default device, and its absence an error."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from vico_ext import _C

__all__ = ["DEVICE", "configure", "cpu_only", "ends_the_device", "give_up_if_lost", "hold", "sort_out", "value_case"]

DEVICE = os.environ.get("VICO_TEST_DEVICE", "cpu")

# Tests that no device changes; they have run on the CPU.
CPU_FILES = {
    "test_checkpoint.py": "files",
    "test_cli.py": "the command line",
    "test_convert.py": "files",
    "test_cuda_conformance.py": "a GPU's record, compared on the CPU",
    "test_cuda_on_host.py": "kernels run on the CPU",
    "test_demo_trained.py": "the command line",
    "test_examples.py": "examples as they stand, on the CPU",
    "test_import_error.py": "imports",
    "test_readme.py": "the README's examples as they stand",
    "test_reproduce.py": "files and pictures",
    "test_reproduce_report.py": "files and pictures",
    "test_internvl_processor.py": "transformers' processor, which works on the CPU",
    "test_tiling.py": "pictures",
    "test_vision_tower.py": "files and pictures",
    "test_visualize.py": "pictures",
}


def cpu_only(reason: str) -> pytest.MarkDecorator:
    """Marks what can only be tested on the CPU."""
    return pytest.mark.cpu_only(reason)


# Values that only the kernels look at: on CUDA their check ends the process's use of the device, and with it every test
# after this one. test_device_checks.py has one such value per check, each in a process of its own.
ends_the_device = cpu_only("a device-side check ends the use of the device")


def value_case(*arguments: Any) -> Any:
    """A parametrized test's case with such a value."""
    return pytest.param(*arguments, marks=ends_the_device)


_lost: list[str] = []  # the test that ended the use of the device


def hold(name: str) -> None:
    """Waits for the kernels of the test of that name; fails it where they ended the use of the device."""
    if DEVICE == "cpu":
        return
    try:
        torch.cuda.synchronize()
        return
    except RuntimeError as error:
        said = str(error).splitlines()[0]
    _lost.append(name)
    pytest.fail(f"{name} ended this process's use of the GPU: {said}", pytrace=False)


def give_up_if_lost() -> None:
    """Ends a process that can use the device no more, so that one test fails and not all that would follow.

    A worker of pytest-xdist is replaced; it names the same test as the one it crashed in.
    """
    if not _lost:
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
    pytest.exit(f"{_lost[0]} ended the use of the GPU, the tests after it did not run", returncode=1)


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
