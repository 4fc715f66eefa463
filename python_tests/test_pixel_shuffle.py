"""pixel_shuffle: pure data movement, so every comparison is bit-equal."""

from __future__ import annotations

import pytest
import torch
from device import value_case
from hypothesis import given, settings
from strategies import DTYPES, shuffle_problems

from vico_ext import functional as VF
from vico_ext import reference

op = torch.ops.vico.pixel_shuffle


def test_golden(golden):
    tokens = golden["vit_tokens"][:1]
    assert torch.equal(VF.pixel_shuffle(tokens, 2)[0], golden["shuffle_2x2_tile0"])
    assert torch.equal(VF.pixel_shuffle(tokens, 4)[0], golden["shuffle_4x4_tile0"])


def _expected(problem):
    return reference.pixel_shuffle(
        problem["tokens"],
        problem["rate"],
        grid=problem["grid"],
        tile_index=problem["tile_index"],
        skip=int(problem["has_cls"]),
        version=problem["ps_version"],
    )


@given(shuffle_problems())
@settings(deadline=None, max_examples=150)
def test_matches_reference(problem):
    rest = {k: v for k, v in problem.items() if k not in ("tokens", "rate")}
    got = VF.pixel_shuffle(problem["tokens"], problem["rate"], **rest)
    assert torch.equal(got, _expected(problem))
    assert got.is_contiguous()


@given(shuffle_problems())
@settings(deadline=None, max_examples=60)
def test_backward_is_the_adjoint(problem):
    tokens = problem["tokens"].double().requires_grad_()
    problem = {**problem, "tokens": tokens}
    rest = {k: v for k, v in problem.items() if k not in ("tokens", "rate")}
    grad_out = torch.randn_like(_expected(problem))
    (got,) = torch.autograd.grad(VF.pixel_shuffle(tokens, problem["rate"], **rest), tokens, grad_out)
    (want,) = torch.autograd.grad(_expected(problem), tokens, grad_out)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)  # sums of repeated tiles may associate differently


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    tokens = torch.randn(3, 17, 5, dtype=dtype, requires_grad=True)
    torch.library.opcheck(op.default, (tokens, 4, 4, 2, None, 1))
    torch.library.opcheck(op.default, (tokens, 4, 4, 4, torch.tensor([2, 0, 2]), 1, True))


def test_gradcheck():
    tokens = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([1, 0, 1])
    assert torch.autograd.gradcheck(lambda t: op(t, 2, 4, 2, index, 1), (tokens,))


def test_compiles_whole_with_dynamic_tiles():
    compiled = torch.compile(lambda t: VF.pixel_shuffle(t, 2) * 2, fullgraph=True, dynamic=True)
    for tiles in (2, 3, 5):
        tokens = torch.randn(tiles, 17, 6)
        assert torch.equal(compiled(tokens), VF.pixel_shuffle(tokens, 2) * 2)


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ((17, 6), {}, r"tokens must have shape \[tiles, tokens, channels\], got \[17, 6\]"),
        ((1, 16, 6), {}, "square grid after the CLS token, got 15"),
        ((1, 17, 6), {"grid": (4, 5)}, r"grid \(4, 5\) needs 20 tokens per tile after the CLS token, got 16"),
        ((1, 10, 6), {}, r"grid \(3, 3\) must be divisible by the rate 2"),
        ((1, 17, 6), {"grid": (-4, -4)}, r"grid \(-4, -4\) must be divisible by the rate 2"),
        ((1, 17, 6), {"grid": 4}, "grid must be two numbers, rows and columns of the token grid, got 4"),
        ((1, 17, 6), {"grid": (4, 4, 1)}, r"grid must be two numbers, .* got \(4, 4, 1\)"),
        ((1, 17, 6), {"rate": 0}, "rate must be at least 1, got 0"),
        ((1, 17, 6), {"ps_version": "v3"}, "ps_version must be 'v1' or 'v2', got 'v3'"),
    ],
)
def test_bad_arguments(shape, kwargs, message):
    with pytest.raises(ValueError, match=message):
        VF.pixel_shuffle(torch.zeros(shape), **kwargs)


@pytest.mark.parametrize(
    ("tokens", "index", "message"),
    [
        value_case(
            torch.zeros(2, 17, 4),
            torch.tensor([2]),
            r"tile_index must lie in \[0, 2\), got 2 at position 0",
        ),
        (torch.zeros(2, 17, 4), torch.tensor([0], dtype=torch.int32), "tile_index must be int64, got int32"),
        (torch.zeros(2, 17, 4, dtype=torch.int64), None, "tokens must be float32, .* got int64"),
        (torch.zeros(2, 17, 4), torch.zeros(1, 1, dtype=torch.long), r"tile_index must have shape \[selected\]"),
    ],
)
def test_bad_tensors(tokens, index, message):
    with pytest.raises(RuntimeError, match=message):
        VF.pixel_shuffle(tokens, 2, tile_index=index)
