"""Two chains side by side in a CUDA graph, by the streams they ask torch for; test_cuda.py captures one on a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from vico_ext.functional.branch import Branch


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda with a stream that is being captured; what happens is in ``log``."""
    log: list[str] = []
    main = Stream("main", log)

    @contextlib.contextmanager
    def stream(s: Stream):
        log.append(f"on {s.name}")
        yield
        log.append("back")

    state = SimpleNamespace(log=log, capturing=True, x=SimpleNamespace(is_cuda=True, device="cuda:7"))
    monkeypatch.setattr(Branch, "_side", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", log))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def test_a_captured_branch_runs_beside_and_is_joined(cuda):
    result = SimpleNamespace(record_stream=lambda s: cuda.log.append(f"result kept for {s.name}"))
    with torch.no_grad():
        branch = Branch(cuda.x)
        del cuda.log[:]  # of the question whether there is a capture
        with branch:
            cuda.log.append("work")
        branch.join(result)
    assert cuda.log == [
        "side waits for main",
        "on side",
        "work",
        "back",
        "main waits for side",
        "result kept for main",
    ]


def test_an_error_leaves_no_branch_open(cuda):
    with torch.no_grad(), pytest.raises(ZeroDivisionError), Branch(cuda.x):
        raise ZeroDivisionError
    assert cuda.log[-1] == "main waits for side"


def test_elsewhere_the_work_comes_first(cuda):
    def log_of(like) -> list[str]:
        del cuda.log[:]
        with Branch(like) as branch:
            pass
        branch.join(torch.zeros(2))
        return [line for line in cuda.log if "side" in line]

    assert log_of(cuda.x) == []  # a gradient might be recorded
    with torch.no_grad():
        cuda.capturing = False
        assert log_of(cuda.x) == []
        assert log_of(torch.zeros(2)) == []
