"""Fixtures: the golden file of the released semantics, deterministic random inputs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import device
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden" / "flash_v32_h48.safetensors"


# Pythons that tests start must not look for the package in the current folder: the sources have no compiled ops.
os.environ["PYTHONSAFEPATH"] = "1"


def pytest_configure() -> None:
    device.configure()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    device.sort_out(items)


@pytest.hookimpl(trylast=True)  # after the results have been handed on
def pytest_runtest_logfinish() -> None:
    device.give_up_if_lost()


@dataclass(frozen=True)
class Golden:
    """Inputs, weights and fp64 outputs of the released semantics at small sizes."""

    weights: dict[str, Tensor]
    data: dict[str, Tensor]
    meta: dict[str, str]

    def __getitem__(self, key: str) -> Tensor:
        return self.data[key]

    def weights_as(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {k: w.to(dtype) for k, w in self.weights.items()}


@pytest.fixture(scope="session")
def golden() -> Golden:
    with safe_open(GOLDEN, "pt") as f:
        tensors = {key: f.get_tensor(key).to(device.DEVICE) for key in f.keys()}  # noqa: SIM118 (not a dict)
        meta = f.metadata()
    prefix = "weight/"
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return Golden(weights, {k: v for k, v in tensors.items() if not k.startswith(prefix)}, meta)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    yield
    device.hold(request.node.nodeid)
