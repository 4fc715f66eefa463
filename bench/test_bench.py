"""Runs the cases of cases.py; `--smoke` runs each once at a tiny size, to show that they work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, SMOKE, Case
from interleaved import measure


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case(case: Case, benchmark: Any, request: pytest.FixtureRequest) -> None:
    smoke = request.config.getoption("--smoke")
    torch._dynamo.reset()  # each case compiles for its own sizes
    torch.manual_seed(0)
    contenders = case.build(SMOKE if smoke else case.size, case.tiles)
    if smoke:
        contenders.pop("compiled", None)
    benchmark.group = case.name
    benchmark.extra_info |= {"case": case.name, "size": case.size.name, "tiles": case.tiles}
    measure(benchmark, contenders, rounds=2 if smoke else case.rounds, memory=case.memory)
