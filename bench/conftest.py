"""Birth certificate of a benchmark run: what it ran on, added to pytest-benchmark's own machine and commit facts."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import torch

import vico_ext
from vico_ext import _C

THREADS = int(os.environ.get("VICO_BENCH_THREADS", "2"))


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--smoke", action="store_true", help="run every case once, tiny, without torch.compile")


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the host's name is nobody's business
    machine_info["vico_ext"] = vico_ext.__version__
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["kernels"] = _C.cpu_arch()
    machine_info["compiler"] = _C.compiler
    machine_info["python"] = platform.python_version()
    machine_info["command"] = " ".join(["pytest", *sys.argv[1:]])
