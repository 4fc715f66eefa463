"""How functions call ops: past the gradient formula where no gradient is recorded, and only there."""

from __future__ import annotations

import contextlib

import pytest
import torch

from vico_ext import functional as VF
from vico_ext.ops import call


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """One entry for each call that goes past the formulas."""
    seen: list[str] = []
    guard = call._BelowAutograd

    @contextlib.contextmanager
    def counted():
        seen.append("past")
        with guard():
            yield

    monkeypatch.setattr(call, "_BelowAutograd", counted)
    return seen


def test_past_the_formula_without_gradients_only(passes):
    x, bias = torch.randn(3, 8), torch.randn(8, requires_grad=True)
    recorded = VF.bias_gelu(x, bias)
    assert recorded.requires_grad
    assert not passes
    with torch.no_grad():
        plain = VF.bias_gelu(x, bias)
    assert not plain.requires_grad
    assert passes == ["past"]
    assert torch.equal(plain, recorded)


def test_gradients_inside_of_no_grad(passes):
    x = torch.randn(3, 8, requires_grad=True)
    with torch.no_grad(), torch.enable_grad():
        out = VF.bias_gelu(x)
    assert not passes
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_compilers_trace_the_plain_call(passes):
    x = torch.randn(3, 8)
    compiled = torch.compile(VF.bias_gelu, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = VF.bias_gelu(x)
        passes.clear()
        assert torch.equal(compiled(x), want)
    assert not passes
