"""Interleaved timing: on a machine whose speed swings, only contenders measured side by side can be compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any

import torch

Contenders = dict[str, Callable[[], Any]]


def percentiles(samples: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in seconds."""
    fifths = quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    return {"p20": fifths[1], "p50": fifths[4], "p80": fifths[7]}


def measure(benchmark: Any, contenders: Contenders, *, rounds: int, memory: bool = False) -> None:
    """Benchmarks ``contenders["vico_ext"]``; before each round every other contender runs once, timed the same way.

    ``benchmark.extra_info`` gets p20/p50/p80 of every contender and, if ``memory``, the peak of what one run allocates
    beyond its inputs, in bytes.
    """
    ours = contenders["vico_ext"]
    others = {name: fn for name, fn in contenders.items() if name != "vico_ext"}
    samples: dict[str, list[float]] = {name: [] for name in others}
    for fn in contenders.values():  # warm-up: compilation, caches, first touches
        fn()

    def run_others() -> None:
        for name, fn in others.items():
            start = time.perf_counter()
            fn()
            samples[name].append(time.perf_counter() - start)

    benchmark.pedantic(ours, setup=run_others, rounds=rounds, iterations=1)
    times = {name: percentiles(values) for name, values in samples.items()}
    times["vico_ext"] = percentiles(list(benchmark.stats.stats.data))
    benchmark.extra_info["times"] = times
    if memory:
        benchmark.extra_info["peak_bytes"] = {name: peak_extra_bytes(fn) for name, fn in contenders.items()}


def peak_extra_bytes(fn: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator held during fn() beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
