"""consistency_loss: divergence of a policy from a reference, chunked, with the gradient in the same pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE, cpu_only
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES
from tolerance import LOW_PRECISION, assert_as_accurate
from torch.utils._python_dispatch import TorchDispatchMode

import vico_ext
from vico_ext import functional as VF
from vico_ext import reference
from vico_ext.ops import consistency as implementation

op = torch.ops.vico.consistency_loss
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}
KINDS = list(BETAS)


def _models(tokens, words, width=5, ref_width=7, dtype=torch.float64, scale=1.0):
    """hidden, weight, bias of the policy, which want gradients, and of the reference, which do not."""
    policy = [torch.randn(tokens, width), torch.randn(words, width) * scale, torch.randn(words)]
    ref = [torch.randn(tokens, ref_width), torch.randn(words, ref_width) * scale, torch.randn(words)]
    return [t.to(dtype).requires_grad_() for t in policy], [t.to(dtype) for t in ref]


def _loss(policy, ref, **options):
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = policy, ref
    return VF.consistency_loss(hidden, weight, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias, **options)


def _expected(policy, ref, kind="forward_kl", temperature=1.0, dtype=None):
    policy, ref = ([t if t is None or dtype is None else t.to(dtype) for t in ts] for ts in (policy, ref))
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = policy, ref
    return reference.consistency_loss(
        hidden, weight, ref_hidden, ref_weight, bias, ref_bias, temperature=temperature, beta=BETAS[kind]
    )


@st.composite
def problems(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from(DTYPES))
    tokens, words = draw(st.integers(0, 7)), draw(st.integers(1, 70))
    policy, ref = _models(tokens, words, draw(st.integers(1, 6)), draw(st.integers(1, 6)), dtype)
    if draw(st.booleans()):
        policy[0] = torch.cat([policy[0].detach()] * 2, 1)[:, : policy[0].shape[1]].requires_grad_()
    for model in (policy, ref):
        layout = draw(st.sampled_from(["none", "dense", "strided"]))
        if layout == "none":
            model[2] = None
        elif layout == "strided":
            model[2] = model[2].detach().repeat_interleave(2)[::2].requires_grad_(model is policy)
    weights = draw(st.none() | st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=tokens, max_size=tokens))
    return {
        "policy": policy,
        "ref": ref,
        "weights": None if weights is None else torch.tensor(weights),
        "kind": draw(st.sampled_from(KINDS)),
        "temperature": draw(st.sampled_from([1.0, 0.5, 3.0])),
        "block": draw(st.sampled_from([None, 1, 3])),
        "chunk": draw(st.sampled_from([3, 16, 8192])),
        "through": draw(st.sampled_from(["mean", "sum", "none", "both"])),
    }


def _reduced(loss, w, upstream):
    """The double losses of the tokens, as the tests below reduce them."""
    exact = {"mean": (w * loss).sum() / w.sum().clamp_min(1e-30), "sum": (w * loss).sum()}
    return exact | {"none": (w * loss * upstream).sum(), "both": (w * loss * (1 + upstream)).sum()}


def _terms(policy, ref, kind, temperature, w, upstream, reduction):
    """Sums of the magnitudes that add up to the gradients of hidden and weight."""
    hidden, weight, bias = (None if t is None else t.detach().double() for t in policy)
    logits = (hidden @ weight.t() + (0 if bias is None else bias)).requires_grad_()
    identity = torch.eye(len(weight), dtype=torch.float64)
    loss, _, _ = _expected((logits, identity, None), ref, kind, temperature, torch.float64)
    (grad,) = torch.autograd.grad(_reduced(loss, w, upstream)[reduction], logits, allow_unused=True)
    grad = torch.zeros_like(logits) if grad is None else grad.abs()
    return grad @ weight.abs(), grad.t() @ hidden.abs()


@given(problems())
@settings(deadline=None, max_examples=120)
def test_any_problem_and_its_gradients(problem):
    policy, ref, weights = problem["policy"], problem["ref"], problem["weights"]
    dtype, reduction = policy[0].dtype, problem["through"]
    w = torch.ones(len(policy[0])) if weights is None else weights
    upstream = torch.randn(len(w), dtype=torch.float64)
    chosen = implementation._CHUNK_WORDS[DEVICE]
    implementation._CHUNK_WORDS[DEVICE] = problem["chunk"]
    try:
        got = _loss(
            policy,
            ref,
            token_weights=weights,
            divergence=problem["kind"],
            beta=0.3,
            temperature=problem["temperature"],
            reduction="sum" if reduction == "both" else reduction,
            block_tokens=problem["block"],
        )
        scalar = got.loss
        if reduction in ("none", "both"):
            scalar = (got.token_loss * upstream.to(got.token_loss.dtype)).sum() + (reduction == "both") * got.loss.sum()
        leaves = [t for t in policy if t is not None]
        grads = torch.autograd.grad(scalar, leaves)
    finally:
        implementation._CHUNK_WORDS[DEVICE] = chosen

    loss, lse, ref_lse = _expected(policy, ref, problem["kind"], problem["temperature"], torch.float64)
    w = w.double()
    counts = (w != 0).double()
    exact = _reduced(loss, w, upstream)
    exact_grads = torch.autograd.grad(exact[reduction], leaves, allow_unused=True, retain_graph=True)
    # On a GPU the logits' gradients are rounded to 16 bits before their products with weight and hidden, as eager
    # PyTorch rounds them, and hidden times the tokens' weights as well. What that leaves is small beside the sum of the
    # terms' magnitudes alone, which cancel.
    rounded = [0.0] * len(leaves)
    if DEVICE == "cuda" and dtype in (torch.bfloat16, torch.float16):
        terms = _terms(policy, ref, problem["kind"], problem["temperature"], w, upstream, reduction)
        rounded = [torch.finfo(dtype).eps * t for t in terms] + [0.0] * (len(leaves) - 2)

    sums = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.finfo(sums).eps
    for value, wanted in ((got.token_loss, w * loss), (got.lse, lse * counts), (got.ref_lse, ref_lse * counts)):
        assert value.dtype == sums
        torch.testing.assert_close(value.double(), wanted, rtol=100 * eps, atol=100 * eps)
    for grad, wanted, leaf, more in zip(grads, exact_grads, leaves, rounded, strict=True):
        assert grad.dtype == dtype
        wanted = torch.zeros_like(leaf, dtype=torch.float64) if wanted is None else wanted.double()
        allowed = (2 * torch.finfo(dtype).eps + 500 * eps) * wanted.abs()
        allowed = allowed + 500 * eps + 1e-7 * (dtype == DTYPES[3]) + more
        assert ((grad.double() - wanted).abs() <= allowed).all(), (grad, wanted, allowed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_as_accurate_as_torch(dtype, kind):
    policy, ref = _models(33, 20_000, 24, 40, dtype, scale=0.5)
    upstream = torch.rand(33, dtype=torch.float64)

    def run(fn, to):
        loss = fn()
        return loss, *torch.autograd.grad(loss, policy, upstream.to(to))

    got = run(
        lambda: _loss(policy, ref, divergence=kind, beta=0.3, block_tokens=13, reduction="none").loss, torch.float32
    )
    eager = run(lambda: _expected(policy, ref, kind)[0], dtype)
    exact = run(lambda: _expected(policy, ref, kind, dtype=torch.float64)[0], torch.float64)
    assert_as_accurate(got[0], eager[0], exact[0])
    for ours, torchs, truth in zip(got[1:], eager[1:], exact[1:], strict=True):
        assert_as_accurate(ours, torchs, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    policy, ref = _models(4, 9, 3, 2)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    for held in (True, False):
        for reduction in ("total", "tokens"):

            def fn(hidden, weight, bias, held=held, reduction=reduction):
                total, loss, *_ = op(hidden, weight, bias, *ref, weights, 1.3, BETAS[kind], held, held, held, 2)
                return total if reduction == "total" else loss

            assert torch.autograd.gradcheck(fn, policy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    policy, ref = _models(3, 11, dtype=dtype)
    weights = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    torch.library.opcheck(op.default, (*policy, *ref, weights, 1.0, 0.0, True, True, True))
    torch.library.opcheck(op.default, (*policy[:2], None, *ref[:2], None, None, 2.0, 0.4, True, False, False, 2))


class _Counted(TorchDispatchMode):
    """How often consistency_loss ran inside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is op.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("reduction", "head_trains", "passes"), [("mean", True, 0), ("none", False, 0), ("none", True, 1)]
)
def test_backward_computes_logits_again_only_for_a_head_with_unknown_coefficients(reduction, head_trains, passes):
    (hidden, weight, bias), ref = _models(5, 20)
    leaves = [hidden, weight, bias] if head_trains else [hidden]
    if not head_trains:
        weight, bias = weight.detach(), bias.detach()
    loss = _loss((hidden, weight, bias), ref, reduction=reduction).loss
    with _Counted() as counted:
        torch.autograd.grad(loss.sum(), leaves)
    assert counted.count == passes


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_agrees_with_itself(kind):
    policy, _ = _models(6, 300, 8, dtype=torch.float32)
    got = _loss(policy, [t.detach() for t in policy], divergence=kind)
    assert got.token_loss.abs().max() < 1e-6
    assert torch.equal(got.lse, got.ref_lse)
    for grad in torch.autograd.grad(got.loss, policy):
        assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_words_impossible_in_both_models_count_for_nothing(kind, monkeypatch):
    monkeypatch.setitem(implementation._CHUNK_WORDS, DEVICE, 8)
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = _models(3, 40)
    with torch.no_grad():
        for b in (bias, ref_bias):
            b[:9] = b[20:23] = -torch.inf  # the whole first chunk among them
    keep = torch.isfinite(ref_bias)
    got = _loss((hidden, weight, bias), (ref_hidden, ref_weight, ref_bias), divergence=kind, beta=0.3)
    want, lse, _ = _expected((hidden, weight[keep], bias[keep]), (ref_hidden, ref_weight[keep], ref_bias[keep]), kind)
    torch.testing.assert_close(got.token_loss, want)
    torch.testing.assert_close(got.lse, lse)
    (grad,) = torch.autograd.grad(got.loss, hidden, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(want.mean(), hidden)[0])
    (grad_bias,) = torch.autograd.grad(got.loss, bias)
    assert torch.equal(grad_bias[~keep], torch.zeros(12, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_far_apart_stay_finite(kind):
    policy, ref = _models(4, 50, dtype=torch.float32, scale=300.0)
    got = _loss(policy, ref, divergence=kind, beta=0.3)
    want = _expected(policy, ref, kind, dtype=torch.float64)[0]
    torch.testing.assert_close(got.token_loss.double(), want, rtol=1e-5, atol=1e-5)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(got.loss, policy))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_hidden(kind):
    policy, ref = _models(3, 20)
    with torch.no_grad():
        policy[0][1, 2] = torch.nan
    got = _loss(policy, ref, divergence=kind)
    assert torch.equal(got.token_loss.isnan(), torch.tensor([False, True, False]))
    (grad,) = torch.autograd.grad(got.loss, policy[0])
    assert torch.equal(grad.isnan().all(1), torch.tensor([False, True, False]))


def test_ignored_positions_change_nothing():
    policy, ref = _models(6, 30)
    labels = torch.tensor([[-100, 3, 0], [4, -100, -100]])
    mask = torch.tensor([[True, True, True], [False, True, True]])
    counts = torch.tensor([1, 2])
    some = [policy[0].detach()[counts].requires_grad_(), *policy[1:]], [ref[0][counts], *ref[1:]]
    want = _loss(*some)
    with torch.no_grad():
        for hidden in (policy[0], ref[0]):
            hidden[[0, 3, 4, 5]] = torch.nan
    shaped = [policy[0].view(2, 3, -1), *policy[1:]], [ref[0].view(2, 3, -1), *ref[1:]]
    got = _loss(*shaped, labels=labels, mask=mask)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.token_loss.flatten()[counts], want.token_loss)
    assert torch.equal(got.lse.flatten()[counts], want.lse)
    assert got.lse.shape == got.ref_lse.shape == got.token_loss.shape == (2, 3)
    assert got.token_loss.count_nonzero() == got.lse.count_nonzero() == 2
    got_grads, want_grads = (
        torch.autograd.grad(got.loss, policy),
        torch.autograd.grad(want.loss, (some[0][0], *policy[1:])),
    )
    assert torch.equal(got_grads[0][counts], want_grads[0])
    assert got_grads[0].count_nonzero() == want_grads[0].numel()
    assert torch.equal(got_grads[1], want_grads[1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 4])
