"""routing_plan: decisions are equal to torch.quantile's in every bit, and plans lay out what was decided."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from device import ends_the_device, value_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vico_ext
from vico_ext import (
    _C,
    BudgetPolicy,
    PerImagePolicy,
    ReleasedPolicy,
    RoutingPlan,
    RoutingPolicy,
    ThresholdPolicy,
    reference,
)
from vico_ext import functional as VF

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
POLICIES = (
    ReleasedPolicy(0.3, 0.0),
    PerImagePolicy(0.5, 0.2),
    ThresholdPolicy(),
    BudgetPolicy(fraction=0.6),
    BudgetPolicy(max_tokens=700),
)


def _wide(p: Tensor) -> Tensor:
    return p.float() if p.dtype in (torch.bfloat16, torch.float16) else p


@st.composite
def probabilities(draw, max_tiles=80):
    """Probabilities with ties, neighbours one rounding apart, zeros of both signs, and the ends of the range."""
    dtype = draw(st.sampled_from(DTYPES))
    tiles = draw(st.integers(0, max_tiles))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    p = torch.rand(tiles, dtype=torch.float64).to(dtype)
    kind = draw(st.sampled_from(["spread", "ties", "neighbours", "ends"]))
    if kind == "ties":
        p = p[torch.randint(0, max(1, tiles // 3), (tiles,))] if tiles else p
    elif kind == "neighbours" and tiles:
        step = torch.finfo(dtype).eps * torch.randint(0, 4, (tiles,))
        p = (0.5 + step).to(dtype)
    elif kind == "ends":
        p = torch.tensor([0.0, -0.0, 1.0, 0.5], dtype=dtype)[torch.randint(0, 4, (tiles,))]
    return p


@st.composite
def images(draw, tiles):
    """Numbers of tiles per image that add up to `tiles`, empty images among them."""
    cuts = sorted(draw(st.lists(st.integers(0, tiles), max_size=6)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, tiles], strict=True)]


relatives = st.sampled_from([0.0, 0.3, 0.5, 1.0]) | st.floats(0, 1)
absolutes = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)


@given(probabilities(), relatives, absolutes, st.data())
@settings(deadline=None, max_examples=150)
def test_released_rule_is_the_reference_bit_for_bit(p, relative, absolute, data):
    per_image = data.draw(st.none() | images(len(p)))
    want = reference.released_route(_wide(p), relative, absolute, tiles_per_image=per_image)
    counts = None if per_image is None else torch.tensor(per_image)
    assert torch.equal(VF.released_route(p, relative, absolute, tiles_per_image=counts), want)
    policy = ReleasedPolicy if per_image is None else PerImagePolicy
    plan = vico_ext.plan_routing(p, policy(relative, absolute), tiles_per_image=per_image)
    assert torch.equal(plan.compress, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_neighbouring_pairs_interpolate_as_torch_does(dtype):
    """Two values one or two roundings apart: the interpolated one is equal to either, or not, by a single rounding."""
    low = torch.rand(2000, dtype=dtype)
    high = low + torch.finfo(dtype).eps * low * torch.rand(2000, dtype=dtype) * 2
    p = torch.stack([low, high], 1)
    for relative in (1e-9, 0.25, 0.4999999, 0.5, 0.7, 0.99999999):
        want = (p > torch.quantile(p, relative, dim=1, keepdim=True)) & (p >= 0.1)
        got = VF.released_route(p.flatten(), relative, 0.1, tiles_per_image=torch.full((2000,), 2))
        assert torch.equal(got, want.flatten())


def test_many_tiles():
    p = torch.rand(100_001)
    assert torch.equal(VF.released_route(p, 0.3, 0.4), reference.released_route(p, 0.3, 0.4))


def test_strided_probabilities():
    p = torch.rand(9, 2)
    assert torch.equal(VF.released_route(p[:, 0], 0.3, 0.0), reference.released_route(p[:, 0].clone(), 0.3, 0.0))


def test_golden(golden):
    relative, absolute = (float(golden.meta[f"flash_{k}_threshold"]) for k in ("relative", "absolute"))
    plan = vico_ext.plan_routing(golden["gate"][:, 0], ReleasedPolicy(relative, absolute))
    assert torch.equal(plan.compress, golden["compress"])
    assert plan.total_tokens == len(golden["visual_tokens"])


@given(st.lists(st.booleans(), max_size=50), st.sampled_from([(256, 64), (4, 1), (3, 2)]))
@settings(deadline=None, max_examples=100)
def test_plan_tokens_matches_reference(mask, tokens):
    compress = torch.tensor(mask, dtype=torch.bool)
    cu_tokens, order = reference.plan_tokens(compress, *tokens)
    plan = RoutingPlan.from_compress(compress, tokens)
    assert torch.equal(plan.cu_tokens, cu_tokens)
    assert torch.equal(plan.order, order)
    assert plan.total_tokens == int(cu_tokens[-1])
    assert (plan.tiles, plan.full_tiles, plan.compressed_tiles) == (len(mask), mask.count(False), mask.count(True))
    assert plan.kept_share == (plan.total_tokens / (tokens[0] * len(mask)) if mask else 1.0)


@given(probabilities(), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_threshold(p, threshold):
    plan = vico_ext.plan_routing(p, ThresholdPolicy(threshold))
    assert torch.equal(plan.compress, _wide(p) >= threshold)


@pytest.mark.parametrize(("fraction", "tiles"), [("0.58", 25), ("0.7", 45), ("0.35", 45), ("0.565", 50), ("0.57", 75)])
def test_budget_of_a_decimal_fraction_that_is_met_exactly(fraction, tiles):
    """The float next to 0.7 is below it; a tile more would be compressed than 0.7 of the tokens asks for."""
    plan = vico_ext.plan_routing(torch.rand(tiles), BudgetPolicy(fraction=float(fraction)))
    assert plan.total_tokens == Fraction(fraction) * tiles * 256


@given(probabilities(), st.floats(0.25, 1), st.booleans())
@settings(deadline=None, max_examples=100)
def test_budget_takes_the_fewest_of_the_highest(p, fraction, absolute):
    budget = math.floor(fraction * (1 + 2**-51) * (len(p) * 256))
    policy = BudgetPolicy(max_tokens=budget) if absolute else BudgetPolicy(fraction=fraction)
    if len(p) * 64 > budget:  # the floor of a fraction near 1/4
        with pytest.raises(ValueError, match="cannot be met"):
            vico_ext.plan_routing(p, policy)
        return
    plan = vico_ext.plan_routing(p, policy)
    assert plan.total_tokens == int(plan.cu_tokens[-1]) <= budget
    assert plan.compressed_tiles == 0 or plan.total_tokens + 192 > budget
    values = _wide(p).tolist()
    ranked = sorted(range(len(p)), key=lambda t: (-values[t], t))
    assert sorted(ranked[: plan.compressed_tiles]) == plan.compress.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("tiles", [1, 31, 33, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_route_is_a_stable_sort(tiles, dtype):
    """Few and many tiles; ties, and zeros of both signs, which are equal."""
    for p in (torch.rand(tiles), torch.randint(0, 3, (tiles,)) / 2, torch.zeros(tiles) * torch.randn(tiles)):
        p = p.to(dtype)
        for count in {0, 1, tiles // 2, tiles}:
            best = torch.sort(p, descending=True, stable=True).indices[:count]
            assert torch.equal(
                VF.budget_route(p, count), torch.zeros(tiles, dtype=torch.bool).index_fill(0, best, True)
            )


def test_thresholds_that_decide_without_looking():
    p = torch.tensor([0.0, 1.0, 0.5])
    for threshold, compressed in ((0, 3), (-1, 3), (1 + 1e-9, 0), (2, 0)):  # 1 + 1e-9 is 1 in float32
        policy = ThresholdPolicy(threshold)
        assert policy.compressed_tiles(3, (256, 64)) == compressed
        assert int(vico_ext.plan_routing(p, policy).compress.sum()) == compressed
    assert ThresholdPolicy(1).compressed_tiles(3, (256, 64)) is None


def test_budget_that_cannot_be_met():
    with pytest.raises(ValueError, match=r"budget of 319 tokens cannot be met: 5 tiles need at least 5 x 64 = 320 to"):
        vico_ext.plan_routing(torch.rand(5), BudgetPolicy(max_tokens=319))
    assert vico_ext.plan_routing(torch.rand(5), BudgetPolicy(max_tokens=320)).compressed_tiles == 5


def test_per_image_does_not_depend_on_the_rest_of_the_call():
    a, b = torch.rand(7), torch.rand(5)
    policy = PerImagePolicy(0.4, 0.1)
    together = vico_ext.plan_routing(torch.cat([a, b]), policy, tiles_per_image=torch.tensor([7, 0, 5]))
    apart = [vico_ext.plan_routing(p, policy, tiles_per_image=[len(p)]).compress for p in (a, b)]
    assert torch.equal(together.compress, torch.cat(apart))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tiles(policy, dtype):
    plan = vico_ext.plan_routing(torch.empty(0, dtype=dtype), policy, tiles_per_image=[])
    assert (plan.tiles, plan.total_tokens, plan.cu_tokens.tolist(), plan.kept_share) == (0, 0, [0], 1.0)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_plans_are_not_differentiable_and_leave_p_alone(policy):
    p = torch.rand(4, requires_grad=True)
    before = p.detach().clone()
    plan = vico_ext.plan_routing(p, policy, tiles_per_image=[3, 1])
    assert not any(t.requires_grad for t in (plan.compress, plan.cu_tokens, plan.order))
    assert torch.equal(p.detach(), before)
    assert not VF.released_route(p, 0.5, 0.0).requires_grad


@dataclass(frozen=True)
class EveryOther(RoutingPolicy):
    """A user's policy."""

    returns: object = None

    def compress(self, p, tiles_per_image, tokens):
        return torch.arange(len(p)) % 2 == 1 if self.returns is None else self.returns


