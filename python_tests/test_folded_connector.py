"""The connector with its LayerNorms folded into the first Linears: results, when it runs, no weight is stale."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from device import DEVICE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_as_accurate
from torch.utils._python_dispatch import TorchDispatchMode

import vico_ext
from vico_ext import functional as VF
from vico_ext import reference
from vico_ext.functional import folded as folded_functions
from vico_ext.routing import RoutingPlan

MIXED = (False, True, True)
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def everywhere(monkeypatch):
    """Runs folded on every device and in every dtype: elsewhere than on CUDA in 16 bits the op is composed."""
    monkeypatch.setattr(folded_functions, "_has_kernels", lambda tokens: True)


def make(dtype=torch.float32, **kw):
    module = vico_ext.FusedConnector(16, 24, dtype=dtype, projection="folded", **kw).eval()
    for norm in (module.mlp1[0], module.mlp2[0]):
        torch.nn.init.normal_(norm.weight, 1, 0.3)
        torch.nn.init.normal_(norm.bias, 0, 0.3)
    return module


def make_tokens(tiles=3, dtype=torch.float32):
    return (torch.randn(tiles, 65, 16) + 0.5).to(dtype)


def plan_of(compress, tokens=(16, 4)):
    return RoutingPlan.from_compress(torch.tensor(compress, dtype=torch.bool), tokens)


def called_ops(fn):
    names = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Names():
        fn()
    return names


def runs_folded(fn):
    names = called_ops(fn)
    assert ("vico::shuffled_projection" in names) == ("vico::shuffle_statistics" in names)
    return "vico::shuffled_projection" in names


def with_torch(module, *arguments):
    module.projection = "torch"
    out = module(*arguments)
    module.projection = "folded"
    return out


# ---- results


@pytest.mark.usefixtures("everywhere")
@given(st.lists(st.booleans(), max_size=4), st.booleans(), st.sampled_from(["v1", "v2"]), st.integers(0, 99))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_matches_reference(compress, has_cls, version, seed):
    torch.manual_seed(seed)
    module = make(torch.float64, has_cls=has_cls, ps_version=version, grid=(4, 12))
    wide = torch.randn(len(compress), has_cls + 48, 19, dtype=torch.float64)
    tokens, plan = wide[..., 1:17], plan_of(compress, (12, 3))
    weights = dict(module.named_parameters())
    with torch.no_grad():
        want = reference.connector(tokens, weights, plan.compress, skip=int(has_cls), version=version, grid=(4, 12))
        torch.testing.assert_close(module(tokens, plan), want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(module(tokens), with_torch(module, tokens), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("compress", [MIXED, (True, True), (False,), None])
def test_as_accurate_as_torch(dtype, compress):
    module, tokens = make(dtype), make_tokens(3 if compress is None else len(compress), dtype)
    plan = None if compress is None else plan_of(compress)
    weights = {k: w.double() for k, w in module.state_dict().items()}
    if compress is None:
        exact = reference.connector_256(tokens.double(), weights)
    else:
        exact = reference.connector(tokens.double(), weights, plan.compress)
    with torch.no_grad():
        assert runs_folded(lambda: module(tokens, plan))
        assert_as_accurate(module(tokens, plan), with_torch(module, tokens, plan), exact, roundings=2.0)


@pytest.mark.usefixtures("everywhere")
def test_two_connectors_take_three_launches():
    module, tokens, plan = make(), make_tokens(), plan_of(MIXED)
    with torch.no_grad():
        module(tokens, plan)
        names = called_ops(lambda: module(tokens, plan))
    # What the ops are composed of here is theirs.
    ours = {"vico::shuffle_statistics", "vico::shuffled_projection", "vico::packed_projection"}
    assert ours <= names
    assert not names & {"vico::normalized_shuffle", "vico::projection"}


# ---- when it runs


@pytest.mark.usefixtures("everywhere")
def test_not_where_a_gradient_is_recorded():
    module, tokens, plan = make(), make_tokens(), plan_of(MIXED)
    assert not runs_folded(lambda: module(tokens, plan))
    module(tokens, plan).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    with torch.no_grad():
        assert runs_folded(lambda: module(tokens, plan))
    with torch.inference_mode():
        assert runs_folded(lambda: module(tokens, plan))
    module.requires_grad_(False)
    assert runs_folded(lambda: module(tokens, plan))
    assert not runs_folded(lambda: module(tokens.clone().requires_grad_(), plan))


@pytest.mark.usefixtures("everywhere")
def test_not_with_dropout():
    module, tokens, plan = make(dropout=0.5), make_tokens(), plan_of(MIXED)
    with torch.no_grad():
        module.train()
        assert not runs_folded(lambda: module(tokens, plan))
        assert runs_folded(lambda: module(tokens)), "the full connector has no dropout"
        module.eval()
        assert runs_folded(lambda: module(tokens, plan))


def test_only_in_16_bits():
    module, tokens, plan = make(), make_tokens(), plan_of(MIXED)
    with torch.no_grad():
        assert not runs_folded(lambda: module(tokens, plan))
        torch.testing.assert_close(module(tokens, plan), with_torch(module, tokens, plan))
    assert not module.folded_weights._kept


@pytest.mark.usefixtures("everywhere")
def test_under_autocast():
    module, tokens, plan = make(), make_tokens(dtype=torch.bfloat16), plan_of(MIXED)
    exact = reference.connector(tokens.double(), {k: w.double() for k, w in module.state_dict().items()}, plan.compress)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert not runs_folded(lambda: module(tokens.float(), plan)), "its tokens are normalised before they are cast"
        assert runs_folded(lambda: module(tokens, plan))
        got, want = module(tokens, plan), with_torch(module, tokens, plan)
    assert got.dtype == want.dtype == torch.bfloat16
    # On the CPU autocast takes the composed op's sums to bfloat16 too.
    assert_as_accurate(got, want, exact, ratio=2.0 if DEVICE == "cuda" else 4.0)


@pytest.mark.usefixtures("everywhere")
def test_not_under_compile_and_export():
    module, tokens = make(), make_tokens()
    with torch.no_grad():
        want = with_torch(module, tokens, plan_of(MIXED))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens, plan_of(MIXED)), want)
        exported = torch.export.export(module, (tokens,))
        torch.testing.assert_close(exported.module()(tokens), with_torch(module, tokens))
    assert not module.folded_weights._kept


@pytest.mark.usefixtures("everywhere")
def test_not_with_weights_that_cannot_be_watched():
    tokens = make_tokens()
    with torch.inference_mode():
        module = make()
        assert not runs_folded(lambda: module(tokens))


@pytest.mark.usefixtures("everywhere")
def test_function_without_a_keeper():
    module, tokens, plan = make(), make_tokens(), plan_of(MIXED)
    weights, keeper = dict(module.named_parameters()), VF.FoldedWeights()
    with torch.no_grad():
        want = with_torch(module, tokens, plan)
        for kw in ({}, {"folded": keeper}, {"folded": keeper}):
            got = VF.connector(tokens, weights, plan, projection="folded", **kw)
            torch.testing.assert_close(got, want)


# ---- no weight is stale


def folded_tensors(module):
    return {name: kept.folded for name, kept in module.folded_weights._kept.items()}


def check(module, dtype=torch.float32):
    """The module's results are those of the weights it has now; folded anew or not."""
    tokens, plan = make_tokens(dtype=dtype), plan_of(MIXED)
    with torch.no_grad():
        got, want = module(tokens, plan), with_torch(module, tokens, plan)
        tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(got, want, **tolerance)
        torch.testing.assert_close(module(tokens), with_torch(module, tokens), **tolerance)
    return folded_tensors(module)


