"""projection and packed_projection: one layer of both connectors, and the connector that is made of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE, ends_the_device
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES
from tolerance import LOW_PRECISION, assert_as_accurate, assert_rounded

import vico_ext
from vico_ext import functional as VF
from vico_ext import reference
from vico_ext.routing import RoutingPlan

op = torch.ops.vico.projection
packed_op = torch.ops.vico.packed_projection
in_place_op = torch.ops.vico.packed_projection_

HALVES = (torch.bfloat16, torch.float16)


def group(tiles, tokens, depth, columns, dtype=torch.float32, bias=True):
    x = torch.randn(tiles, tokens, depth).to(dtype)
    weight = (torch.randn(columns, depth) / max(depth, 1) ** 0.5).to(dtype)
    return x, weight, torch.randn(columns).to(dtype) if bias else None


def double(tensors):
    return [t if t is None else t.double() for t in tensors]


def eager(x, weight, bias, gelu):
    z = F.linear(x, weight, bias)
    return F.gelu(z) if gelu else z


sizes = st.integers(0, 3)
features = st.integers(1, 40) | st.sampled_from([64, 72, 136])


@given(st.sampled_from(DTYPES), sizes, sizes, features, features, sizes, features, st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_any_shape(dtype, tiles, tokens, depth, columns, other_tiles, other_depth, bias, gelu):
    full = group(tiles, tokens, depth, columns, dtype, bias)
    compressed = group(other_tiles, 2, other_depth, columns + 3, dtype, not bias)
    outs = op(*full, *compressed, gelu)
    for got, tensors in zip(outs, (full, compressed), strict=True):
        assert got.dtype == dtype
        assert_rounded(got, eager(*double(tensors), gelu))
    none = (None, None, None)
    for i, (alone, other) in enumerate(((op(*full, *none, gelu), 1), (op(*none, *compressed, gelu), 0))):
        torch.testing.assert_close(alone[i], outs[i])
        assert alone[other].shape == (0,)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_as_accurate_as_torch(dtype):
    full, compressed = group(2, 33, 128, 96, dtype), group(3, 9, 256, 96, dtype)
    for gelu in (False, True):
        outs = op(*full, *compressed, gelu)
        for got, tensors in zip(outs, (full, compressed), strict=True):
            assert_as_accurate(got, eager(*tensors, gelu), eager(*double(tensors), gelu))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_that_of_bias_gelu(dtype):
    full, compressed = group(2, 5, 24, 33, dtype), group(3, 7, 40, 45, dtype)
    seed = torch.tensor([2**40 + 7])
    got_full, got = op(*full, *compressed, True, seed, 0.3)
    assert torch.equal(got_full, op(*full, *compressed, True)[0]), "dropout is for the compressed tiles alone"
    x, weight, bias = compressed
    want = torch.ops.vico.bias_gelu(F.linear(x, weight), bias, seed, 0.3)
    assert torch.equal(got == 0, want == 0)
    exact = torch.ops.vico.bias_gelu(F.linear(x.double(), weight.double()), bias.double(), seed, 0.3)
    assert_rounded(got, exact)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", ["strided", "offset", "float32 bias"])
def test_layouts(dtype, layout):
    x, weight, bias = group(2, 5, 24, 16, dtype)
    want = op(x, weight, bias, None, None, None, True)[0]
    if layout == "strided":
        x, weight = x.repeat_interleave(2, -1)[..., ::2], weight.t().contiguous().t()
    elif layout == "offset":
        x, weight = (torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape) for t in (x, weight))
    else:
        bias = bias.float()
    torch.testing.assert_close(op(x, weight, bias, None, None, None, True)[0], want)


def plan_of(compress, tokens):
    return RoutingPlan.from_compress(torch.tensor(compress), tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compress", [(False, True, True, False, True), (True,), (False, False)])
def test_packed(dtype, compress):
    plan = plan_of(compress, (16, 4))
    full = group(plan.full_tiles, 16, 40, 24, dtype)
    compressed = group(plan.compressed_tiles, 4, 72, 24, dtype)
    got = packed_op(*full, *compressed, plan.cu_tokens, plan.order)
    layers = (F.linear(*double(tensors)) for tensors in (full, compressed))
    exact = VF.pack_tokens(*layers, plan)
    assert got.dtype == dtype
    assert_rounded(got, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("padding", "offset"), [(0, 0), (8, 0), (3, 0), (0, 1)])
@pytest.mark.parametrize("compress", [(False, True, True, False, True), (True,), (False, False), ()])
def test_in_place_is_bit_equal_and_writes_nothing_else(dtype, padding, offset, compress):
    plan = plan_of(compress, (16, 4)) if compress else RoutingPlan.from_compress(torch.zeros(0).bool(), (16, 4))
    full = group(plan.full_tiles, 16, 40, 24, dtype)
    compressed = group(plan.compressed_tiles, 4, 72, 24, dtype, bias=False)
    packed = packed_op(*full, *compressed, plan.cu_tokens, plan.order)
    # The last tile's rows first, three free rows before each.
    first_row = (plan.total_tokens + 3 * plan.tiles - plan.cu_tokens[1:] - 3 * torch.arange(plan.tiles)).contiguous()
    rows = plan.total_tokens + 3 * plan.tiles
    buffer = torch.randn(rows * (24 + padding) + offset).to(dtype)
    out, want = (b[offset:].view(rows, 24 + padding)[:, :24] for b in (buffer, buffer.clone()))
    for t, row in enumerate(first_row.tolist()):
        tile = packed[plan.cu_tokens[t] : plan.cu_tokens[t + 1]]
        want[row : row + len(tile)] = tile
    in_place_op(out, *full, *compressed, first_row, plan.order)
    assert torch.equal(out, want)
    if rows and padding:
        assert torch.equal(buffer[offset:].view(rows, -1)[:, 24:], want._base[offset:].view(rows, -1)[:, 24:])


@pytest.mark.parametrize("gelu", [False, True])
def test_gradients(gelu):
    seed = torch.tensor([5])
    tensors = [t.double().requires_grad_() for t in (*group(1, 3, 5, 4), *group(2, 2, 6, 3))]

    def run(*tensors):
        return op(*tensors, gelu, seed, 0.4 if gelu else 0.0)

    assert torch.autograd.gradcheck(run, tensors)
    no_bias = [*tensors[:2], None, *tensors[3:5], None]
    assert torch.autograd.gradcheck(lambda x: op(x, *no_bias[1:], gelu)[0], tensors[:1])
    assert torch.autograd.gradcheck(lambda *t: op(*t, None, None, None, gelu)[0], tensors[:3])


def test_packed_gradients():
    plan = plan_of((False, True, True), (4, 1))
    tensors = [t.double().requires_grad_() for t in (*group(1, 4, 5, 3), *group(2, 1, 6, 3))]
    assert torch.autograd.gradcheck(lambda *t: packed_op(*t, plan.cu_tokens, plan.order), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    full, compressed = group(2, 4, 8, 6, dtype), group(1, 2, 16, 6, dtype)
    for t in (*full, *compressed):
        t.requires_grad_()
    # In 16 bits compiled and eager gradients round differently; the fp32 run compares them.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    tests += ("test_aot_dispatch_dynamic",) if dtype == torch.float32 else ()
    plan = plan_of((False, True, False), (4, 2))
    seed = torch.tensor([3])
    for arguments in ((*full, *compressed, True, seed, 0.5), (None, None, None, *compressed, False)):
        torch.library.opcheck(op, arguments, test_utils=tests)
    torch.library.opcheck(packed_op, (*full, *compressed, plan.cu_tokens, plan.order), test_utils=tests)
    arguments = [t.detach() for t in (torch.zeros(13, 6, dtype=dtype), *full, *compressed)]
    torch.library.opcheck(in_place_op, (*arguments, torch.tensor([9, 0, 3]), plan.order), test_utils=tests)


# ---- the connector


def connectors(dtype, **kw):
    module = vico_ext.FusedConnector(16, 24, dtype=dtype, **kw)
    fused = vico_ext.FusedConnector(16, 24, dtype=dtype, projection="fused", **kw)
    fused.load_state_dict(module.state_dict())
    return module, fused


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("compress", [(False, True, True), (True, True), (False,), None])
def test_fused_connector_is_as_accurate(dtype, compress):
    module, fused = (m.eval() for m in connectors(dtype))
    tokens = torch.randn(3 if compress is None else len(compress), 65, 16).to(dtype)
    plan = None if compress is None else plan_of(compress, (16, 4))
    weights = dict(zip(module.state_dict(), double(module.state_dict().values()), strict=True))
    if compress is None:
        exact = reference.connector_256(tokens.double(), weights)
    else:
        exact = reference.connector(tokens.double(), weights, plan.compress)
    with torch.no_grad():
        assert_as_accurate(fused(tokens, plan), module(tokens, plan), exact, ratio=2.0, roundings=2.0)


def test_fused_connector_has_the_same_dropout_and_gradients():
    module, fused = connectors(torch.float64)
    tokens, plan = torch.randn(3, 65, 16, dtype=torch.float64), plan_of((True, False, True), (16, 4))
    results = []
    for m in (module, fused):
        torch.manual_seed(0)
        inputs = [tokens.clone().requires_grad_(), *m.parameters()]
        out = m(inputs[0], plan)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)


def test_fused_connector_under_autocast_and_compile():
    module, fused = (m.eval() for m in connectors(torch.float32))
    tokens, plan = torch.randn(3, 65, 16), plan_of((True, False, True), (16, 4))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got, want = fused(tokens, plan), module(tokens, plan)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, plan), fused(tokens, plan))
    assert "projection='fused'" in repr(fused)


# ---- bad input

GOOD = group(1, 4, 8, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, GOOD[1], None, None, None, None), "full or compressed must be given, got None for both"),
        ((GOOD[0], None, None, None, None, None), "full needs full_weight, got None"),
        ((GOOD[0].int(), *GOOD[1:], None, None, None), "full must be float32, .* got int32"),
        ((*GOOD, GOOD[0].double(), *GOOD[1:]), r"compressed must have the dtype of full \(float32\), got float64"),
        (
            (GOOD[0][0, 0], *GOOD[1:], None, None, None),
            r"full must have shape \[\.\.\., rows, in features\], got \[8\]",
        ),
        ((GOOD[0], GOOD[1].half(), None, None, None, None), "full_weight must have the dtype of full"),
        (
            (GOOD[0], GOOD[1][:, :7], None, None, None, None),
            r"full_weight must have shape .* = \[\*, 8\], got \[6, 7\]",
        ),
        ((*GOOD[:2], GOOD[2][:5], None, None, None), r"full_bias must have shape \[out features\] = \[6\], got \[5\]"),
        ((*GOOD, *GOOD[:2], GOOD[2].double()), "compressed_bias must have the dtype of the activations"),
    ],
)
def test_bad_groups(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        op(*arguments, True)


def test_bad_arguments():
    with pytest.raises(RuntimeError, match=r"dropout follows GELU alone, got dropout 0\.1 without"):
        op(*GOOD, None, None, None, False, torch.tensor([1]), 0.1)
    with pytest.raises(RuntimeError, match=r"dropout 0.1 needs a seed"):
        op(*GOOD, None, None, None, True, None, 0.1)
    plan = plan_of((False, True), (8, 4))
    with pytest.raises(RuntimeError, match=r"compressed_weight must have shape .* = \[6, \*\], got \[5, 8\]"):
        packed_op(*GOOD, *group(1, 4, 8, 5), plan.cu_tokens, plan.order)
    with pytest.raises(RuntimeError, match=r"full must have shape \[tiles, tokens, in features\]"):
        packed_op(GOOD[0][0], *GOOD[1:], *GOOD, plan.cu_tokens, plan.order)
    with pytest.raises(ValueError, match="projection must be 'torch', 'fused' or 'folded', got 'own'"):
        vico_ext.FusedConnector(4, 4, projection="own")
    fused = vico_ext.FusedConnector(6, 10, projection="fused")
    fused.projection = "own"
    with pytest.raises(ValueError, match="projection must be 'torch', 'fused' or 'folded', got 'own'"):
        fused(torch.zeros(1, 65, 6))


def test_bad_buffers():
    plan = plan_of((False, True), (4, 2))
    arguments, first_row = (*GOOD, GOOD[0][:, :2], *GOOD[1:]), plan.cu_tokens[:2].contiguous()
    with pytest.raises(RuntimeError, match=r"out must have shape \[rows, hidden\] = \[\*, 6\], got \[8, 5\]"):
        in_place_op(torch.zeros(8, 5), *arguments, first_row, plan.order)
    with pytest.raises(RuntimeError, match=r"out must have the dtype of full \(float32\), got float64"):
        in_place_op(torch.zeros(8, 6).double(), *arguments, first_row, plan.order)
    with pytest.raises(RuntimeError, match=r"first_row must have shape .* = \[2\], got \[3\]"):
        in_place_op(torch.zeros(8, 6), *arguments, plan.cu_tokens, plan.order)
    weight = torch.zeros(8, 8)
    with pytest.raises(RuntimeError, match="compressed_weight must not share memory with out"):
        in_place_op(weight.view(-1)[:48].view(8, 6), *GOOD, GOOD[0], weight[:6], None, first_row, plan.order)


def test_plan_of_another_batch():
    plan = plan_of((False, True), (4, 2))
    arguments = (*group(1, 4, 8, 6, torch.bfloat16), *group(1, 2, 8, 6, torch.bfloat16))
    with pytest.raises(RuntimeError, match="cu_tokens must have shape"):
        packed_op(*arguments, plan.cu_tokens[:2], plan.order)
    with pytest.raises(RuntimeError, match="order must be int64, got int32"):
        packed_op(*arguments, plan.cu_tokens, plan.order.int())


@ends_the_device
def test_values_of_another_batchs_plan():
    plan = plan_of((False, True), (4, 2))
    arguments = (*group(1, 4, 8, 6, torch.bfloat16), *group(1, 2, 8, 6, torch.bfloat16))
    # The CUDA kernels, which the test build runs, see only what leads outside.
    with pytest.raises(RuntimeError, match=r"must begin with 0, got 3|rows must go to places in \[0, 6\)"):
        packed_op(*arguments, plan.cu_tokens + 3, plan.order)
    with pytest.raises(RuntimeError, match=r"another batch|tiles must lie in|rows must go to places in"):
        packed_op(*arguments, plan.cu_tokens, plan.order + 1)
    out = torch.zeros(6, 6).bfloat16()
    # The test build's kernel sees the first row that is outside, the check of the CPU the tile.
    with pytest.raises(RuntimeError, match=r"first_row gives tile 0 rows from 3 on|rows must go to places in \[0, 6\)"):
        in_place_op(out, *arguments, torch.tensor([3, 0]), plan.order)
