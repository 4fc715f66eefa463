"""skinny_linear: linear layers of few rows, plain and grouped."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import LOW_PRECISION, assert_as_accurate, relative_error

from vico_ext import functional as VF

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
op = torch.ops.vico.skinny_linear


def _expected(x, weight, bias=None):
    """One linear map per group in fp64; without groups, one."""
    x, weight = x.double(), weight.double()
    y = x @ weight.t() if x.dim() == 2 else torch.einsum("mgk,gnk->mgn", x, weight)
    return y if bias is None else y + bias.double()


def _dense(t):
    return t


def _transposed(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def _padded(t):
    """A view into a wider buffer that is NaN outside the view."""
    wide = t.new_full((*t.shape[:-2], t.shape[-2] + 1, t.shape[-1] + 3), torch.nan)
    wide[..., 1:, 2:-1] = t
    return wide[..., 1:, 2:-1]


def _padded_transposed(t):
    return _padded(t.transpose(-1, -2)).transpose(-1, -2)


def _every_other(t):
    """Neither dimension dense."""
    return t.repeat_interleave(2, -1)[..., ::2]


LAYOUTS = st.sampled_from([_dense, _transposed, _padded, _padded_transposed, _every_other])


@st.composite
def problems(draw, dtypes=DTYPES):
    torch.manual_seed(draw(st.integers(0, 2**20)))
    # 512 elements of a row, 32 or 64 features and 4 x 3 outputs are pieces of the kernel's work: sizes around them.
    rows = draw(st.integers(0, 13))
    features = draw(st.integers(0, 10) | st.sampled_from([31, 32, 33, 63, 64, 65, 70]))
    depth = draw(st.integers(0, 20) | st.sampled_from([63, 64, 65, 130, 511, 512, 513, 1030]))
    groups = draw(st.sampled_from([(), (), (1,), (3,)]))
    dtype = draw(st.sampled_from(dtypes))
    x = draw(LAYOUTS)(torch.randn(rows, *groups, depth).to(dtype))
    weight = draw(LAYOUTS)(torch.randn(*groups, features, depth).to(dtype))
    bias = draw(st.sampled_from([None, torch.randn(*groups, features).to(dtype)]))
    return x, weight, bias


@given(problems())
@settings(deadline=None, max_examples=150)
def test_matches_reference(problem):
    got, want = op(*problem), _expected(*problem)
    assert got.dtype == problem[0].dtype
    assert got.is_contiguous()
    assert got.shape == want.shape
    # A sum's error grows with what was summed, not with the sum, which may cancel.
    x, weight, bias = (t if t is None else t.double().abs() for t in problem)
    bound = 4 * torch.finfo(got.dtype).eps * _expected(x, weight, bias)
    assert ((got.double() - want).abs() <= bound).all()


@given(problems(dtypes=(torch.float64,)))
@settings(deadline=None, max_examples=60)
def test_gradients_match_reference(problem):
    leaves = [t.detach().requires_grad_() for t in problem if t is not None]
    grad = torch.randn_like(_expected(*leaves))
    for got, want in zip(
        torch.autograd.grad(op(*leaves), leaves, grad),
        torch.autograd.grad(_expected(*leaves), leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(("depth", "features"), [(1024, 96), (12800, 96)])
def test_accuracy_at_real_sizes(dtype, depth, features):
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((8, depth), (features, depth), (features,)))
    want = F.linear(x.double(), weight.double(), bias.double())
    assert_as_accurate(VF.skinny_linear(x, weight, bias), F.linear(x, weight, bias), want)
    transposed = weight.t().contiguous().t()
    assert_as_accurate(op(x, transposed, bias), F.linear(x, transposed, bias), want)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("groups", [(), (4,)])
def test_accuracy_of_gradients(dtype, groups):
    values = [torch.randn(s).to(dtype) for s in ((8, *groups, 200), (*groups, 60, 200), (*groups, 60))]
    grad = torch.randn(8, *groups, 60).to(dtype)

    def gradients(fn, kind):
        leaves = [t.to(kind).requires_grad_() for t in values]
        return torch.autograd.grad(fn(*leaves), leaves, grad.to(kind))

    def plain(x, weight, bias):
        return torch.einsum("m...k,...nk->m...n", x, weight) + bias

    for got, eager, exact in zip(
        gradients(op, dtype), gradients(plain, dtype), gradients(plain, torch.float64), strict=True
    ):
        assert_as_accurate(got, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [_dense, _transposed])
@pytest.mark.parametrize("groups", [(), (2,)])
def test_bits_of_a_row_depend_on_nothing_but_the_row(dtype, layout, groups):
    x, weight, bias = torch.randn(70, *groups, 700), layout(torch.randn(*groups, 75, 700)), torch.randn(*groups, 75)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = op(x, weight, bias)
        torch.set_num_threads(2)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 70):
            assert torch.equal(op(x[-rows:], weight, bias), want[-rows:])
    finally:
        torch.set_num_threads(before)


def test_uninitialised_memory_is_not_read():
    x, weight = torch.randn(5, 77), torch.randn(9, 77)
    want = op(x, weight), op(x, _transposed(weight))
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        assert torch.equal(op(x, weight), want[0])
        assert torch.equal(op(x, _transposed(weight)), want[1])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_functional_takes_any_number_of_rows_and_dimensions(dtype):
    weight, bias = torch.randn(7, 12).to(dtype), torch.randn(7).to(dtype)
    for shape in ((12,), (0, 12), (2, 3, 12), (40, 12), (100, 12)):
        x = torch.randn(shape).to(dtype)
        got, want = VF.skinny_linear(x, weight, bias), _expected(x.reshape(-1, 12), weight, bias)
        assert got.shape == (*shape[:-1], 7)
        assert relative_error(got.reshape(-1, 7), want) <= 4 * torch.finfo(dtype).eps
    assert torch.equal(VF.skinny_linear(x, weight, bias), F.linear(x, weight, bias))  # beyond the own kernel's rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x = torch.randn(3, 11, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 11, dtype=dtype, requires_grad=True)
    bias = torch.randn(5, dtype=dtype, requires_grad=True)
    torch.library.opcheck(op.default, (x, weight, bias))
    torch.library.opcheck(op.default, (x, weight.detach()))
    x = torch.randn(3, 2, 11, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 5, 11, dtype=dtype, requires_grad=True)
    torch.library.opcheck(op.default, (x, weight, torch.randn(2, 5, dtype=dtype)))


def test_gradcheck():
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (5, 7), (5,)))
    assert torch.autograd.gradcheck(op, (x, weight, bias))
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 7), (2, 5, 7), (2, 5)))
    assert torch.autograd.gradcheck(op, (x, weight, bias))


def test_compiles_whole():
    compiled = torch.compile(lambda x, w, b: VF.skinny_linear(x, w, b) * 2, fullgraph=True, dynamic=True)
    weight, bias = torch.randn(7, 12), torch.randn(7)
    for rows in (2, 5, 70):
        x = torch.randn(rows, 12)
        torch.testing.assert_close(compiled(x, weight, bias), VF.skinny_linear(x, weight, bias) * 2)


def test_autocast():
    x, weight, bias = torch.randn(3, 12), torch.randn(7, 12), torch.randn(7)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = VF.skinny_linear(x, weight, bias)
    assert torch.equal(got, VF.skinny_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((3, 12), (7, 11), None, r"weight must have shape \[features, 12\] to fit x of shape \[3, 12\], got \[7, 11\]"),
        ((3, 12), (2, 7, 12), None, r"weight must have shape \[features, 12\] .* got \[2, 7, 12\]"),
        ((3, 12), (7, 12), (1,), r"bias must have shape \[7\], got \[1\]"),
    ],
)
def test_bad_arguments(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        VF.skinny_linear(torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias))


def test_bad_tensors():
    x, weight, bias = torch.zeros(3, 12), torch.zeros(7, 12), torch.zeros(7)
    for args, message in (
        ((x.int(), weight), "x must be float32, .* got int32"),
        ((x, weight.double()), r"weight must have the dtype of x \(float32\), got float64"),
        ((x, weight, bias.half()), r"bias must have the dtype of x \(float32\), got float16"),
        ((x[0], weight), r"x must have shape \[rows, depth\] or \[rows, groups, depth\] .*, got \[12\]"),
        ((x, weight[:, 1:]), r"weight must have shape \[features, depth\] = \[\*, 12\], got \[7, 11\]"),
        ((x, weight, bias[1:]), r"bias must have shape \[features\] = \[7\], got \[6\]"),
        ((x[:, None], weight), r"weight must have shape \[groups, features, depth\] = \[1, \*, 12\], got \[7, 12\]"),
        ((x[:, None], weight[None], bias), r"bias must have shape \[groups, features\] = \[1, 7\], got \[7\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*args)
