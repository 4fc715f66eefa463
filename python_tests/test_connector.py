"""The dual connector: FusedConnector and vico_ext.functional.connector against the released semantics."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from device import DEVICE, cpu_only
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import LOW_PRECISION, assert_as_accurate, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import vico_ext
from vico_ext import functional as VF
from vico_ext import reference
from vico_ext.routing import RoutingPlan

MIXED = (False, True, True, False, True)


def small_connector(**kw) -> vico_ext.FusedConnector:
    return vico_ext.FusedConnector(6, 10, **kw)


def small_problem(compress=MIXED, dtype=torch.float32, has_cls=True):
    """Tiles of an 8 x 8 grid: 64 patch tokens, 16 or 4 visual tokens."""
    compress = torch.tensor(compress, dtype=torch.bool)
    tokens = torch.randn(len(compress), has_cls + 64, 6).to(dtype)
    return tokens, RoutingPlan.from_compress(compress, (16, 4))


def weights_of(module):
    return dict(module.named_parameters())


def golden_connector(golden, dtype):
    module = vico_ext.FusedConnector(32, 48, dtype=dtype).eval()
    weights = {k: v for k, v in golden.weights_as(dtype).items() if k.startswith("mlp")}
    module.load_state_dict(weights, strict=True)
    return module, weights


def golden_cases(golden):
    compress = golden["compress"]
    return (
        ("connector_256", None),
        ("connector_64", torch.ones_like(compress)),
        ("visual_tokens", compress),
    )


def test_golden(golden):
    module, _ = golden_connector(golden, torch.float64)
    tokens = golden["vit_tokens"].double()
    for name, compress in golden_cases(golden):
        plan = None if compress is None else RoutingPlan.from_compress(compress)
        got = module(tokens, plan)
        torch.testing.assert_close(got, golden[name].reshape(got.shape), rtol=0, atol=1e-10)
        with torch.no_grad():
            assert torch.equal(module(tokens, plan), got)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_as_accurate_as_torch(golden, dtype):
    module, weights = golden_connector(golden, dtype)
    tokens = golden["vit_tokens"].to(dtype)
    double = {k: v.double() for k, v in weights.items()}
    for _, compress in golden_cases(golden):
        plan = None if compress is None else RoutingPlan.from_compress(compress)

        def expected(tokens, weights, compress=compress):
            if compress is None:
                return reference.connector_256(tokens, weights)
            return reference.connector(tokens, weights, compress)

        with torch.no_grad():
            got = module(tokens, plan)
        assert got.dtype == dtype
        assert_as_accurate(got, expected(tokens, weights), expected(tokens.double(), double))


def test_state_dict_has_the_released_keys(golden):
    module, weights = golden_connector(golden, torch.float32)
    state = module.state_dict()
    assert list(state) == [f"mlp1.{i}.{p}" for i in (0, 1, 3) for p in ("weight", "bias")] + [
        f"mlp2.{i}.{p}" for i in (0, 1, 4, 7) for p in ("weight", "bias")
    ]
    assert all(torch.equal(state[k], weights[k]) for k in weights)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*mlp1.3.bias"):
        module.load_state_dict({k: v for k, v in weights.items() if k != "mlp1.3.bias"})


@given(st.lists(st.booleans(), max_size=5), st.booleans(), st.sampled_from(["v1", "v2"]), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_matches_reference_with_gradients(compress, has_cls, version, seed):
    torch.manual_seed(seed)
    module = small_connector(has_cls=has_cls, ps_version=version, dtype=torch.float64).eval()
    tokens, plan = small_problem(compress, torch.float64, has_cls)
    tokens.requires_grad_()
    weights = weights_of(module)
    inputs = [tokens, *weights.values()]
    got = module(tokens, plan)
    want = reference.connector(tokens, weights, plan.compress, skip=int(has_cls), version=version)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    grad_out = torch.randn_like(got)
    # No allow_unused: every parameter must get a gradient, zero where its connector ran on no tile.
    ours = torch.autograd.grad(got, inputs, grad_out)
    theirs = torch.autograd.grad(want, inputs, grad_out, allow_unused=True) if compress else [None] * len(inputs)
    for a, b, like in zip(ours, theirs, inputs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(like) if b is None else b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compress", [(False,) * 3, (True,) * 3, ()], ids=["none", "all", "no tiles"])
def test_one_sided_plans(compress):
    module = small_connector().eval()
    tokens, plan = small_problem(compress)
    want = reference.connector(tokens, weights_of(module), plan.compress)
    got = module(tokens, plan)
    assert got.shape == (plan.total_tokens, 10)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    with torch.no_grad():
        assert torch.equal(module(tokens, plan), got)


def test_without_a_plan_it_is_the_256_token_connector():
    module = small_connector()
    tokens, _ = small_problem()
    got = module(tokens)
    torch.testing.assert_close(got, reference.connector_256(tokens, weights_of(module)))
    got.sum().backward()
    assert all((p.grad is None) == name.startswith("mlp2") for name, p in module.named_parameters())
    assert module(tokens[:0]).shape == (0, 16, 10)


def test_rectangular_grid():
    module = small_connector(grid=(4, 12)).eval()
    tokens, compress = torch.randn(2, 49, 6), torch.tensor([False, True])
    want = reference.connector(tokens, weights_of(module), compress, grid=(4, 12))
    torch.testing.assert_close(module(tokens, RoutingPlan.from_compress(compress, (12, 3))), want)


def test_inputs_and_parameters_are_left_alone():
    module = small_connector()
    tokens, plan = small_problem()
    kept = [t.clone() for t in (tokens, *module.parameters())]
    with torch.no_grad():
        module(tokens, plan)
    module(tokens, plan).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, (tokens, *module.parameters()), strict=True))


def test_tied_parameters():
    module = small_connector().eval()
    module.mlp2[7].bias = module.mlp1[3].bias
    tokens, plan = small_problem()
    weights = dict(module.named_parameters(remove_duplicate=False))
    torch.testing.assert_close(module(tokens, plan), reference.connector(tokens, weights, plan.compress))


def test_two_runs_are_bit_equal():
    module = small_connector()
    tokens, plan = small_problem()
    tokens.requires_grad_()
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        out = module(tokens, plan)
        runs.append((out, *torch.autograd.grad(out.square().sum(), [tokens, *module.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- dropout


def test_gradcheck_in_training_mode():
    module = vico_ext.FusedConnector(2, 3, dropout=0.3, dtype=torch.float64)
    plan = RoutingPlan.from_compress(torch.tensor([True, False]), (4, 1))
    tokens = torch.randn(2, 17, 2, dtype=torch.float64, requires_grad=True)
    names = list(weights_of(module))

    def fn(tokens, *parameters):
        torch.manual_seed(3)
        weights = dict(zip(names, parameters, strict=True))
        return VF.connector(tokens, weights, plan, dropout_p=0.3, training=True)

    assert torch.autograd.gradcheck(fn, (tokens, *module.parameters()))


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    module = small_connector(dropout=0.5, dtype=torch.float64)
    tokens, plan = small_problem((True, False), torch.float64)
    with torch.no_grad():
        runs = torch.stack([module(tokens, plan) for _ in range(400)])
        full = runs[:, plan.cu_tokens[1] :]
        assert torch.equal(full, full[:1].expand_as(full)), "mlp1 has no dropout"
        small = runs[:, : plan.cu_tokens[1]]
        assert (small.std(0) > 0).all()
        # The hidden layer after the first dropout makes the mean differ a little from the value without dropout.
        eager = nn.Sequential(*module.mlp2).train()
        shuffled = reference.pixel_shuffle(tokens[:1], 4)[0]
        want = torch.stack([eager(shuffled) for _ in range(400)])
    spread = (small.var(0) / 400 + want.var(0) / 400).sqrt()
    assert ((small.mean(0) - want.mean(0)).abs() < 6 * spread).all()
    torch.testing.assert_close(small.std(0).mean(), want.std(0).mean(), rtol=0.1, atol=0)


def test_checkpointing_draws_the_same_mask_again():
    module = small_connector(dropout=0.4)
    tokens, plan = small_problem()
    results = []
    for run in (module, lambda *a: checkpoint(module, *a, use_reentrant=False)):
        torch.manual_seed(9)
        module.zero_grad()
        out = run(tokens, plan)
        out.square().sum().backward()
        results.append([out, *(p.grad.clone() for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- what torch does to modules


def test_compiles_whole_forward_and_backward():
    module = small_connector(dropout=0.0)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for compress in (MIXED, (True, False, False, True, True, False, True)):
        tokens, plan = small_problem(compress)
        tokens.requires_grad_()
        inputs = [tokens, *module.parameters()]
        got, want = compiled(tokens, plan), module(tokens, plan)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), inputs),
            torch.autograd.grad(want.square().sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_compiles_whole_for_inference():
    module = small_connector().eval()
    tokens, plan = small_problem()
    kept = tokens.clone()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(tokens, plan), module(tokens, plan))
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(tokens), module(tokens))
    assert torch.equal(tokens, kept)


@pytest.mark.parametrize("tokens_dtype", [torch.float32, torch.bfloat16])
def test_autocast(tokens_dtype):
    module = vico_ext.FusedConnector(16, 24).eval()
    compress = torch.tensor([False, True, False])
    plan = RoutingPlan.from_compress(compress, (64, 16))
    tokens = torch.randn(3, 257, 16).to(tokens_dtype)
    weights = {k: w.detach() for k, w in weights_of(module).items()}
    exact = reference.connector(tokens.double(), {k: w.double() for k, w in weights.items()}, compress)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        eager = reference.connector(tokens, weights, compress)
        got = module(tokens, plan)
        with torch.no_grad():
            assert torch.equal(module(tokens, plan), got)
        plain = module(tokens)
    assert got.dtype == plain.dtype == eager.dtype == torch.bfloat16
    assert_as_accurate(got.detach(), eager, exact)
    got.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


class PlanOfTensors(nn.Module):
    """The connector with its plan as tensors: what an exported graph takes. The number of compressed tiles is fixed."""

    def __init__(self, connector, compressed_tiles, tokens):
        super().__init__()
        self.connector, self.compressed_tiles, self.tokens = connector, compressed_tiles, tokens

    def forward(self, vit_tokens, compress, cu_tokens, order):
        return self.connector(vit_tokens, RoutingPlan(compress, cu_tokens, order, self.compressed_tiles, self.tokens))


def test_export():
    module = small_connector().eval()
    tokens, plan = small_problem()
    wrapper = PlanOfTensors(module, plan.compressed_tiles, plan.tokens)
    exported = torch.export.export(wrapper, (tokens, plan.compress, plan.cu_tokens, plan.order))
    other, _ = small_problem()
    moved = RoutingPlan.from_compress(plan.compress.flip(0), plan.tokens)
    arguments = (other, moved.compress, moved.cu_tokens, moved.order)
    torch.testing.assert_close(exported.module()(*arguments), wrapper(*arguments))


def test_export_without_a_plan_for_any_number_of_tiles():
    module = small_connector().eval()
    tiles = torch.export.Dim("tiles", min=2, max=64)
    exported = torch.export.export(module, (torch.randn(3, 65, 6),), dynamic_shapes={"vit_tokens": {0: tiles}})
    tokens = torch.randn(5, 65, 6)
    torch.testing.assert_close(exported.module()(tokens), module(tokens))


def test_copies_pickles_and_saves():
    module = small_connector().eval()
    tokens, plan = small_problem()
    want = module(tokens, plan)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = small_connector().eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(tokens, plan), want)


def test_repr_says_what_it_is():
    assert "vit_hidden=6, llm_hidden=10, ps_version='v2', grid=(8, 8), has_cls=True" in repr(
        small_connector(grid=(8, 8))
    )


# ---- layers that users replaced


class LoRALinear(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + x @ self.a.t() @ self.b.t()


class DoubledWeight(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _lora(module):
    module.mlp1[1] = LoRALinear(module.mlp1[1])
    module.mlp2[7] = LoRALinear(module.mlp2[7])


def _hook(module):
    module.mlp2[4].register_forward_hook(lambda layer, args, out: out + 1)


def _pre_hook(module):
    module.mlp1[3].register_forward_pre_hook(lambda layer, args: (args[0] * 2,))


def _parametrized(module):
    nn.utils.parametrize.register_parametrization(module.mlp1[1], "weight", DoubledWeight())


def _patched_forward(module):
    layer, forward = module.mlp1[3], module.mlp1[3].forward
    layer.forward = lambda x: forward(x) - 1


def _activation(module):
    module.mlp1[2] = nn.GELU(approximate="tanh")
    module.mlp2[5] = nn.SiLU()


def _norm(module):
    module.mlp2[0] = nn.RMSNorm(96)


def _norm_hook(module):
    module.mlp1[0].register_forward_hook(lambda layer, args, out: -out)


def _sequential_hook(module):
    module.mlp1.register_forward_hook(lambda layer, args, out: out + 1)


def _no_bias(module):
    module.mlp1[3] = nn.Linear(10, 10, bias=False)


def _longer(module):
    module.mlp2.append(nn.Tanh())


def _other_eps(module):
    module.mlp2[0].eps = 1.0


CHANGES = [_lora, _hook, _pre_hook, _parametrized, _patched_forward, _activation, _norm, _norm_hook, _sequential_hook]
CHANGES += [_no_bias, _longer, _other_eps]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_replaced_layers_count(change):
    module = small_connector().eval()
    tokens, plan = small_problem()
    before = module(tokens, plan)
    change(module)
    tiles = [
        (module.mlp2 if small else module.mlp1)(reference.pixel_shuffle(tile[None], 4 if small else 2)[0])
        for tile, small in zip(tokens, plan.compress, strict=True)
    ]
    got = module(tokens, plan)
    torch.testing.assert_close(got, torch.cat(tiles))
    assert relative_error(got.detach(), before.detach()) > 1e-3
    torch.testing.assert_close(module(tokens), module.mlp1(reference.pixel_shuffle(tokens, 2)))
    got.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_dropouts_that_differ():
    module = small_connector()
    module.mlp2[3].p, module.mlp2[6].p = 0.0, 1.0
    tokens, plan = small_problem((True,))
    want = module.mlp2[7].bias.expand(4, 10)
    torch.testing.assert_close(module(tokens, plan), want)


def test_plain_layers_are_not_called(monkeypatch):
    module = small_connector()
    tokens, plan = small_problem()
    monkeypatch.setattr(nn.Linear, "forward", lambda *_: pytest.fail("the fused path called a Linear"))
    module(tokens, plan)


# ---- bad input


def test_plan_of_another_batch():
    module = small_connector()
    tokens, plan = small_problem()
    for fn in (module, lambda t, p: VF.connector(t, weights_of(module), p)):
        with pytest.raises(ValueError, match=r"the plan routes 5 tiles, but tokens hold 4 .* another batch"):
            fn(tokens[:4], plan)
        wrong = RoutingPlan.from_compress(plan.compress)
        with pytest.raises(
            ValueError, match=r"the plan gives 256 or 64 tokens to a tile, but 64 patch tokens .* 16 or 4"
        ):
            fn(tokens, wrong)
    _lora(module)
    with pytest.raises(ValueError, match="the plan routes 5 tiles, but tokens hold 4"):
        module(tokens[:4], plan)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda: vico_ext.FusedConnector(0, 4), "vit_hidden and llm_hidden must be positive, got 0 and 4"),
        (lambda: small_connector(ps_version="v3"), "ps_version must be 'v1' or 'v2', got 'v3'"),
        (lambda: small_connector()(torch.zeros(65, 6)), r"tokens must have shape \[tiles, tokens, channels\]"),
        (lambda: small_connector()(torch.zeros(2, 64, 6)), "square grid after the CLS token, got 63"),
        (lambda: small_connector(grid=(8, 9))(torch.zeros(2, 65, 6)), r"grid \(8, 9\) needs 72 tokens per tile"),
    ],
)
def test_bad_arguments(fn, message):
    with pytest.raises(ValueError, match=message):
        fn()


def test_wrong_vit_width():
    with pytest.raises(RuntimeError, match=r"weight must have shape \[rate \* rate \* channels\] = \[20\], got \[24\]"):
        small_connector()(torch.zeros(2, 65, 5))


def test_missing_weight():
    module = small_connector()
    tokens, plan = small_problem()
    weights = weights_of(module)
    del weights["mlp2.4.bias"]
    with pytest.raises(KeyError, match=r"mlp2\.4\.bias"):
        VF.connector(tokens, weights, plan)


@cpu_only("reads the CPU allocator's events")
def test_peak_memory_of_inference_is_that_of_one_branch():
    """The largest set of live temporaries: what one connector needs at a time, not the sum of both."""
    module = vico_ext.FusedConnector(64, 64).eval()
    tokens = torch.randn(8, 257, 64)
    plan = RoutingPlan.from_compress(torch.tensor([False, True] * 4), (64, 16))
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        module(tokens, plan)
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = max(itertools.accumulate(changes))
    float_bytes, rows = 4, 4 * 64
    normalized, hidden, out = rows * 256, rows * 64, plan.total_tokens * 64
    assert peak <= 1.1 * float_bytes * max(normalized + hidden, hidden + 4 * 16 * (1024 + 128), 2 * out)
