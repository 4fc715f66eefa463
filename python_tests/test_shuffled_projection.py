"""shuffle_statistics and shuffled_projection: LayerNorm folded into a layer that reads the ViT's tokens as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from device import value_case
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, shuffle_problems
from tolerance import LOW_PRECISION, assert_as_accurate, assert_rounded

from vico_ext import functional as VF
from vico_ext import reference

statistics = torch.ops.vico.shuffle_statistics
op = torch.ops.vico.shuffled_projection

HALVES = (torch.bfloat16, torch.float16)
EPS = 1e-5


def layout_of(problem):
    """Grid, rate, tile index, skip and transposed: what follows the tensors in both ops' arguments."""
    has_cls, transposed = int(problem["has_cls"]), problem["ps_version"] == "v1"
    return (*problem["grid"], problem["rate"], problem["tile_index"], has_cls, transposed)


def shuffled(problem):
    """The rows that the view shows, [selected, out tokens, channels], in float64."""
    return reference.pixel_shuffle(
        problem["tokens"].double(),
        problem["rate"],
        grid=problem["grid"],
        tile_index=problem["tile_index"],
        skip=int(problem["has_cls"]),
        version=problem["ps_version"],
    )


def double(tensors):
    return [t if t is None else t.double() for t in tensors]


# ---- statistics


@given(shuffle_problems())
@settings(deadline=None, max_examples=100)
def test_statistics_are_normalized_shuffles(problem):
    tokens = problem["tokens"]
    mean, rstd = statistics(tokens, EPS, *layout_of(problem))
    channels = problem["rate"] ** 2 * tokens.shape[2]
    ones = tokens.new_ones(channels)
    _, same_mean, same_rstd = torch.ops.vico.normalized_shuffle(tokens, ones, ones, EPS, *layout_of(problem))
    assert torch.equal(mean, same_mean)
    assert torch.equal(rstd, same_rstd)
    wanted = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    assert mean.dtype == rstd.dtype == wanted
    rows = shuffled(problem)
    torch.testing.assert_close(mean.double(), rows.mean(-1), rtol=1e-5, atol=1e-6)
    exact = ((rows - rows.mean(-1, keepdim=True)).square().mean(-1) + EPS).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-4, atol=0)


def test_statistics_of_a_large_mean_do_not_cancel():
    tokens = torch.randn(2, 17, 64) + 1000
    _, rstd = statistics(tokens, EPS, 4, 4, 2, None, 1)
    rows = reference.pixel_shuffle(tokens.double(), 2)
    torch.testing.assert_close(rstd.double(), (rows.var(-1, correction=0) + EPS).rsqrt(), rtol=1e-5, atol=0)


# ---- the layer


@st.composite
def layers(draw):
    """A view of tokens with statistics, weight, gain_sum and bias that have nothing to do with each other."""
    problem = draw(shuffle_problems())
    dtype, columns = problem["tokens"].dtype, draw(st.integers(1, 40))
    rows = shuffled(problem)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    depth = rows.shape[-1]
    mean, rstd = torch.randn(rows.shape[:-1]).to(sums), torch.rand(rows.shape[:-1]).to(sums)
    weight, gain_sum = (torch.randn(columns, depth) / depth**0.5).to(dtype), torch.randn(columns).to(sums)
    bias = draw(st.sampled_from([None, torch.randn(columns).to(dtype), torch.randn(columns).to(sums)]))
    return problem, (mean, rstd, weight, gain_sum, bias)


def formula(rows, mean, rstd, weight, gain_sum, bias):
    z = rstd[..., None] * (rows @ weight.t() - mean[..., None] * gain_sum)
    return z if bias is None else z + bias


def eager(x, weight, bias, gelu):
    z = F.linear(x, weight, bias)
    return F.gelu(z) if gelu else z


@given(layers(), st.booleans(), st.sampled_from([None, (3, 5), (0,), (1, 2, 2)]), st.integers(1, 40), st.booleans())
@settings(deadline=None, max_examples=80)
def test_any_shape(layer, gelu, shape, columns, x_bias):
    problem, tensors = layer
    tokens = problem["tokens"]
    rows = ()
    if shape is not None:
        x, weight = torch.randn(*shape, 24).to(tokens.dtype), (torch.randn(columns, 24) / 5).to(tokens.dtype)
        rows = (x, weight, torch.randn(columns).to(tokens.dtype) if x_bias else None)
    out, other = op(tokens, *tensors, *layout_of(problem), gelu, *rows)
    exact = formula(shuffled(problem), *double(tensors))
    assert out.dtype == other.dtype == tokens.dtype
    assert out.is_contiguous()
    assert_rounded(out, F.gelu(exact) if gelu else exact)
    if rows:
        assert_rounded(other, eager(*double(rows), gelu))
    else:
        assert other.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_beside_it_change_nothing(dtype):
    tokens, x = torch.randn(2, 65, 16).to(dtype), torch.randn(2, 70, 72).to(dtype)
    mean, rstd = statistics(tokens, EPS, 8, 8, 2, None, 1)
    weight, other = torch.randn(24, 64).to(dtype), torch.randn(40, 72).to(dtype)
    arguments = (tokens, mean, rstd, weight, weight.to(mean.dtype).sum(1), None, 8, 8, 2, None, 1, False, True)
    alone, both = op(*arguments), op(*arguments, x, other)
    assert torch.equal(alone[0], both[0])
    torch.testing.assert_close(both[1], torch.ops.vico.projection(x, other, None, None, None, None, True)[0])


