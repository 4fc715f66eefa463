"""pack_tokens: both connectors' rows in tile order, with their biases."""

from __future__ import annotations

import pytest
import torch
from device import value_case
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES
from tolerance import assert_as_accurate

from vico_ext import functional as VF
from vico_ext.routing import RoutingPlan

op = torch.ops.vico.pack_tokens
op_backward = torch.ops.vico.pack_tokens_backward
op_in_place = torch.ops.vico.pack_tokens_


def _expected(full, compressed, plan, full_bias=None, compressed_bias=None):
    full = full if full_bias is None else full + full_bias
    compressed = compressed if compressed_bias is None else compressed + compressed_bias
    tiles = dict(zip(plan.order.tolist(), [*full, *compressed], strict=True))
    return torch.cat([full[:0].flatten(0, 1), *(tiles[t] for t in range(plan.tiles))])


@st.composite
def problems(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    compress = torch.tensor(draw(st.lists(st.booleans(), max_size=7)), dtype=torch.bool)
    small = draw(st.integers(1, 5))
    tokens = (small + draw(st.integers(1, 70)), small)
    plan = RoutingPlan.from_compress(compress, tokens)
    hidden, dtype = draw(st.integers(1, 37)), draw(st.sampled_from(DTYPES))
    full = torch.randn(plan.full_tiles, tokens[0], hidden).to(dtype)
    compressed = torch.randn(plan.compressed_tiles, tokens[1], hidden).to(dtype)
    if draw(st.booleans()):
        full = full.transpose(1, 2).contiguous().transpose(1, 2)
    biases = [torch.randn(hidden).to(dtype) if draw(st.booleans()) else None for _ in range(2)]
    return full, compressed, plan, *biases


@given(problems())
@settings(deadline=None, max_examples=150)
def test_bit_equal_to_torch(problem):
    got = VF.pack_tokens(*problem)
    assert torch.equal(got, _expected(*problem))
    assert got.is_contiguous()


def _places(plan, spare=1):
    """Rows for each tile, the last tile's first, with `spare` rows before each; and how many rows that takes."""
    counts = plan.cu_tokens.diff().tolist()
    places, rows = [0] * plan.tiles, spare
    for t in reversed(range(plan.tiles)):
        places[t], rows = rows, rows + counts[t] + spare
    return torch.tensor(places, dtype=torch.int64), rows


@given(problems(), st.integers(0, 2), st.integers(0, 9))
@settings(deadline=None, max_examples=150)
def test_in_place_is_bit_equal_and_writes_nothing_else(problem, spare, padding):
    full, compressed, plan, *biases = problem
    first_row, rows = _places(plan, spare)
    hidden = full.shape[2]
    buffer = torch.randn(rows, hidden + padding).to(full.dtype)
    want, out = buffer.clone(), buffer[:, :hidden]
    packed = _expected(*problem)
    for t, row in enumerate(first_row.tolist()):
        tile = packed[plan.cu_tokens[t] : plan.cu_tokens[t + 1]]
        want[row : row + len(tile), :hidden] = tile
    assert VF.pack_tokens_(out, full, compressed, plan, first_row, *biases) is out
    assert torch.equal(buffer, want)


@given(problems())
@settings(deadline=None, max_examples=100)
def test_gradients_as_accurate_as_torch(problem):
    dtype = problem[0].dtype
    grad_out = torch.randn(problem[2].total_tokens, problem[0].shape[2]).to(dtype)

    def gradients(fn, dtype, grad_out=grad_out):
        leaves = [t.to(dtype).requires_grad_() if isinstance(t, torch.Tensor) else t for t in problem]
        inputs = [t for t in leaves if isinstance(t, torch.Tensor)]
        grads = torch.autograd.grad(fn(*leaves), inputs, grad_out.to(dtype), allow_unused=fn is _expected)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]

    ours, eager, exacts = (
        gradients(VF.pack_tokens, dtype),
        gradients(_expected, dtype),
        gradients(_expected, torch.float64),
    )
    sizes = gradients(_expected, torch.float64, grad_out.abs())
    for i, (got, torchs, exact, terms) in enumerate(zip(ours, eager, exacts, sizes, strict=True)):
        assert got.dtype == dtype
        if i < 2:
            assert torch.equal(got, torchs)
        else:
            assert_as_accurate(got, torchs, exact, roundings=8, terms=terms)


def test_float32_bias_beside_16_bit_rows():
    plan = RoutingPlan.from_compress(torch.tensor([True, False]), (4, 1))
    bias = torch.randn(3, requires_grad=True)
    out = VF.pack_tokens(torch.zeros(1, 4, 3).bfloat16(), torch.zeros(1, 1, 3).bfloat16(), plan, bias)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.cat([torch.zeros(1, 3), bias.expand(4, 3)]).bfloat16())
    assert torch.autograd.grad(out.sum(), bias)[0].dtype == torch.float32


