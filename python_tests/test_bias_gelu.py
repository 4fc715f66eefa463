"""bias_gelu: bias, exact GELU and dropout in one pass."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES
from tolerance import LOW_PRECISION, assert_as_accurate

from vico_ext import functional as VF

op = torch.ops.vico.bias_gelu
op_ = torch.ops.vico.bias_gelu_
op_backward = torch.ops.vico.bias_gelu_backward


def _eager(x, bias):
    return F.gelu(x if bias is None else x + bias)


@st.composite
def problems(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from(DTYPES))
    shape = [*draw(st.lists(st.integers(0, 5), max_size=2)), draw(st.integers(1, 70) | st.integers(1020, 1060))]
    x = torch.randn(shape, dtype=torch.float32).mul(draw(st.sampled_from([0.1, 1.0, 4.0]))).to(dtype)
    layout = draw(st.sampled_from(["dense", "strided", "offset"]))
    if layout == "strided":
        x = x.repeat_interleave(2, -1)[..., ::2]
    elif layout == "offset":
        x = torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(shape)
    bias = torch.randn(shape[-1]).to(dtype) if draw(st.booleans()) else None
    return x, bias


def _assert_within_roundings(got, exact, scale):
    """Off by a few roundings of values as large as ``scale``: few elements make no average to compare with torch's."""
    atol = 8 * torch.finfo(got.dtype).eps * float(scale)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=atol)


def _largest(*tensors):
    return sum(float(t.detach().abs().amax()) for t in tensors if t is not None and t.numel())


@given(problems())
@settings(deadline=None, max_examples=150)
def test_any_shape_and_stride(problem):
    x, bias = problem
    exact = _eager(x.double(), None if bias is None else bias.double())
    got = VF.bias_gelu(x, bias)
    assert got.dtype == x.dtype
    _assert_within_roundings(got, exact, _largest(x, bias))
    dense = x.clone(memory_format=torch.contiguous_format)
    op_(dense, bias)
    assert torch.equal(dense, got)


@given(problems())
@settings(deadline=None, max_examples=100)
def test_gradients_of_any_shape_and_stride(problem):
    x, bias = problem
    grad_out = torch.randn(x.shape).to(x.dtype)

    def gradients(fn, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (x, bias) if t is not None]
        out = fn(inputs[0], inputs[1] if bias is not None else None)
        return torch.autograd.grad(out, inputs, grad_out.to(dtype))

    for got, exact in zip(gradients(VF.bias_gelu, x.dtype), gradients(_eager, torch.float64), strict=True):
        assert got.dtype == x.dtype
        # The derivative and its slope are of the order of 1; a bias's gradient is a sum over rows.
        rows = x.numel() // max(got.numel(), 1)
        _assert_within_roundings(got, exact, _largest(grad_out) * (1 + _largest(x, bias)) * max(rows, 1))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_many_elements_are_as_accurate_as_torchs(dtype):
    x, bias = torch.randn(200, 300).to(dtype), torch.randn(300).to(dtype)
    grad_out = torch.randn(200, 300).to(dtype)

    def results(fn, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (x, bias)]
        out = fn(*inputs)
        return (out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(dtype)))

    for got, eager, exact in zip(
        results(VF.bias_gelu, dtype), results(_eager, dtype), results(_eager, torch.float64), strict=True
    ):
        assert_as_accurate(got, eager, exact)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("low", [-14, -6, -3, -1, -0.01, 0, 1, 5])
