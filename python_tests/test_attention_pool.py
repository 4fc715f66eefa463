"""attention_pool: absorbed attention pooling against plain PyTorch in fp64."""

from __future__ import annotations

import pytest
import torch
from device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import LOW_PRECISION, assert_as_accurate, relative_error
from torch import Tensor

from vico_ext import functional as VF
from vico_ext import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
op = torch.ops.vico.attention_pool
backward_op = torch.ops.vico.attention_pool_backward


def _expected(tokens: Tensor, query: Tensor, skip: int) -> tuple[Tensor, Tensor]:
    return reference.attention_pool(tokens.double(), query.double(), skip=skip)


def _dense(t: Tensor) -> Tensor:
    return t


def _padded(t: Tensor) -> Tensor:
    """A view into a wider buffer that is NaN outside the view: every stride is odd and larger than dense."""
    wide = t.new_full((t.shape[0], t.shape[1] + 2, t.shape[2] + 3), torch.nan)
    wide[:, 1:-1, 2:-1] = t
    return wide[:, 1:-1, 2:-1]


def _channels_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _rows_first(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = st.sampled_from([_dense, _padded, _channels_first, _rows_first])


@st.composite
def problems(draw, dtypes=DTYPES):
    torch.manual_seed(draw(st.integers(0, 2**20)))
    # 64 tokens are a block and 256 a chunk of the kernel: sizes around both.
    tiles, skip = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    count = draw(st.integers(1, 9) | st.sampled_from([16, 63, 64, 65, 255, 256, 257, 300, 513]))
    channels = draw(st.integers(1, 36) | st.sampled_from([257]))
    heads = draw(st.integers(1, 9) | st.sampled_from([16, 17, 24]))
    dtype = draw(st.sampled_from(dtypes))
    tokens = draw(LAYOUTS)(torch.randn(tiles, skip + count, channels).to(dtype))
    shared = draw(st.booleans())
    query = draw(LAYOUTS)((torch.randn(1 if shared else tiles, heads, channels) * channels**-0.5).to(dtype))
    return tokens, query.expand(tiles, -1, -1), skip


@given(problems())
@settings(deadline=None, max_examples=150)
def test_matches_reference(problem):
    tokens, query, skip = problem
    context, lse = op(tokens, query, skip)
    want_context, want_lse = _expected(tokens, query, skip)
    assert context.dtype == tokens.dtype
    assert lse.dtype == (torch.float64 if tokens.dtype == torch.float64 else torch.float32)
    # A sum's error grows with what was summed, not with the sum, which may cancel; and a weight's with the terms of its
    # score, whose rounding errors the exponential turns into relative ones.
    x, q = tokens[:, skip:].double(), query.double()
    score_terms = q.abs() @ x.abs().transpose(1, 2)
    weights = (q @ x.transpose(1, 2)).softmax(-1)
    bound = torch.finfo(context.dtype).eps * ((weights * (4 + score_terms)) @ x.abs())
    assert (context.double() - want_context).norm() <= bound.norm()
    most = float(score_terms.max()) if score_terms.numel() else 0.0
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=(16 + most) * torch.finfo(lse.dtype).eps)


@given(problems(dtypes=(torch.float64,)), st.booleans())
@settings(deadline=None, max_examples=100)
def test_gradients_match_reference(problem, need_grad_tokens):
    tokens, query, skip = problem
    tokens, query = tokens.detach().requires_grad_(), query.detach().requires_grad_()
    context, lse = op(tokens, query, skip)
    grad = torch.randn_like(context)
    want = torch.autograd.grad(_expected(tokens, query, skip)[0], (tokens, query), grad)
    got = backward_op(grad, tokens.detach(), query.detach(), context.detach(), lse, skip, need_grad_tokens)
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-12)
    if need_grad_tokens:
        torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12)
    else:
        assert got[0].shape == (0,)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("channels", [1024, 3200])
def test_accuracy_at_real_sizes(dtype, channels):
    tokens = torch.randn(2, 1025, channels).to(dtype)
    query = (torch.randn(2, 16, channels) * 2 * channels**-0.5).to(dtype)
    exact, eager = _expected(tokens, query, 1)[0], reference.attention_pool(tokens, query)[0]
    assert_as_accurate(VF.attention_pool(tokens, query), eager, exact)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_accuracy_of_gradients(dtype):
    tokens, query, grad = (torch.randn(s).to(dtype) for s in ((2, 301, 96), (2, 16, 96), (2, 16, 96)))

    def gradients(attend, kind):
        leaves = [t.to(kind).requires_grad_() for t in (tokens, query * 0.2)]
        return torch.autograd.grad(attend(*leaves), leaves, grad.to(kind))

    def plain(t, q):
        return reference.attention_pool(t, q)[0]

    ours = gradients(VF.attention_pool, dtype)
    for got, eager, exact in zip(ours, gradients(plain, dtype), gradients(plain, torch.float64), strict=True):
        assert_as_accurate(got, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [37, -37, 10000])