def _arguments(dtype=torch.float64, requires_grad=False):
    plan = RoutingPlan.from_compress(torch.tensor([False, True, True, False, True]), (4, 2))
    shapes = ((2, 4, 3), (3, 2, 3), (3,), (3,))
    tensors = [torch.randn(s, dtype=dtype, requires_grad=requires_grad) for s in shapes]
    return (*tensors, plan.cu_tokens, plan.order)


def test_gradcheck():
    *inputs, cu_tokens, order = _arguments(requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: op(*t, cu_tokens, order), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    full, compressed, full_bias, _, *plan = _arguments(dtype, requires_grad=True)
    torch.library.opcheck(op.default, (full, compressed, full_bias, None, *plan))
    torch.library.opcheck(op_backward.default, (torch.randn(14, 3, dtype=dtype), *plan, 2, 4, 2))
    rows = [t.detach() for t in (full, compressed, full_bias)]
    places = torch.tensor([1, 12, 5, 8, 15])
    torch.library.opcheck(op_in_place.default, (torch.randn(17, 3, dtype=dtype), *rows, None, places, plan[1]))


def test_two_runs_are_bit_equal_on_any_number_of_threads():
    plan = RoutingPlan.from_compress(torch.rand(9) < 0.5)
    grad_out = torch.randn(plan.total_tokens, 50)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (2, 1, 2):
            torch.set_num_threads(count)
            runs.append(op_backward(grad_out, plan.cu_tokens, plan.order, plan.full_tiles, *plan.tokens))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


BIG = 2**62


@pytest.mark.parametrize(
    ("change", "message"),
    [
        value_case({"order": [0, 3, 1, 2, 2]}, r"order must hold each tile of \[0, 5\) once, got 2 at position 4"),
        value_case({"order": [0, 3, 1, 2, 5]}, r"order must hold each tile of \[0, 5\) once, got 5 at position 4"),
        value_case({"order": [-1, 3, 1, 2, 4]}, "got -1 at position 0"),
        value_case(
            {"order": [1, 3, 0, 2, 4]}, "gives tile 1 rows 4 to 6, but it is a full tile of 4 tokens: .* another batch"
        ),
        ({"order": [0, 3, 1, 2]}, r"order must have shape \[full tiles \+ compressed tiles\] = \[5\], got \[4\]"),
        ({"cu_tokens": [0, 4, 6, 8, 12]}, r"cu_tokens must have shape .* = \[6\], got \[5\]"),
        value_case({"cu_tokens": [1, 5, 7, 9, 13, 15]}, "cu_tokens must begin with 0, got 1"),
        value_case(
            {"cu_tokens": [0, 4, 6, 8, 12, 15]}, "gives tile 4 rows 12 to 15, but it is a compressed tile of 2 tokens"
        ),
        value_case({"cu_tokens": [0, 4, 6, -BIG * 2, BIG, BIG + 2]}, "is the plan of another batch"),
    ],
)
def test_plan_of_another_batch(change, message):
    full, compressed, _, _, *plan = _arguments()
    cu_tokens, order = (
        torch.tensor(change[name]) if name in change else t
        for name, t in zip(("cu_tokens", "order"), plan, strict=True)
    )
    with pytest.raises(RuntimeError, match=message):
        op(full, compressed, None, None, cu_tokens, order)
    with pytest.raises(RuntimeError):
        op_backward(torch.zeros(14, 3), cu_tokens, order, 2, 4, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compressed": torch.zeros(3, 2, 4)}, r"compressed must have shape .* = \[\*, \*, 3\], got \[3, 2, 4\]"),
        ({"compressed": torch.zeros(3, 2, 3).half()}, "compressed must have the dtype of full"),
        ({"full": torch.zeros(2, 4)}, r"full must have shape \[full tiles, tokens, hidden\]"),
        ({"full_bias": torch.zeros(4)}, r"full_bias must have shape \[hidden\] = \[3\], got \[4\]"),
        ({"compressed_bias": torch.zeros(3).double()}, "compressed_bias must have the dtype of the activations"),
        ({"order": torch.zeros(5, dtype=torch.int32)}, "order must be int64, got int32"),
    ],
)
def test_bad_tensors(change, message):
    names = ("full", "compressed", "full_bias", "compressed_bias", "cu_tokens", "order")
    arguments = {**dict(zip(names, _arguments(torch.float32), strict=True)), **change}
    with pytest.raises(RuntimeError, match=message):
        op(*arguments.values())


