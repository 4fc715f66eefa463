"""Interleaved timing on a GPU, and the two ceilings that times are held against."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from interleaved import Contenders, percentiles

__all__ = ["Timer", "ceilings"]


class Timer:
    """Times functions on a device: CUDA events around a call, with a cold L2 cache; a wall clock on the CPU.

    ``queued`` puts a wait of the device before the first event, so that the host has launched everything by the time
    the device begins: what a kernel takes, without what calling it costs. Only for calls that wait for nothing.
    """

    WAIT_CYCLES = 4_000_000  # about two milliseconds: autograd takes the host some hundred microseconds

    def __init__(self, device: str) -> None:
        self.device = device
        self.cuda = device == "cuda"
        # Twice the largest L2 cache there is: writing it leaves nothing else there.
        self._flush = torch.empty(128 << 20, dtype=torch.uint8, device=device) if self.cuda else None

    def once(self, fn: Callable[[], Any], queued: bool = False) -> float:
        """Seconds of one call. Host time counts where the device waits for it, unless ``queued``."""
        if self._flush is None:
            start = time.perf_counter()
            fn()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda.synchronize()
        if queued:
            torch.cuda._sleep(self.WAIT_CYCLES)
        begin.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def compare(self, contenders: Contenders, rounds: int, queued: bool = False) -> dict[str, dict[str, float]]:
        """p20, p50 and p80 of each contender: every round runs each once, after two for warming up."""
        for fn in contenders.values():
            fn()
            fn()
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, fn in contenders.items():
                samples[name].append(self.once(fn, queued))
        return {name: percentiles(values) for name, values in samples.items()}

    def peak_bytes(self, contenders: Contenders) -> dict[str, int]:
        """The most memory that one call takes beyond what is held before."""
        if not self.cuda:
            return {}
        peaks = {}
        for name, fn in contenders.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            fn()
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() - before
        return peaks


def ceilings(timer: Timer, smoke: bool) -> dict[str, float]:
    """Bytes per second of a large copy, read and written, and operations per second of a large bf16 product."""
    n, side = (1 << 16, 64) if smoke else (1 << 30, 8192)
    source, target = (torch.empty(n, dtype=torch.uint8, device=timer.device).fill_(3) for _ in range(2))
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=timer.device) for _ in range(2))
    times = timer.compare({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 3 if smoke else 15)
    return {
        "copy_bytes_per_second": 2 * n / times["copy"]["p50"],
        "product_operations_per_second": 2 * side**3 / times["product"]["p50"],
    }
