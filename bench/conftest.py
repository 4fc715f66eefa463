"""Birth certificate of a benchmark run: what it ran on, added to pytest-benchmark's own machine and commit facts."""

from __future__ import annotations

import ctypes
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


def keep_freed_memory() -> bool:
    """Has the C library keep large blocks that are freed, for every contender alike.

    By default glibc maps each new tensor of more than 32 MiB afresh, and the kernel zeroes its pages at first touch:
    whose output happened to land in memory that was mapped already would decide the ranking of ops that only move data.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))


KEEPS_FREED_MEMORY = keep_freed_memory()


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the host's name is nobody's business
    machine_info["vico_ext"] = vico_ext.__version__
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["keeps_freed_memory"] = KEEPS_FREED_MEMORY
    machine_info["kernels"] = _C.cpu_arch()
    machine_info["compiler"] = _C.compiler
    machine_info["python"] = platform.python_version()
    machine_info["command"] = " ".join(["pytest", *sys.argv[1:]])
