"""normalized_shuffle: gather, pixel shuffle and LayerNorm in one pass."""

from __future__ import annotations

import pytest
import torch
from device import value_case
from hypothesis import given, settings
from strategies import DTYPES, shuffle_problems
from tolerance import assert_as_accurate

from vico_ext import functional as VF
from vico_ext import reference

op = torch.ops.vico.normalized_shuffle


def _parameters(problem, dtype):
    channels = problem["rate"] ** 2 * problem["tokens"].shape[2]
    return torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)


def _ours(problem, weight, bias, **change):
    p = {**problem, **change}
    rest = {k: v for k, v in p.items() if k not in ("tokens", "rate")}
    return VF.normalized_shuffle(p["tokens"], weight, bias, p["rate"], **rest)


def _expected(problem, weight, bias, **change):
    p = {**problem, **change}
    return reference.normalized_shuffle(
        p["tokens"],
        weight,
        bias,
        p["rate"],
        grid=p["grid"],
        tile_index=p["tile_index"],
        skip=int(p["has_cls"]),
        version=p["ps_version"],
    )


@pytest.mark.parametrize(("name", "rate"), [("mlp1.0", 2), ("mlp2.0", 4)])
def test_golden(golden, name, rate):
    weight, bias = golden.weights[f"{name}.weight"].double(), golden.weights[f"{name}.bias"].double()
    shuffled = golden[f"shuffle_{rate}x{rate}_tile0"].double()
    want = torch.nn.functional.layer_norm(shuffled, shuffled.shape[-1:], weight, bias, 1e-5)
    got = VF.normalized_shuffle(golden["vit_tokens"][:1].double(), weight, bias, rate)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@given(shuffle_problems())
@settings(deadline=None, max_examples=120)
def test_as_accurate_as_torch(problem):
    tokens = problem["tokens"]
    weight, bias = _parameters(problem, tokens.dtype)
    exact = _expected(problem, weight.double(), bias.double(), tokens=tokens.double())
    got = _ours(problem, weight, bias)
    assert got.dtype == tokens.dtype
    assert got.is_contiguous()
    # A row of few channels is all rounding error: its variance is a difference of nearly equal numbers.
    if problem["rate"] ** 2 * tokens.shape[2] >= 8:
        assert_as_accurate(got, _expected(problem, weight, bias), exact, roundings=8)


def _gradients(fn, inputs, grad_out):
    return torch.autograd.grad(fn(*inputs), inputs, grad_out)


@given(shuffle_problems())
@settings(deadline=None, max_examples=60)
def test_gradients_match_reference(problem):
    tokens = problem["tokens"].double().requires_grad_()
    weight, bias = (t.requires_grad_() for t in _parameters(problem, torch.float64))
    grad_out = torch.randn_like(_expected(problem, weight, bias, tokens=tokens))
    # One channel has no variance: there the gradient is 1 / sqrt(eps) times rounding error.
    if grad_out.shape[2] == 1:
        return
    got = _gradients(lambda t, w, b: _ours(problem, w, b, tokens=t), (tokens, weight, bias), grad_out)
    want = _gradients(lambda t, w, b: _expected(problem, w, b, tokens=t), (tokens, weight, bias), grad_out)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [2, 4])
def test_gradients_as_accurate_as_torch(dtype, rate):
    tokens = torch.randn(4, 1 + 16 * 16, 12).to(dtype)
    weight, bias = (torch.randn(rate * rate * 12).to(dtype) for _ in range(2))
    index = torch.tensor([3, 0, 1])
    grad_out = torch.randn(3, 256 // rate**2, rate * rate * 12).to(dtype)

    def gradients(fn, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (tokens, weight, bias)]
        return _gradients(lambda t, w, b: fn(t, w, b, rate, tile_index=index), inputs, grad_out.to(dtype))

    ours, eager = gradients(VF.normalized_shuffle, dtype), gradients(reference.normalized_shuffle, dtype)
    exact = gradients(reference.normalized_shuffle, torch.float64)
    for got, torchs, want in zip(ours, eager, exact, strict=True):
        assert got.dtype == dtype
        assert_as_accurate(got, torchs, want)


def test_large_mean_does_not_cancel():
    tokens = torch.randn(2, 17, 64) + 1000
    weight, bias = torch.ones(256), torch.zeros(256)
    exact = reference.normalized_shuffle(tokens.double(), weight.double(), bias.double(), 2)
    eager = reference.normalized_shuffle(tokens, weight, bias, 2)
    assert_as_accurate(VF.normalized_shuffle(tokens, weight, bias, 2), eager, exact)


def test_float32_parameters_beside_16_bit_tokens():
    tokens = torch.randn(2, 17, 8).bfloat16().requires_grad_()
    weight, bias = torch.randn(32, requires_grad=True), torch.randn(32, requires_grad=True)
    out = VF.normalized_shuffle(tokens, weight, bias, 2)
    assert out.dtype == torch.bfloat16
    exact = reference.normalized_shuffle(tokens.double(), weight.double(), bias.double(), 2)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)
    grads = torch.autograd.grad(out.sum(), (tokens, weight, bias))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_grad_tokens_is_skipped_where_not_needed():
    tokens, index = torch.randn(3, 17, 4), torch.tensor([2, 0])
    weight, bias = torch.randn(16), torch.randn(16)
    out, mean, rstd = op(tokens, weight, bias, 1e-5, 4, 4, 2, index, 1)
    arguments = (torch.randn_like(out), tokens, weight, mean, rstd, 4, 4, 2, index, 1, False)
    empty, *without = torch.ops.vico.normalized_shuffle_backward(*arguments, False)
    grad_tokens, *with_tokens = torch.ops.vico.normalized_shuffle_backward(*arguments, True)
    assert empty.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(without, with_tokens, strict=True))
    assert torch.equal(grad_tokens[1], torch.zeros(17, 4))
    assert torch.equal(grad_tokens[:, 0], torch.zeros(3, 4))
    assert (grad_tokens[[0, 2], 1:] != 0).any(-1).all()