def optimizer_step(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(make_tokens(), plan_of(MIXED)).square().sum().backward()
    optimizer.step()


def foreach_step(module):
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(module.parameters(), lr=0.1, foreach=True).step()


def fused_step(module):
    """Changes the parameters without torch's counting it."""
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(module.parameters(), lr=0.1, fused=True).step()


def in_inference_mode(module):
    with torch.inference_mode():
        module.mlp2[1].weight.mul_(1.5)


def one_element(module):
    with torch.no_grad():
        module.mlp1[0].weight[3] = 4


def load(module):
    module.load_state_dict(make().state_dict())


def load_assigned(module):
    module.load_state_dict(make().state_dict(), assign=True)


def new_parameter(module):
    for layer in (module.mlp1[1], module.mlp2[0]):
        layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)


def new_layer(module):
    module.mlp2[1] = torch.nn.Linear(256, 48)


def new_memory(module):
    for p in module.parameters():
        p.data = p.data + 0.25


def a_detached_alias(module):
    module.mlp1[1].bias.detach().add_(3)


def vector_to_parameters(module):
    vector = torch.nn.utils.parameters_to_vector(module.parameters())
    torch.nn.utils.vector_to_parameters(vector * 1.25, module.parameters())


CHANGES = [
    optimizer_step,
    foreach_step,
    fused_step,
    in_inference_mode,
    one_element,
    load,
    load_assigned,
    new_parameter,
    new_layer,
]
CHANGES += [new_memory, a_detached_alias, vector_to_parameters]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_that_change_are_folded_anew(change):
    module = make()
    first = check(module)
    assert set(first) == {"mlp1.1", "mlp2.1"}
    assert all(a is b for a, b in zip(first.values(), check(module).values(), strict=True)), "folded once"
    change(module)
    again = check(module)
    assert any(again[name] is not first[name] for name in first)