def test_tokens_of_another_plan():
    plan = RoutingPlan.from_compress(torch.tensor([False, True]), (4, 1))
    with pytest.raises(ValueError, match=r"full must have shape \[1, 4, H\] for this plan of 2 tiles"):
        VF.pack_tokens(torch.zeros(2, 4, 3), torch.zeros(0, 1, 3), plan)
    with pytest.raises(ValueError, match=r"compressed must have shape \[1, 1, H\].* got \[1, 2, 3\]"):
        VF.pack_tokens(torch.zeros(1, 4, 3), torch.zeros(1, 2, 3), plan)


def test_compiles_whole_with_dynamic_tiles():
    compiled = torch.compile(VF.pack_tokens, fullgraph=True, dynamic=True)
    for compress in ([True, False, False, True], [False, True, False, True, True, True]):
        plan = RoutingPlan.from_compress(torch.tensor(compress), (4, 2))
        full, compressed = torch.randn(plan.full_tiles, 4, 6), torch.randn(plan.compressed_tiles, 2, 6)
        assert torch.equal(compiled(full, compressed, plan), _expected(full, compressed, plan))


# ---- in place


def test_in_place_refuses_to_lose_a_gradient():
    full, compressed, full_bias, compressed_bias, cu_tokens, _ = _arguments(requires_grad=True)
    plan = RoutingPlan.from_compress(torch.tensor([False, True, True, False, True]), (4, 2))
    out, rows = torch.zeros(14, 3, dtype=torch.float64), (full, compressed, plan, cu_tokens[:-1].contiguous())
    message = r"pack_tokens_ writes in place and has no gradient, but out, full, .* require one: use pack_tokens, or"
    with pytest.raises(ValueError, match=message):
        VF.pack_tokens_(out, *rows, full_bias, compressed_bias)
    with torch.no_grad():
        VF.pack_tokens_(out, *rows, full_bias, compressed_bias)
    assert torch.equal(out, VF.pack_tokens(full, compressed, plan, full_bias, compressed_bias))
    with pytest.raises(ValueError, match=r"full must have shape \[2, 4, H\] for this plan of 5 tiles"):
        VF.pack_tokens_(out, compressed, *rows[1:])


OUT = torch.zeros(14, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        value_case({"order": [0, 3, 1, 2, 2]}, r"order must hold each tile of \[0, 5\) once, got 2 at position 4"),
        value_case({"first_row": [-1, 4, 6, 8, 12]}, "tile 0 rows from -1 on, but it has 4 tokens, and out 14 rows"),
        value_case({"first_row": [0, 4, 6, 11, 8]}, "tile 3 rows from 11 on, but it has 4 tokens, and out 14 rows"),
        value_case({"first_row": [0, 4, 6, 8, BIG * 2 - 1]}, "but it has 2 tokens, and out 14 rows"),
        value_case({"first_row": [0, 4, 4, 8, 12]}, "rows 4 to 6, and some of them to another tile too"),
        value_case({"first_row": [0, 3, 6, 8, 12]}, "rows .*, and some of them to another tile too"),
        ({"first_row": [0, 4, 6, 8]}, r"first_row must have shape .* = \[5\], got \[4\]"),
        ({"first_row": torch.zeros(10).long()[::2]}, "first_row must be contiguous"),
        ({"first_row": torch.zeros(5)}, "first_row must be int64, got float32"),
        ({"out": OUT.double()}, r"out must have the dtype of full \(float32\), got float64"),
        ({"out": OUT[:, :2]}, r"out must have shape \[rows, hidden\] = \[\*, 3\], got \[14, 2\]"),
        ({"out": OUT.view(3, 14).t()}, "out is written in place and must have its channels next to each other"),
        ({"out": torch.zeros(3).expand(14, 3)}, "out is written in place and its rows must not overlap, got stride 0"),
        ({"full": OUT[:8].view(2, 4, 3)}, r"full must not share memory with out, .* pass full.clone\(\)"),
        ({"compressed": OUT[8:].view(3, 2, 3)}, "compressed must not share memory with out"),
        ({"compressed_bias": OUT[13]}, "compressed_bias must not share memory with out"),
    ],
)
def test_bad_places(change, message):
    full, compressed, full_bias, compressed_bias, cu_tokens, order = _arguments(torch.float32)
    good = {"out": OUT, "full": full, "compressed": compressed, "full_bias": full_bias}
    good |= {"compressed_bias": compressed_bias, "first_row": cu_tokens[:-1].contiguous(), "order": order}
    op_in_place(*good.values())
    changed = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in change.items()}
    with pytest.raises(RuntimeError, match=message):
        op_in_place(*{**good, **changed}.values())