@pytest.mark.parametrize("index", [None, torch.tensor([], dtype=torch.long)])
def test_empty_gives_zero_gradients(index):
    tokens = torch.randn(0 if index is None else 2, 17, 4, requires_grad=True)
    weight, bias = torch.randn(16, requires_grad=True), torch.randn(16, requires_grad=True)
    out = VF.normalized_shuffle(tokens, weight, bias, 2, tile_index=index)
    assert out.shape == (0, 4, 16)
    for grad, like in zip(torch.autograd.grad(out.sum(), (tokens, weight, bias)), (tokens, weight, bias), strict=True):
        assert torch.equal(grad, torch.zeros_like(like))


def test_two_runs_are_bit_equal_on_any_number_of_threads():
    tokens = torch.randn(3, 1 + 32 * 32, 40, requires_grad=True)
    weight, bias = torch.randn(160, requires_grad=True), torch.randn(160, requires_grad=True)
    index = torch.tensor([1, 2, 1])
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (2, 1, 2):
            torch.set_num_threads(count)
            out = VF.normalized_shuffle(tokens, weight, bias, 2, tile_index=index)
            runs.append((out, *torch.autograd.grad(out.square().sum(), (tokens, weight, bias))))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    tokens = torch.randn(3, 17, 5, dtype=dtype, requires_grad=True)
    for rate, index, transposed in ((2, None, False), (4, torch.tensor([2, 0, 2]), True)):
        weight, bias = (torch.randn(rate * rate * 5, dtype=dtype, requires_grad=True) for _ in range(2))
        torch.library.opcheck(op.default, (tokens, weight, bias, 1e-5, 4, 4, rate, index, 1, transposed))


@pytest.mark.parametrize("need_grad_tokens", [False, True])
def test_opcheck_backward(need_grad_tokens):
    tokens, weight, bias = torch.randn(3, 17, 5), torch.randn(20), torch.randn(20)
    out, mean, rstd = op(tokens, weight, bias, 1e-5, 4, 4, 2, None, 1)
    arguments = (out, tokens, weight, mean, rstd, 4, 4, 2, None, 1, False, need_grad_tokens)
    torch.library.opcheck(torch.ops.vico.normalized_shuffle_backward.default, arguments)


def test_gradcheck():
    tokens = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    index = torch.tensor([1, 0, 1])
    assert torch.autograd.gradcheck(
        lambda t, w, b: VF.normalized_shuffle(t, w, b, 2, grid=(2, 4), tile_index=index), (tokens, weight, bias)
    )


def test_inputs_and_grad_out_are_left_alone():
    tokens, weight, bias = torch.randn(2, 17, 4), torch.randn(16), torch.randn(16)
    grad_out = torch.randn(2, 4, 16)
    kept = [t.clone() for t in (tokens, weight, bias, grad_out)]
    leaves = [t.requires_grad_() for t in (tokens, weight, bias)]
    VF.normalized_shuffle(*leaves, 2).backward(grad_out)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*leaves, grad_out), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(15)}, r"weight must have shape \[rate \* rate \* channels\] = \[16\], got \[15\]"),
        ({"bias": torch.zeros(4, 4)}, r"bias must have shape .* got \[4, 4\]"),
        ({"weight": torch.zeros(16, dtype=torch.float64)}, "weight must have the dtype of the activations, or float32"),
        ({"weight": torch.zeros(16, dtype=torch.bfloat16)}, "weight must have the dtype of the activations.*bfloat16"),
        ({"eps": -1.0}, "eps must not be negative, got -1"),
        value_case(
            {"tile_index": torch.tensor([5])},
            r"tile_index must lie in \[0, 2\), got 5 at position 0",
        ),
        ({"tokens": torch.zeros(2, 17, 4, dtype=torch.int32)}, "tokens must be float32, .* got int32"),
    ],
)
def test_bad_tensors(change, message):
    arguments = {"tokens": torch.zeros(2, 17, 4), "weight": torch.zeros(16), "bias": torch.zeros(16), **change}
    with pytest.raises(RuntimeError, match=message):
        VF.normalized_shuffle(**arguments)


def test_bad_grid():
    with pytest.raises(ValueError, match="square grid after the CLS token, got 15"):
        VF.normalized_shuffle(torch.zeros(1, 16, 4), torch.zeros(16), torch.zeros(16))