def test_no_tokens_that_count(tokens, reduction):
    policy, ref = _models(tokens, 20)
    got = _loss(policy, ref, labels=torch.full((tokens,), -1), ignore_index=-1, reduction=reduction)
    assert torch.equal(got.loss, torch.zeros((tokens,) if reduction == "none" else (), dtype=torch.float64))
    for grad, leaf in zip(torch.autograd.grad(got.loss.sum(), policy), policy, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_two_runs_are_bit_equal_and_leave_their_inputs_alone():
    policy, ref = _models(40, 9000, 16, 16, torch.float32)
    kept = [t.detach().clone() for t in (*policy, *ref)]
    runs = []
    for _ in range(2):
        out = _loss(policy, ref, block_tokens=16)
        first = torch.autograd.grad(out.loss, policy, retain_graph=True)
        runs.append([*out, *first, *torch.autograd.grad(out.loss, policy)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, (*policy, *ref), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][4:7], runs[0][7:], strict=True))


def test_two_dtypes_and_autocast():
    policy, ref = _models(5, 30, dtype=torch.float32)
    low = [t.bfloat16() for t in ref]
    mixed = _loss(policy, low)
    whole = _loss(policy, [t.float() for t in low])
    if DEVICE == "cpu":
        assert torch.equal(mixed.loss, whole.loss)
    else:  # products of 16 bits, exact in float32, and of float32 are summed by two kernels
        torch.testing.assert_close(mixed.loss, whole.loss)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = _loss(policy, ref)
        got_grads = torch.autograd.grad(got.loss, policy)
    want = _loss([t.bfloat16() for t in policy], low)
    assert torch.equal(got.loss, want.loss)
    assert got.loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in got_grads)
    assert all(torch.equal(a, b) for a, b in zip(got_grads, torch.autograd.grad(want.loss, policy), strict=True))