def test_large_scores(dtype, step):
    """Integers, so that the scores are exact: rising ones move the running maximum in every block."""
    count = 600
    scores = torch.arange(count) * step if abs(step) < 1000 else torch.arange(count) % 2 * 2 * step - step
    tokens = torch.stack([scores, torch.arange(count) % 7], -1).to(dtype)[None]
    query = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=dtype)
    context, lse = op(tokens, query, 0)
    want_context, want_lse = _expected(tokens, query, 0)
    assert relative_error(context, want_context) <= 8 * torch.finfo(dtype).eps
    assert relative_error(lse, want_lse) <= torch.finfo(dtype).eps


def test_exponential_is_accurate_over_its_range():
    """Two tokens of scores 0 and s and an indicator of the second: the context is exp(s) / (1 + exp(s)).

    Sum and division may add their roundings to the exponential's own.
    """
    scores = torch.linspace(-104, 0, 20001, dtype=torch.float64).float()
    tokens = torch.zeros(len(scores), 2, 2)
    tokens[:, 1, 0], tokens[:, 1, 1] = scores, 1.0
    query = torch.tensor([1.0, 0.0]).expand(len(scores), 1, 2)
    got, want = op(tokens, query, 0)[0][:, 0, 1].double(), scores.double().sigmoid()
    ulp = torch.nextafter(want.float(), torch.tensor(torch.inf)).double() - want.float().double()
    assert ((got - want).abs() / ulp).max() <= 3


def test_tokens_of_score_minus_infinity_weigh_nothing():
    tokens = torch.randn(1, 100, 3)
    tokens[:, :70, 0] = -3e38  # overflows to -inf under the query: all of the kernel's first block
    tokens[:, 70:, 0] = 0.0
    query = torch.tensor([[[9.0, 1.0, 0.0]]])
    context, _ = op(tokens, query, 0)
    torch.testing.assert_close(context, op(tokens[:, 70:], query, 0)[0])


def test_equal_tokens_give_the_token():
    token = torch.randn(5)
    context, lse = op(token.expand(2, 700, 5), torch.randn(2, 4, 5), 0)
    torch.testing.assert_close(context, token.expand(2, 4, 5))
    assert torch.isfinite(lse).all()


