"""merge_tokens, gather and scatter: pure data movement, so every comparison is bit-equal."""

from __future__ import annotations

import pytest
import torch
from device import DEVICE, ends_the_device, value_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vico_ext import functional as VF
from vico_ext import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ops = torch.ops.vico


def _strided(rows: Tensor) -> Tensor:
    """A view into a wider buffer that is NaN around it."""
    wide = rows.new_full((len(rows) * 2, rows.shape[1] + 3), torch.nan)
    wide[::2, 1:-2] = rows
    return wide[::2, 1:-2]


def _column_major(rows: Tensor) -> Tensor:
    return rows.t().contiguous().t()


@st.composite
def problems(draw, unique=False):
    torch.manual_seed(draw(st.integers(0, 10_000)))
    r, t, hidden = draw(st.integers(0, 9)), draw(st.integers(0, 9)), draw(st.integers(0, 37))
    dtype = draw(st.sampled_from(DTYPES))
    layouts = st.sampled_from([lambda x: x, _strided, _column_major])
    embeds = draw(layouts)(torch.randn(r, hidden).to(dtype))
    tokens = draw(layouts)(torch.randn(t, hidden).to(dtype))
    source = draw(st.lists(st.integers(-1, r + t - 1), max_size=25))
    return embeds, tokens, torch.tensor(source, dtype=torch.int64)


@given(problems())
@settings(deadline=None, max_examples=150)
def test_matches_reference(problem):
    got = VF.merge_tokens(*problem)
    assert torch.equal(got, reference.merge_tokens(*problem))
    assert got.is_contiguous()


@given(problems())
@settings(deadline=None, max_examples=100)
def test_text_rows_are_those_of_the_merge(problem):
    embeds, tokens, source = problem
    got, want = VF.text_rows(embeds, source, len(tokens)), VF.merge_tokens(*problem)
    assert got.shape == want.shape
    text = source < len(embeds)
    assert torch.equal(got[text], want[text])


def test_text_rows_refuse_to_lose_a_gradient():
    embeds, source = torch.randn(2, 3, requires_grad=True), torch.tensor([1, 2, -1])
    with pytest.raises(ValueError, match="rows unwritten and has no gradient, but embeds requires one: use merge_tok"):
        VF.text_rows(embeds, source, 1)
    with torch.no_grad():
        assert torch.equal(VF.text_rows(embeds, source, 1)[0], embeds[1])