def test_compiles_whole_with_dynamic_tokens():
    loss = vico_ext.ConsistencyLoss("jsd", beta=0.3, temperature=2.0)

    def step(policy, ref, labels):
        out = _step_loss(loss, policy, ref, labels)
        return out.loss * 2 + out.token_loss.square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for tokens in (3, 8):
        policy, ref = _models(tokens, 30)
        labels = torch.arange(tokens) - 1
        got, want = (fn(policy, ref, labels) for fn in (compiled, step))
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, policy), torch.autograd.grad(want, policy), strict=True):
            torch.testing.assert_close(a, b)


def _step_loss(loss, policy, ref, labels):
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = policy, ref
    return loss(hidden, weight, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias, labels=labels)


def test_module_passes_its_options():
    policy, ref = _models(4, 20)
    labels = torch.tensor([7, 1, 2, 7])
    module = vico_ext.ConsistencyLoss("reverse_kl", temperature=2.0, reduction="sum", ignore_index=7, block_tokens=1)
    got = _step_loss(module, policy, ref, labels)
    torch.testing.assert_close(got.loss, _expected(policy, ref, "reverse_kl", 2.0)[0][1:3].sum())
    assert "'reverse_kl', temperature=2.0, reduction='sum'" in repr(module)
    assert not got.lse.requires_grad
    assert not got.ref_lse.requires_grad