def test_own_policy():
    plan = vico_ext.plan_routing(torch.rand(5), EveryOther(), tokens=(4, 1))
    assert plan.compress.tolist() == [False, True, False, True, False]
    assert plan.cu_tokens.tolist() == [0, 4, 5, 9, 10, 14]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_plans_copy_and_move(copied):
    plan = RoutingPlan.from_compress(torch.tensor([True, False]), (4, 1))
    twin = copied(plan)
    assert torch.equal(twin.compress, plan.compress)
    assert torch.equal(twin.order, plan.order)
    assert (twin.tokens, twin.total_tokens) == ((4, 1), 5)
    moved = plan.to("meta")
    assert moved.cu_tokens.is_meta
    assert moved.total_tokens == 5


def test_plans_go_through_compile_and_export():
    class Sum(torch.nn.Module):
        def forward(self, x, plan):
            return x * plan.compress + plan.cu_tokens[:-1] + plan.total_tokens

    plan = RoutingPlan.from_compress(torch.tensor([True, False, True]))
    x = torch.rand(3)
    want = Sum()(x, plan)
    assert torch.equal(torch.compile(Sum(), fullgraph=True)(x, plan), want)
    assert torch.equal(torch.export.export(Sum(), (x, plan)).module()(x, plan), want)


@pytest.mark.parametrize("dynamic", [False, True])
def test_budget_plans_compile_whole(dynamic):
    def total(p):
        plan = vico_ext.plan_routing(p, BudgetPolicy(fraction=0.5))
        return plan.cu_tokens * 1, plan.compress

    compiled = torch.compile(total, fullgraph=True, dynamic=dynamic)
    for tiles in (4, 7):
        p = torch.rand(tiles)
        assert all(torch.equal(a, b) for a, b in zip(compiled(p), total(p), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    p = torch.rand(6, dtype=dtype)
    ops = torch.ops.vico
    torch.library.opcheck(ops.checked_probabilities.default, (p,))
    torch.library.opcheck(ops.quantile_route.default, (p, None, 0.3, 0.1))
    torch.library.opcheck(ops.quantile_route.default, (p, torch.tensor([0, 2, 2, 6]), 0.5, 0.0))
    torch.library.opcheck(ops.budget_route.default, (p, 2))
    torch.library.opcheck(ops.plan_tokens.default, (p > 0.5, 256, 64))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"p": torch.rand(2, 2)}, ValueError, r"p must be a floating tensor of shape \[tiles\], got .*\[2, 2\]"),
        ({"p": torch.tensor([1, 0])}, ValueError, "p must be a floating tensor .* got torch.int64"),
        ({"p": [0.5]}, TypeError, r"p must be a tensor of shape \[tiles\], got list"),
        value_case({"p": torch.tensor([0.1, float("nan"), 0.2])}, RuntimeError, "got NaN for tile 1"),
        value_case(
            {"p": torch.tensor([0.1, 0.2, 1.5])}, RuntimeError, r"probabilities in \[0, 1\], got 1.5 for tile 2"
        ),
        value_case({"p": torch.tensor([-1.0]).bfloat16()}, RuntimeError, r"in \[0, 1\], got -1 for tile 0"),
        value_case({"p": torch.tensor([float("inf")])}, RuntimeError, r"in \[0, 1\], got inf for tile 0"),
        ({"policy": ThresholdPolicy}, TypeError, "an instance is wanted, not the class"),
        ({"policy": 0.5}, TypeError, "policy must be a RoutingPolicy .* got 0.5"),
        ({"policy": PerImagePolicy(0.5, 0.5)}, ValueError, "PerImagePolicy needs tiles_per_image"),
        ({"policy": EveryOther(torch.zeros(2))}, ValueError, r"EveryOther.compress must return a bool .* \[3\], got"),
        ({"policy": EveryOther([True])}, ValueError, r"EveryOther.compress must return a bool .* got \[True\]"),
        ({"tiles_per_image": [2, 2]}, ValueError, r"add up to the 3 tiles of p, got \[2, 2\] = 4"),
        ({"tiles_per_image": torch.tensor([4, -1], device="cpu")}, ValueError, r"must not be negative, got \[4, -1\]"),
        ({"tiles_per_image": torch.tensor([3.0])}, ValueError, "int tensor .images., got torch.float32"),
        ({"tokens": (64, 256)}, ValueError, r"full > compressed > 0, got \(64, 256\)"),
        ({"tokens": (256, 0)}, ValueError, r"full > compressed > 0, got \(256, 0\)"),
        ({"tokens": (256,)}, ValueError, r"tokens must be two numbers, .* got \(256,\)"),
        ({"tokens": (256.0, 64)}, TypeError, "tokens must be whole numbers"),
        ({"tokens": 256}, TypeError, "tokens must be two numbers, .* got 256"),
        ({"p": torch.rand(3, 1), "tiles_per_image": [1]}, ValueError, r"p must be .* of shape \[3, 1\]"),
        ({"tiles_per_image": 3}, TypeError, "tiles_per_image must be a list of ints or an int tensor .*, got 3"),
        ({"tiles_per_image": [1.5, 1.5]}, TypeError, r"tiles_per_image must be a list of ints .*, got \[1.5, 1.5\]"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    arguments = {"p": torch.rand(3), "policy": ThresholdPolicy(), **kwargs}
    with pytest.raises(error, match=message):
        vico_ext.plan_routing(**arguments)


@ends_the_device  # and a GPU's threads find them in any order
@pytest.mark.skipif(_C.cuda == "host", reason="the emulated device's threads, too")
def test_the_first_bad_probability_is_named():
    with pytest.raises(RuntimeError, match="got NaN for tile 1"):
        vico_ext.plan_routing(torch.tensor([0.1, float("nan"), float("nan")]), ThresholdPolicy())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ThresholdPolicy(float("nan")), ValueError, "threshold must be a number, got NaN"),
        (lambda: ThresholdPolicy("0.5"), TypeError, "threshold must be a number, got str"),
        (lambda: ThresholdPolicy(True), TypeError, "threshold must be a number, got bool"),
        (lambda: ReleasedPolicy(float("nan"), 0.0), ValueError, "relative must be a number, got NaN"),
        (lambda: PerImagePolicy(0.5, float("nan")), ValueError, "absolute must be a number, got NaN"),
        (lambda: BudgetPolicy(), ValueError, "exactly one of max_tokens and fraction"),
        (lambda: BudgetPolicy(10, 0.5), ValueError, "exactly one of max_tokens and fraction"),
        (lambda: BudgetPolicy(fraction=2), ValueError, r"fraction must lie in \[0, 1\], got 2"),
        (lambda: BudgetPolicy(max_tokens=1.5), TypeError, "max_tokens must be an int, got float"),
        (lambda: BudgetPolicy(max_tokens=-1), ValueError, "max_tokens must not be negative, got -1"),
        (lambda: RoutingPlan.from_compress(torch.zeros(2, 2) > 0), ValueError, r"shape \[tiles\], got \[2, 2\]"),
        (lambda: RoutingPlan.from_compress(torch.zeros(2)), RuntimeError, "compress must be bool, got float32"),
    ],
)
def test_bad_policies_and_masks(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bad_budgets():
    with pytest.raises(RuntimeError, match=r"count must lie in \[0, 3\], the number of tiles, got 4"):
        VF.budget_route(torch.rand(3), 4)
    with pytest.raises(RuntimeError, match=r"p must have shape \[tiles\]"):
        VF.budget_route(torch.rand(3, 1), 1)


@ends_the_device
def test_a_budget_over_nan():
    with pytest.raises(RuntimeError, match="p must hold probabilities, got NaN for tile 1"):
        VF.budget_route(torch.tensor([0.5, torch.nan]), 1)


@pytest.mark.parametrize(
    ("p", "cu_tiles", "relative", "message"),
    [
        (torch.rand(3), None, 1.5, r"relative must lie in \[0, 1\], got 1.5"),
        value_case(torch.rand(3), torch.tensor([0, 2]), 0.5, r"end with the number of tiles \(3\), got 0 and 2"),
        value_case(
            torch.rand(3), torch.tensor([0, 2, 1, 3]), 0.5, "cu_tiles must not decrease, got 2 then 1 at position 1"
        ),
        (torch.rand(3), torch.tensor([0, 3], dtype=torch.int32), 0.5, "cu_tiles must be int64, got int32"),
        (torch.rand(3), torch.empty(0, dtype=torch.int64), 0.5, r"cu_tiles must have shape \[segments \+ 1\], got \[0"),
        value_case(torch.tensor([0.5, float("nan")]), None, 0.5, "p must hold probabilities, got NaN for tile 1"),
        (torch.rand(3, 1), None, 0.5, r"p must have shape \[tiles\]"),
        (torch.tensor([1]), None, 0.5, "p must be float32, float64, bfloat16 or float16, got int64"),
    ],
)
def test_bad_tensors(p, cu_tiles, relative, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vico.quantile_route(p, cu_tiles, relative, 0.0)