def test_nan_stays_in_its_tile_and_skipped_tokens_are_not_read():
    tokens, query = torch.randn(3, 9, 5), torch.randn(3, 4, 5)
    clean = op(tokens, query, 1)[0]
    tokens[:, 0] = torch.nan
    assert torch.equal(op(tokens, query, 1)[0], clean)
    tokens[1, 3, 2] = torch.nan
    context = op(tokens, query, 1)[0]
    assert context[1].isnan().all()
    assert torch.equal(context[[0, 2]], clean[[0, 2]])


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _all_results(tokens: Tensor, query: Tensor) -> list[Tensor]:
    context, lse = op(tokens, query, 1)
    return [context, lse, *backward_op(context * 3, tokens, query, context, lse, 1, True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_nothing_but_the_tile(dtype, threads):
    tokens, query = torch.randn(3, 1025, 40).to(dtype), torch.randn(3, 16, 40).to(dtype) * 0.2
    threads(1)
    alone = [
        torch.cat(r) for r in zip(*(_all_results(tokens[t : t + 1], query[t : t + 1]) for t in range(3)), strict=True)
    ]
    for count in (1, 2, 3):
        threads(count)
        for _ in range(2):
            for got, want in zip(_all_results(tokens, query), alone, strict=True):
                assert torch.equal(got, want)


def test_inputs_are_left_alone_and_uninitialised_memory_is_not_read():
    tokens, query = torch.randn(2, 300, 19), torch.randn(2, 5, 19)
    copies = tokens.clone(), query.clone()
    want = _all_results(tokens, query)
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        for got, expected in zip(_all_results(tokens, query), want, strict=True):
            assert torch.equal(got, expected)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(tokens, copies[0])
    assert torch.equal(query, copies[1])


def test_one_query_for_all_tiles_gets_the_sum_of_the_gradients():
    tokens, query = torch.randn(3, 10, 6, dtype=torch.float64), torch.randn(1, 2, 6, dtype=torch.float64)
    query.requires_grad_()
    (got,) = torch.autograd.grad(VF.attention_pool(tokens, query).sum(), query)
    (want,) = torch.autograd.grad(reference.attention_pool(tokens, query)[0].sum(), query)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    tokens = torch.randn(2, 9, 5, dtype=dtype, requires_grad=True)
    query = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
    torch.library.opcheck(op.default, (tokens, query, 1))
    torch.library.opcheck(op.default, (tokens.detach(), query[:1].detach().expand(2, -1, -1)))
    context, lse = op(tokens.detach(), query.detach(), 1)
    rest = (tokens.detach(), query.detach(), context, lse, 1)
    for need_grad_tokens in (True, False):
        torch.library.opcheck(backward_op.default, (torch.randn_like(context), *rest, need_grad_tokens))


def test_gradcheck():
    tokens = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    query = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, q: op(t, q, 1)[0], (tokens, query))
    assert torch.autograd.gradcheck(
        lambda q: op(tokens.detach(), q.expand(2, -1, -1), 0)[0], (query[:1].detach().requires_grad_(),)
    )


def test_compiles_whole_with_dynamic_tiles():
    compiled = torch.compile(lambda t, q: VF.attention_pool(t, q) * 2, fullgraph=True, dynamic=True)
    for tiles in (2, 3, 5):
        tokens, query = torch.randn(tiles, 17, 6), torch.randn(tiles, 4, 6, requires_grad=True)
        got, want = compiled(tokens, query), VF.attention_pool(tokens, query) * 2
        assert torch.equal(got, want)
        assert torch.equal(*(torch.autograd.grad(y.sum(), query)[0] for y in (got, want)))


def test_autocast():
    tokens, query = torch.randn(2, 9, 5), torch.randn(2, 3, 5)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = VF.attention_pool(tokens, query)
        assert VF.attention_pool(tokens.double(), query.double()).dtype == torch.float64
    assert torch.equal(got, VF.attention_pool(tokens.bfloat16(), query.bfloat16()))


@pytest.mark.parametrize(
    ("tokens", "query", "message"),
    [
        ((17, 6), (2, 3, 6), r"tokens must have shape \[tiles, tokens, channels\], got \[17, 6\]"),
        ((2, 1, 6), (2, 3, 6), r"at least one token per tile after the CLS token, got shape \[2, 1, 6\]"),
        ((2, 5, 6), (2, 3, 7), r"query must have shape .* = \[2 or 1, \*, 6\], got \[2, 3, 7\]"),
        ((2, 5, 6), (3, 3, 6), r"query must have shape .* = \[2 or 1, \*, 6\], got \[3, 3, 6\]"),
        ((2, 5, 6), (3, 6), r"query must have shape .*, got \[3, 6\]"),
    ],
)
def test_bad_arguments(tokens, query, message):
    with pytest.raises(ValueError, match=message):
        VF.attention_pool(torch.zeros(tokens), torch.zeros(query))


def test_bad_tensors():
    tokens, query = torch.zeros(2, 5, 6), torch.zeros(2, 3, 6)
    context, lse = op(tokens, query, 1)
    for args, message in (
        ((tokens.long(), query, 1), "tokens must be float32, .* got int64"),
        ((tokens, query.double(), 1), r"query must have the dtype of tokens \(float32\), got float64"),
        ((tokens, query, -1), "skip must not be negative, got -1"),
        ((tokens, query, 5), r"at least one token per tile after the first 5, .* got shape \[2, 5, 6\]"),
        ((tokens, query[:1], 1), r"query must have shape \[tiles, heads, channels\] = \[2, \*, 6\], got \[1, 3, 6\]"),
        ((tokens[..., :0], query[..., :0], 1), r"tokens must have at least one channel, got shape \[2, 5, 0\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*args)
    for args, message in (
        ((context[:1], tokens, query, context, lse, 1, True), r"grad_context must have shape .* got \[1, 3, 6\]"),
        ((context, tokens, query, context.half(), lse, 1, True), "context must have the dtype of tokens"),
        ((context, tokens, query, context, lse.double(), 1, True), "lse must be float32, got float64"),
        ((context, tokens, query, context, lse[:, :1], 1, True), r"lse must have shape .* = \[2, 3\], got \[2, 1\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward_op(*args)