def test_every_range_of_x(dtype, low):
    x = torch.linspace(low, low + 1, 4001).to(dtype)
    exact = x.double() * torch.special.ndtr(x.double())
    # Below -5, torch's own 1 + erf(x) has no correct digit left: there the bar is a relative error by itself.
    if low < -1:
        normal = exact.abs() > 4 * torch.finfo(dtype).tiny
        rounding = max(torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(VF.bias_gelu(x).double()[normal], exact[normal], rtol=4 * rounding, atol=0)
    else:
        assert_as_accurate(VF.bias_gelu(x), F.gelu(x), exact)


@pytest.mark.parametrize("low", [-37, -27, -14, -6, -3, -1, -0.01, 0, 1, 5])
def test_every_range_of_x_in_double(low):
    x = torch.linspace(low, low + 1, 4001, dtype=torch.float64).requires_grad_()
    cdf = torch.tensor([0.5 * math.erfc(-v * math.sqrt(0.5)) for v in x.tolist()], dtype=torch.float64)
    density = torch.exp(-0.5 * x.detach() ** 2) * (2 * torch.pi) ** -0.5
    # The references round x^2 / 2 in their exponents, up to 700 units in the last place.
    rtol = torch.finfo(torch.float64).eps * (16 + float((x.detach() ** 2).max()))
    out = VF.bias_gelu(x)
    torch.testing.assert_close(out.detach(), x.detach() * cdf, rtol=rtol, atol=0)
    (grad,) = torch.autograd.grad(out.sum(), x)
    # The gradient crosses zero near x = -0.75, where its terms cancel.
    torch.testing.assert_close(grad, cdf + x.detach() * density, rtol=4 * rtol, atol=4e-16 if low >= -1 else 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    """As x Phi(x) and Phi(x) + x phi(x) in IEEE arithmetic; F.gelu's own infinities differ between instruction sets."""
    big = 1e30 if dtype != torch.float16 else 6e4
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([inf, -inf, nan, 0.0, big, -big] * 3, dtype=dtype, requires_grad=True)
    out = VF.bias_gelu(x)
    want = torch.tensor([inf, nan, nan, 0.0, big, 0.0] * 3, dtype=dtype)
    torch.testing.assert_close(out.detach(), want, rtol=0, atol=0, equal_nan=True)
    (grad,) = torch.autograd.grad(out.sum(), x)
    want = torch.tensor([nan, nan, nan, 0.5, 1.0, 0.0] * 3, dtype=dtype)
    torch.testing.assert_close(grad, want, rtol=4 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


def test_float32_bias_beside_16_bit_x():
    x = torch.randn(9, 33).bfloat16().requires_grad_()
    bias = torch.randn(33, requires_grad=True)
    out = VF.bias_gelu(x, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), _eager(x.double(), bias.double()), rtol=2**-8, atol=1e-6)
    assert torch.autograd.grad(out.sum(), bias)[0].dtype == torch.float32


# ---- dropout

MASK = 0xFFFFFFFF


def philox4x32_10(counter: list[int], key: tuple[int, int]) -> list[int]:
    """Salmon et al. 2011, in plain integers."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (second >> 32) ^ b ^ k0, second & MASK, (first >> 32) ^ d ^ k1, first & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [a, b, c, d]


def expected_words(seed: int, count: int) -> list[int]:
    """The random word of each element: element e takes word (e % 32) / 8 of counter (e / 32) * 8 + e % 8."""
    key = (seed & MASK, (seed >> 32) & MASK)
    return [philox4x32_10([e // 32 * 8 + e % 8, 0, 0, 0], key)[e % 32 // 8] for e in range(count)]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, (MASK, MASK), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_in_plain_integers_gives_random123s_known_answers(counter, key, words):
    assert philox4x32_10(counter, key) == words


@pytest.mark.parametrize("seed", [0, 7, 0x299F31D0A4093822, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mask_is_philoxs(seed, dtype):
    x = torch.ones(3, 70, dtype=dtype)
    words = torch.tensor(expected_words(seed, x.numel()), dtype=torch.float64).view_as(x)
    for p in (0.1, 0.5, 0.9):
        out = op(x, None, torch.tensor([seed]), p)
        assert torch.equal(out != 0, words < (1 - p) * 2**32)
        kept = out[out != 0]
        torch.testing.assert_close(kept, F.gelu(torch.ones_like(kept)) / (1 - p))


@pytest.mark.parametrize(("element", "word"), [(0, 0x6627E8D5), (8, 0xE169C58D), (16, 0xBC57AC4C), (24, 0x9B00DBD8)])
def test_known_answer_to_the_last_bit(element, word):
    x, seed = torch.ones(32), torch.tensor([0])
    assert op(x, None, seed, 1 - (word + 1) / 2**32)[element] != 0
    assert op(x, None, seed, 1 - word / 2**32)[element] == 0


def test_mask_depends_on_the_element_alone():
    seed = torch.tensor([3])
    flat = op(torch.ones(5 * 1100), None, seed, 0.3)
    assert torch.equal(op(torch.ones(5, 1100), None, seed, 0.3).flatten(), flat)
    assert torch.equal(op(torch.ones(1100, 5), torch.zeros(5), seed, 0.3).flatten(), flat)
    assert torch.equal(op(torch.ones(2000), None, seed, 0.3), flat[:2000])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_statistics(p):
    rows = torch.stack([op(torch.ones(1 << 16), None, torch.tensor([s]), p) != 0 for s in range(16)]).double()
    # Five standard deviations of a binomial share, of the total and of the agreement of different seeds.
    assert abs(rows.mean() - (1 - p)) < 5 * (p * (1 - p) / rows.numel()) ** 0.5
    agree = (rows[1:] == rows[:-1]).double().mean()
    assert abs(agree - (p * p + (1 - p) ** 2)) < 5 * (0.25 / rows[1:].numel()) ** 0.5
    neighbours = (rows[:, 1:] == rows[:, :-1]).double().mean()
    assert abs(neighbours - (p * p + (1 - p) ** 2)) < 5 * (0.25 / rows.numel()) ** 0.5


def test_dropping_all_and_none():
    x = torch.randn(4, 40)
    assert torch.equal(VF.bias_gelu(x, dropout_p=1.0, training=True), torch.zeros_like(x))
    assert torch.equal(VF.bias_gelu(x, dropout_p=0.5), VF.bias_gelu(x))


def test_manual_seed_governs_the_mask():
    x = torch.ones(4, 40)
    torch.manual_seed(1)
    first, second = (VF.bias_gelu(x, dropout_p=0.5, training=True) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(VF.bias_gelu(x, dropout_p=0.5, training=True), first)
    assert not torch.equal(first, second)


def test_gradcheck():
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([11])
    assert torch.autograd.gradcheck(lambda x, b: op(x, b), (x, bias))
    assert torch.autograd.gradcheck(lambda x, b: op(x, b, seed, 0.4), (x, bias))
    assert torch.autograd.gradcheck(lambda x: op(x, None, seed, 0.4), (x,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x = torch.randn(3, 5, 7, dtype=dtype)
    bias, seed = torch.randn(7, dtype=dtype), torch.tensor([5])
    for arguments in ((None, None, 0.0), (bias, None, 0.0), (bias, seed, 0.2)):
        torch.library.opcheck(op_.default, (x.clone(), *arguments))
        torch.library.opcheck(op_backward.default, (x, x, *arguments))
        leaves = [t.clone().requires_grad_() if t is bias else t for t in arguments]
        torch.library.opcheck(op.default, (x.clone().requires_grad_(), *leaves))


def test_two_runs_are_bit_equal_on_any_number_of_threads():
    x, bias = torch.randn(700, 300, requires_grad=True), torch.randn(300, requires_grad=True)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (2, 1, 2):
            torch.set_num_threads(count)
            out = op(x, bias, torch.tensor([1]), 0.1)
            runs.append((out, *torch.autograd.grad(out.square().sum(), (x, bias))))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6), (6, 0)])
def test_empty(shape):
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    out = VF.bias_gelu(x, bias)
    assert out.shape == shape
    grads = torch.autograd.grad(out.sum(), (x, bias))
    assert torch.equal(grads[1], torch.zeros_like(bias))


def test_backward_leaves_its_inputs_alone():
    x, bias, grad_out = torch.randn(4, 9), torch.randn(9), torch.randn(4, 9)
    kept = [t.clone() for t in (grad_out, x, bias)]
    op_backward(grad_out, x, bias, torch.tensor([1]), 0.5)
    assert all(torch.equal(a, b) for a, b in zip(kept, (grad_out, x, bias), strict=True))


def test_compiles_whole_with_dropout_and_dynamic_rows():
    def loss(x, bias):
        return VF.bias_gelu(x, bias, dropout_p=0.5, training=True)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (3, 8):
        x, bias = torch.randn(rows, 64, requires_grad=True), torch.randn(64, requires_grad=True)
        out = compiled(x, bias)
        kept = out != 0
        torch.testing.assert_close(out[kept], (2 * F.gelu(x + bias))[kept])
        assert 0.2 < kept.double().mean() < 0.8
        # The backward pass draws the same mask: gradients vanish just where the output does.
        (grad_x,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(grad_x != 0, kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(3)), r"bias must have shape \[features\] = \[4\], got \[3\]"),
        ((torch.zeros(2, 4), torch.zeros(4, dtype=torch.float64)), "bias must have the dtype of the activations"),
        ((torch.zeros(2, 4, dtype=torch.int64),), "x must be float32, .* got int64"),
        ((torch.tensor(1.0),), r"x must have shape \[..., features\], got \[\]"),
        ((torch.zeros(2), None, None, 0.5), "dropout 0.5 needs a seed"),
        ((torch.zeros(2), None, torch.zeros(2, dtype=torch.int64), 0.5), r"seed must have shape \[1\]"),
        ((torch.zeros(2), None, torch.zeros(1), 0.5), "seed must be int64, got float32"),
        ((torch.zeros(2), None, torch.tensor([1]), 1.5), r"dropout must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_tensors(arguments, message):
    for each in (op, op_):
        with pytest.raises(RuntimeError, match=message):
            each(*arguments)


def test_bad_calls():
    with pytest.raises(RuntimeError, match="x must be contiguous to be changed in place"):
        op_(torch.zeros(4, 3).t())
    with pytest.raises(RuntimeError, match=r"grad_out must have the shape of x, \[2, 4\], got \[2, 3\]"):
        op_backward(torch.zeros(2, 3), torch.zeros(2, 4), None, None, 0.0)
    with pytest.raises(ValueError, match=r"dropout_p must lie in \[0, 1\], got -0.1"):
        VF.bias_gelu(torch.zeros(2), dropout_p=-0.1)