def _peak(fn):
    """The most bytes that torch's allocator held during fn() beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@cpu_only("reads the CPU allocator's events")
def test_memory_is_that_of_one_block():
    policy, ref = _models(128, 30_000, 8, 8, torch.float32)
    frozen = [policy[0], policy[1].detach(), policy[2].detach()]
    ours = _peak(lambda: torch.autograd.grad(_loss(frozen, ref, block_tokens=4).loss, policy[0]))
    eager = _peak(lambda: torch.autograd.grad(_expected(frozen, ref)[0].mean(), policy[0]))
    assert ours < eager / 10
    # By default: the README's size, and the largest heads there are.
    for device, workspace in implementation._WORKSPACE.items():
        for words in (151_936, 262_144):
            assert implementation._block_size(4096, words, 4, 0, device) * words * 2 * 4 <= workspace
    sizes = [implementation._block_size(n, 151_936, 4, 0, "cuda") for n in (0, 1, 300, 4096, 5000)]
    assert sizes == [0, 1, 300, 1024, 1024]
    assert implementation._block_size(4096, 151_936, 4, 100, "cuda") == 100


def test_no_second_derivative():
    policy, ref = _models(3, 10)
    with pytest.raises(NotImplementedError, match="first derivatives only: call backward without create_graph"):
        torch.autograd.grad(_loss(policy, ref).loss, policy, create_graph=True)


Z = torch.zeros
GOOD = {"hidden": Z(2, 3), "weight": Z(9, 3), "ref_hidden": Z(2, 4), "ref_weight": Z(9, 4)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": Z(3, 3)}, ValueError, r"must hold the same positions, got shapes \[3, 3\] and \[2, 4\]"),
        ({"weight": Z(9, 4)}, ValueError, r"weight must have shape \[vocabulary, 3\] to fit hidden"),
        ({"ref_weight": Z(9, 3)}, ValueError, r"ref_weight must have shape \[vocabulary, 4\] to fit ref_hidden"),
        ({"ref_weight": Z(8, 4)}, ValueError, "must have one vocabulary, got 9 and 8 words"),
        ({"weight": Z(0, 3), "ref_weight": Z(0, 4)}, ValueError, "weight must hold at least one word"),
        ({"weight": Z(9, 3).double()}, TypeError, "weight must have the dtype of hidden, torch.float32, got"),
        ({"ref_hidden": Z(2, 4).double(), "ref_weight": Z(9, 4).double()}, TypeError, "both be float64 or neither"),
        ({"hidden": Z(2, 3).int()}, TypeError, "hidden must be float32, .* got torch.int32"),
        (
            {"weight": Z(9, 3, device="meta")},
            ValueError,
            f"weight must be on the device of hidden, {Z(0).device}, got meta",
        ),
        ({"bias": Z(8)}, ValueError, r"bias must have shape \[9\], got \[8\]"),
        ({"ref_bias": Z(9).half()}, TypeError, "ref_bias must be torch.float32 like ref_hidden"),
        ({"labels": Z(3).long()}, ValueError, r"shape of hidden but its last dimension, \[2\], got \[3\]"),
        ({"labels": Z(2)}, TypeError, "labels must be integers, got torch.float32"),
        ({"mask": Z(2)}, TypeError, "mask must be bool, got torch.float32"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of forward_kl, reverse_kl, jsd, got 'kl'"),
        ({"divergence": "jsd", "beta": 1.0}, ValueError, "beta must lie strictly between 0 and 1, got 1.0"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none, got 'max'"),
        ({"block_tokens": 0}, ValueError, "block_tokens must be at least 1, got 0"),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        VF.consistency_loss(**{**GOOD, **changed})


STATE = torch.zeros(2, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (Z(2, 4).half(), Z(2, 4).half(), STATE, None, None, 0.0, 1.0),
            "policy must be float32 or float64, got float16",
        ),
        ((Z(2, 4), Z(2, 4).double(), STATE, None, None, 0.0, 1.0), "reference must have the dtype of policy"),
        ((Z(2, 4), Z(2, 5), STATE, None, None, 0.0, 1.0), r"reference must have shape \[rows, words\] = \[2, 4\]"),
        ((Z(4, 2).t(), Z(2, 4), STATE, None, None, 0.0, 1.0), "policy and reference must be contiguous"),
        ((Z(2, 4), Z(2, 4), STATE[:1], None, None, 0.0, 1.0), r"state must have shape \[rows, 6\] = \[2, 6\]"),
        ((Z(2, 4), Z(2, 4), STATE.float(), None, None, 0.0, 1.0), "state must be float64, got float32"),
        ((Z(2, 4), Z(2, 4), STATE, Z(3), None, 0.0, 1.0), r"policy_bias must have shape \[words\] = \[4\], got \[3\]"),
        ((Z(2, 4), Z(2, 4), STATE, None, Z(4).double(), 0.0, 1.0), "reference_bias must have the dtype of policy"),
        ((Z(2, 4), Z(2, 4), STATE, None, None, 1.5, 1.0), r"beta must lie in \[0, 1\], got 1.5"),
        ((Z(2, 4), Z(2, 4), STATE, None, None, 0.0, -1.0), "temperature must be positive and finite, got -1"),
    ],
)
def test_bad_calls_of_the_kernels(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vico.consistency_statistics_(*arguments)


def test_matches_cross_entropy_of_a_certain_reference():
    """A reference that is certain of the label makes forward KL the cross-entropy, an independent yardstick."""
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(12, 4)
    labels = torch.tensor([3, 0, -100, 11, 5, 3])
    # exp(-60) is nothing, and a difference of logits of 60 is rounded by 2e-6; of 1000 it was by 3e-5, more than what
    # assert_close allows.
    certain = F.one_hot(labels.clamp_min(0), 12).float() * 60
    got = VF.consistency_loss(hidden, weight, certain, torch.eye(12), labels=labels)
    want = F.cross_entropy(hidden @ weight.t(), labels)
    torch.testing.assert_close(got.loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (got.loss, want)))