@given(problems())
@settings(deadline=None, max_examples=100)
def test_backward_is_the_adjoint(problem):
    embeds, tokens, source = (t.detach() for t in problem)
    embeds, tokens = embeds.double().requires_grad_(), tokens.double().requires_grad_()
    out = VF.merge_tokens(embeds, tokens, source)
    grad_out = torch.randint_like(out, -8, 9)  # sums are exact in any order
    got = torch.autograd.grad(out, (embeds, tokens), grad_out)
    want = torch.autograd.grad(reference.merge_tokens(embeds, tokens, source), (embeds, tokens), grad_out)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_rows_sum_in_a_fixed_order(dtype):
    source = torch.randint(-1, 5, (400,))
    grad_out = torch.randn(400, 5000).to(dtype)
    runs = [ops.merge_tokens_backward(grad_out, source, 3, 2, True, True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    exact = torch.zeros(6, 5000, dtype=torch.float64).index_add(0, source % 6, grad_out.double())
    got = torch.cat(runs[0]).double()
    assert (got - exact[:5]).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_the_gradient_that_is_asked_for(needed):
    embeds, tokens = (torch.randn(3, 4, requires_grad=need) for need in needed)
    out = VF.merge_tokens(embeds, tokens, torch.tensor([0, 4, -1, 2]))
    out.sum().backward()
    if needed[0]:
        assert embeds.grad.sum(1).tolist() == [4, 0, 4]
        assert tokens.grad is None
    else:
        assert tokens.grad.sum(1).tolist() == [0, 4, 0]
        assert embeds.grad is None


def test_gradcheck():
    embeds = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    source = torch.tensor([5, -1, 0, 5, 3, 4])
    assert torch.autograd.gradcheck(lambda e, t: VF.merge_tokens(e, t, source), (embeds, tokens))
    index = torch.tensor([3, 0, 1])
    assert torch.autograd.gradcheck(lambda e, t: VF.scatter_tokens(e, index, t), (embeds, tokens))
    assert torch.autograd.gradcheck(lambda e: VF.gather_tokens(e, torch.tensor([2, -1, 2])), (embeds,))


def test_backward_leaves_its_inputs_alone():
    grad_out, source = torch.randn(6, 5), torch.tensor([0, 0, 3, -1, 2, 1])
    before = grad_out.clone(), source.clone()
    ops.merge_tokens_backward(grad_out, source, 2, 2, True, True)
    assert torch.equal(grad_out, before[0])
    assert torch.equal(source, before[1])


@pytest.mark.parametrize(("rows", "hidden", "dtype"), [(8200, 1037, torch.float32), (16400, 1037, torch.bfloat16)])
def test_outputs_of_new_memory(rows, hidden, dtype):
    """From 32 MiB on rows are copied in another way."""
    embeds, tokens = torch.randn(70, hidden).to(dtype).requires_grad_(), torch.randn(rows, hidden).to(dtype)
    tokens.requires_grad_()
    source = torch.randperm(rows) + 70
    source[::7] = -1
    source[3] = 5
    out = VF.merge_tokens(embeds, tokens, source)
    assert out.numel() * out.element_size() >= 32 << 20
    assert torch.equal(out, reference.merge_tokens(embeds, tokens, source))
    (got,) = torch.autograd.grad(out, tokens, out.detach())
    used = torch.zeros(rows, dtype=torch.bool)
    used[source[source >= 70] - 70] = True
    assert torch.equal(got, tokens * used[:, None])


@st.composite
def scatters(draw):
    torch.manual_seed(draw(st.integers(0, 10_000)))
    rows, hidden = draw(st.integers(1, 12)), draw(st.integers(1, 21))
    index = torch.randperm(rows)[: draw(st.integers(0, rows))]
    if draw(st.booleans()):
        index = index.sort().values
    dtype = draw(st.sampled_from(DTYPES))
    tokens = draw(st.sampled_from([lambda x: x, _strided, _column_major]))(torch.randn(len(index), hidden).to(dtype))
    return torch.randn(rows, hidden).to(dtype), index, tokens


@given(scatters())
@settings(deadline=None, max_examples=100)
def test_scatter(problem):
    embeds, index, tokens = problem
    want = embeds.clone()
    want[index] = tokens
    before = embeds.clone()
    assert torch.equal(VF.scatter_tokens(embeds, index, tokens), want)
    assert torch.equal(embeds, before)
    assert torch.equal(VF.gather_tokens(want, index), tokens)
    buffer = _strided(embeds)
    around = buffer._base.isnan().sum()
    assert VF.scatter_tokens_(buffer, index, tokens) is buffer
    assert torch.equal(buffer, want)
    assert buffer._base.isnan().sum() == around


@given(scatters())
@settings(deadline=None, max_examples=40)
def test_gather_and_scatter_are_adjoint(problem):
    embeds, index, tokens = (t.double().round() if t.is_floating_point() else t for t in problem)
    scattered = VF.scatter_tokens(torch.zeros_like(embeds), index, tokens)
    assert (scattered * embeds).sum() == (tokens * VF.gather_tokens(embeds, index)).sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    embeds = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    tokens = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    source = torch.tensor([6, -1, 0, 0, 4])
    torch.library.opcheck(ops.merge_tokens.default, (embeds, tokens, source))
    grad = torch.randn(5, 5, dtype=dtype)
    for needed in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(ops.merge_tokens_backward.default, (grad, source, 4, 3, *needed))
    text = torch.tensor([3, -1, 0, 0, 2])  # what is left unwritten cannot be compared
    torch.library.opcheck(ops.text_rows.default, (embeds.detach(), text, 3))
    torch.library.opcheck(ops.scatter_tokens_.default, (embeds.detach(), torch.tensor([2, 0, 3]), tokens.detach()))


def test_tokens_take_the_dtype_of_embeds():
    embeds, tokens = torch.randn(2, 4, dtype=torch.bfloat16), torch.randn(2, 4, requires_grad=True)
    out = VF.merge_tokens(embeds, tokens, torch.tensor([2, 0]))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert tokens.grad.dtype == torch.float32
    assert VF.scatter_tokens(embeds, torch.tensor([1, 0]), tokens).dtype == torch.bfloat16


def test_compile_checkpoint_and_autocast():
    embeds, tokens = torch.randn(5, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    index, rows = torch.tensor([4, 1, 2]), torch.tensor([1, 1, 0])

    def work(embeds, tokens):
        return VF.gather_tokens(VF.scatter_tokens(embeds * 2, index, tokens), rows)

    want = torch.autograd.grad(work(embeds, tokens).sum(), (embeds, tokens))
    # Inductor took 50 s here on a busy GPU machine; test_tokens.py compiles the whole merge with it.
    compiled = torch.compile(work, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(embeds, tokens), work(embeds, tokens))
    for run in (compiled, lambda *a: checkpoint(work, *a, use_reentrant=False)):
        got = torch.autograd.grad(run(embeds, tokens).sum(), (embeds, tokens))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert VF.merge_tokens(embeds, tokens.bfloat16(), index).dtype == torch.float32


def test_in_place_scatter_refuses_to_lose_a_gradient():
    embeds, tokens = torch.randn(3, 2), torch.randn(1, 2, requires_grad=True)
    with pytest.raises(ValueError, match="has no gradient, but embeds or tokens require one: use scatter_tokens"):
        VF.scatter_tokens_(embeds, torch.tensor([0]), tokens)
    with torch.no_grad():
        VF.scatter_tokens_(embeds, torch.tensor([0]), tokens)
    assert torch.equal(embeds[:1], tokens.detach())


E23, T43 = torch.zeros(2, 3), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("embeds", "tokens", "source", "message"),
    [
        value_case(E23, T43, [6], r"source must lie in \[-1, 6\), got 6 at position 0"),
        value_case(E23, T43, [0, -2], r"source must lie in \[-1, 6\), got -2 at position 1"),
        (E23, torch.zeros(4, 2), [0], r"tokens must have the hidden size of embeds \(3\), got shape \[4, 2\]"),
        (E23, T43.double(), [0], "tokens must have the dtype of embeds .float32., got float64"),
        (E23.long(), T43.long(), [0], "embeds must be float32, float64, bfloat16 or float16, got int64"),
        (E23[None], T43, [0], r"embeds must have shape \[rows, hidden\]"),
        (E23, T43[0], [0], r"tokens must have shape \[tokens, hidden\]"),
        (E23, T43, [[0]], r"source must have shape \[output rows\]"),
        (E23, T43, [0.0], "source must be int64, got float32"),
    ],
)
def test_bad_merges(embeds, tokens, source, message):
    with pytest.raises(RuntimeError, match=message):
        ops.merge_tokens(embeds, tokens, torch.tensor(source))


@pytest.mark.parametrize(
    ("embeds", "source", "token_rows", "message"),
    [
        value_case(E23, [6], 4, r"source must lie in \[-1, 6\), got 6 at position 0"),
        value_case(E23, [0, -2], 4, r"source must lie in \[-1, 6\), got -2 at position 1"),
        (E23, [0], -1, "embed_rows and token_rows must not be negative, got 2 and -1"),
        (E23, [0], 2**63 - 1, "more rows than can be counted, got 2 and 9223372036854775807"),
        (E23[0], [0], 0, r"embeds must have shape \[rows, hidden\]"),
        (E23, [0.0], 0, "source must be int64, got float32"),
    ],
)
def test_bad_text_rows(embeds, source, token_rows, message):
    with pytest.raises(RuntimeError, match=message):
        VF.text_rows(embeds, torch.tensor(source), token_rows)


@pytest.mark.parametrize(
    ("embeds", "index", "tokens", "message"),
    [
        value_case(torch.zeros(4, 3), [4], torch.zeros(1, 3), r"index must lie in \[0, 4\), got 4 at position 0"),
        value_case(torch.zeros(4, 3), [1, -1], torch.zeros(2, 3), r"index must lie in \[0, 4\), got -1 at position 1"),
        value_case(
            torch.zeros(4, 3), [1, 2, 1], torch.zeros(3, 3), "must not name a row twice, got 1 again at position 2"
        ),
        (torch.zeros(4, 3), [1], torch.zeros(2, 3), r"index must have one entry per row of tokens \(2\), got 1"),
        (torch.zeros(4, 3), [1], torch.zeros(1, 2), r"hidden size of embeds \(3\), got shape \[1, 2\]"),
        (torch.zeros(3, 4).t(), [1], torch.zeros(1, 3), "channels next to each other, got stride 4"),
        (torch.zeros(3).expand(4, 3), [1], torch.zeros(1, 3), "rows must not overlap, got stride 0 for 3 channels"),
    ],
)
def test_bad_scatters(embeds, index, tokens, message):
    with pytest.raises(RuntimeError, match=message):
        VF.scatter_tokens_(embeds, torch.tensor(index), tokens)


@ends_the_device
def test_bad_scatter_out_of_place():
    with pytest.raises(RuntimeError, match=r"index must lie in \[0, 4\), got 9 at position 0"):
        VF.scatter_tokens(torch.zeros(4, 3), torch.tensor([9]), torch.zeros(1, 3))


def test_bad_scatter_onto_itself():
    embeds = torch.zeros(4, 3)
    with pytest.raises(RuntimeError, match="tokens must not share memory with embeds"):
        VF.scatter_tokens_(embeds, torch.tensor([0]), embeds[1:2])
    VF.scatter_tokens_(embeds[2:], torch.tensor([0]), embeds[1:2])


def test_bad_backward():
    with pytest.raises(RuntimeError, match=r"source must have one entry per row of grad_out \(3\), got 1"):
        ops.merge_tokens_backward(torch.zeros(3, 2), torch.tensor([0]), 1, 1, True, True)
    with pytest.raises(RuntimeError, match="must not be negative, got -1 and 1"):
        ops.merge_tokens_backward(torch.zeros(1, 2), torch.tensor([0]), -1, 1, True, True)