@pytest.mark.usefixtures("everywhere")
def test_steps_of_others_change_nothing():
    module, other = make(), torch.nn.Parameter(torch.ones(3))
    first = check(module)
    other.grad = torch.ones(3)
    torch.optim.SGD([other], lr=0.1, fused=True).step()
    assert all(a is b for a, b in zip(first.values(), check(module).values(), strict=True))


@pytest.mark.usefixtures("everywhere")
def test_another_dtype():
    module = make()
    check(module)
    for dtype in HALVES:
        module.to(dtype)
        assert not module.folded_weights._kept, "freed"
        assert check(module, dtype)["mlp1.1"].weight.dtype == dtype
    module.mlp1.float()  # behind the module's back
    module.mlp2.float()
    assert check(module)["mlp1.1"].weight.dtype == torch.float32


@pytest.mark.usefixtures("everywhere")
def test_what_is_written_through_data_in_training_is_seen():
    module = make()
    check(module)
    module.train()
    module.mlp1[1].weight.data.mul_(2)
    module.eval()
    check(module)
    module.mlp1[1].weight.data.mul_(2)  # nothing tells of this
    module.folded_weights.clear()
    check(module)


@pytest.mark.usefixtures("everywhere")
def test_stale_weights_are_freed():
    module = make()
    kept = [weakref.ref(folded.weight) for folded in check(module).values()]
    with torch.no_grad():
        module.mlp1[1].weight.add_(1)
        module(make_tokens())
    gc.collect()
    assert [ref() is None for ref in kept] == [True, False]
    module.half()
    assert all(ref() is None for ref in kept)


@pytest.mark.usefixtures("everywhere")
def test_copies_begin_empty_and_states_hold_nothing():
    module = make()
    check(module)
    assert list(module.state_dict()) == list(vico_ext.FusedConnector(16, 24).state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert not other.folded_weights._kept
        check(other)
    assert "projection='folded'" in repr(module)


def test_no_such_projection():
    with pytest.raises(ValueError, match="projection must be 'torch', 'fused' or 'folded', got 'own'"):
        VF.connector(make_tokens(), {}, projection="own")