# ---- LayerNorm folded in


def parameters(depth, columns, dtype):
    gain, shift = 1 + 0.2 * torch.randn(depth), 0.2 * torch.randn(depth)
    weight, bias = torch.randn(columns, depth) / depth**0.5, torch.randn(columns)
    return [t.to(dtype) for t in (gain, shift, weight, bias)]


def run_folded(tokens, rate, tensors, side):
    folded = VF.fold_layer_norm(*tensors)
    mean, rstd = statistics(tokens, EPS, side, side, rate, None, 1)
    return op(tokens, mean, rstd, *folded, side, side, rate, None, 1, False, False)[0]


def run_layers(tokens, rate, gain, shift, weight, bias):
    rows = reference.pixel_shuffle(tokens, rate)
    return F.linear(F.layer_norm(rows, rows.shape[-1:], gain, shift, EPS), weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_folded_weights(dtype):
    gain, shift, weight, bias = parameters(48, 1030, dtype)
    folded = VF.fold_layer_norm(gain, shift, weight, bias)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(folded.weight, (weight.to(sums) * gain.to(sums)).to(dtype))
    assert folded.gain_sum.dtype == folded.bias.dtype == sums
    torch.testing.assert_close(folded.gain_sum, folded.weight.double().sum(1).to(sums))
    torch.testing.assert_close(folded.bias.double(), bias.double() + weight.double() @ shift.double())
    assert VF.fold_layer_norm(gain, shift, weight, bias, torch.float16).weight.dtype == torch.float16
    leaves = [t.requires_grad_() for t in (gain, shift, weight, bias)]
    assert not any(t.requires_grad for t in VF.fold_layer_norm(*leaves))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("rate", [2, 4])
@pytest.mark.parametrize("mean", [0.0, 1.0, 5.0])
def test_as_accurate_as_torch(dtype, rate, mean):
    tokens = (torch.randn(3, 65, 24) + mean).to(dtype)
    tensors = parameters(rate * rate * 24, 40, dtype)
    exact = run_layers(tokens.double(), rate, *double(tensors))
    got = run_folded(tokens, rate, tensors, 8)
    # In float32 the mean's part is of the roundings that torch has too; in 16 bits it is far below them.
    ratio = 2.0 if dtype != torch.float32 else 2.0 + mean
    assert_as_accurate(got, run_layers(tokens, rate, *tensors), exact, ratio=ratio)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("ratio", [30, 300, 3000])
def test_bound_for_tokens_of_a_large_mean(dtype, ratio):
    """As functional.connector's docstring has it: a row whose mean is far larger than its deviation loses digits."""
    std = 2.0**-4
    tokens = (std * (torch.randn(2, 65, 64) + ratio)).to(dtype)
    gain, shift, weight, bias = parameters(1024, 32, dtype)
    got = run_folded(tokens, 4, (gain, shift, weight, bias), 8).double()
    folded = VF.fold_layer_norm(gain, shift, weight, bias)
    rows, w = reference.pixel_shuffle(tokens.double(), 4), folded.weight.double()
    mean = rows.mean(-1, keepdim=True)
    rstd = ((rows - mean).square().mean(-1, keepdim=True) + EPS).rsqrt()
    exact = rstd * ((rows - mean) @ w.t()) + folded.bias.double()
    sums = rstd * (rows.abs() @ w.abs().t() + (mean * w.sum(1)).abs())
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-24 * (1024 / 8 + 16) * sums
    assert ((got - exact).abs() <= bound).all()
    if ratio == 3000 and dtype == torch.float16:
        torchs = run_layers(tokens, 4, gain, shift, weight, bias).double()
        exact = run_layers(tokens.double(), 4, *double((gain, shift, weight, bias)))
        assert (got - exact).norm() > (torchs - exact).norm()


# ---- what torch does to ops


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    tests = ("test_schema", "test_faketensor")
    tokens, weight = torch.randn(3, 17, 5, dtype=dtype), torch.randn(7, 20, dtype=dtype)
    for index, transposed in ((None, False), (torch.tensor([2, 0, 2, 1]), True)):
        layout = (4, 4, 2, index, 1, transposed)
        torch.library.opcheck(statistics.default, (tokens, EPS, *layout), test_utils=tests)
        mean, rstd = statistics(tokens, EPS, *layout)
        arguments = (tokens, mean, rstd, weight, mean.new_ones(7), None, *layout, True)
        torch.library.opcheck(op.default, arguments, test_utils=tests)
        rows = (torch.randn(2, 3, 6, dtype=dtype), torch.randn(9, 6, dtype=dtype), torch.randn(9, dtype=dtype))
        torch.library.opcheck(op.default, (*arguments, *rows), test_utils=tests)


def test_no_gradient():
    tokens = torch.randn(2, 17, 5, requires_grad=True)
    mean, rstd = statistics(tokens, EPS, 4, 4, 2, None, 1)
    with pytest.raises(NotImplementedError, match=r"vico::shuffle_statistics has no derivative: .* normalized_shuffle"):
        mean.sum().backward()
    weight = torch.randn(7, 20)
    out, _ = op(tokens, mean.detach(), rstd.detach(), weight, weight.sum(1), None, 4, 4, 2, None, 1, False, True)
    with pytest.raises(NotImplementedError, match=r"vico::shuffled_projection has no derivative: .* functional.connec"):
        out.sum().backward()


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(17, 4)}, r"tokens must have shape \[tiles, tokens, channels\], got \[17, 4\]"),
        ({"tokens": torch.zeros(2, 17, 4).int()}, "tokens must be float32, .* got int32"),
        ({"tokens": torch.zeros(2, 17, 0)}, r"tokens must have at least one channel, got shape \[2, 17, 0\]"),
        ({"eps": -1.0}, "eps must not be negative, got -1"),
        ({"grid_h": 3}, "the grid must be divisible by the rate, got a grid of 3 x 4 tokens at rate 2"),
        ({"skip": 2}, r"tokens must have shape .* = \[\*, 18, \*\], got \[2, 17, 4\]"),
        ({"tile_index": torch.tensor([0]).int()}, "tile_index must be int64, got int32"),
        value_case({"tile_index": torch.tensor([0, 2])}, r"tile_index must lie in \[0, 2\), got 2 at position 1"),
    ],
)
def test_bad_statistics(change, message):
    arguments = {"tokens": torch.zeros(2, 17, 4), "eps": EPS, "grid_h": 4, "grid_w": 4, "rate": 2, "skip": 1, **change}
    with pytest.raises(RuntimeError, match=message):
        statistics(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 17)}, r"tokens must have shape \[tiles, tokens, channels\], got \[2, 17\]"),
        ({"mean": torch.zeros(2, 4).double()}, "mean must be float32, got float64"),
        ({"rstd": torch.zeros(2, 3)}, r"rstd must have shape \[selected, out_tokens\] = \[2, 4\], got \[2, 3\]"),
        ({"tile_index": torch.tensor([1])}, r"mean must have shape \[selected, out_tokens\] = \[1, 4\], got \[2, 4\]"),
        ({"weight": torch.zeros(6, 15)}, r"weight must have shape .* = \[\*, 16\], got \[6, 15\]"),
        ({"weight": torch.zeros(6, 16).half()}, r"weight must have the dtype of tokens \(float32\), got float16"),
        ({"gain_sum": torch.zeros(5)}, r"gain_sum must have shape \[out features\] = \[6\], got \[5\]"),
        ({"gain_sum": torch.zeros(6).half()}, "gain_sum must be float32, got float16"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \[out features\] = \[6\], got \[5\]"),
        ({"bias": torch.zeros(6).double()}, "bias must have the dtype of the activations"),
        ({"x": torch.zeros(3, 8)}, "x needs x_weight, got None"),
        ({"x_weight": torch.zeros(3, 8)}, "x_weight needs x, got None"),
        ({"x": torch.zeros(3, 8).half(), "x_weight": torch.zeros(5, 8)}, "x must have the dtype of tokens"),
        ({"x": torch.zeros(3, 8), "x_weight": torch.zeros(5, 7)}, r"x_weight must have shape .*got \[5, 7\]"),
        ({"x": torch.zeros(3, 8), "x_weight": torch.zeros(5, 8), "x_bias": torch.zeros(4)}, "x_bias must have shape"),
    ],
)
def test_bad_layers(change, message):
    arguments = {
        **{"tokens": torch.zeros(2, 17, 4), "mean": torch.zeros(2, 4), "rstd": torch.zeros(2, 4)},
        **{"weight": torch.zeros(6, 16), "gain_sum": torch.zeros(6), "bias": None},
        **{"grid_h": 4, "grid_w": 4, "rate": 2, "tile_index": None, "skip": 1, "transposed": False, "gelu": True},
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        op(**arguments)
