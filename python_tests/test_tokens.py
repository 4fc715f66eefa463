"""compress_sequence and merge_visual_tokens: whole batches, against the golden file and plain loops over rows."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from device import DEVICE, ends_the_device, value_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import vico_ext
from vico_ext import CompressedSequence, RoutingPlan

IMG, PAD, LABEL_PAD, HIDDEN = 7, 3, -5, 6
OPTIONS = {"placeholder_id": IMG, "pad_token_id": PAD, "label_pad": LABEL_PAD}


def test_golden(golden):
    plan = vico_ext.plan_routing(golden["gate"][:, 0], vico_ext.ReleasedPolicy(0.3, 0.0))
    got = vico_ext.merge_visual_tokens(
        golden["input_embeds"],
        golden["visual_tokens"],
        golden["input_ids"],
        plan,
        placeholder_id=int(golden.meta["img_context_token_id"]),
    )
    assert torch.equal(got.input_ids, golden["compressed_ids"])
    assert torch.equal(got.inputs_embeds, golden["compressed_embeds"])
    assert torch.equal(got.keep_mask, golden["keep_mask"])
    assert got.attention_mask.all()


@dataclasses.dataclass
class Batch:
    ids: Tensor
    mask: Tensor
    position_ids: Tensor
    labels: Tensor
    embeds: Tensor
    tokens: Tensor
    plan: RoutingPlan

    def merge(self, **options):
        given = {"attention_mask": self.mask, "labels": self.labels, "position_ids": self.position_ids}
        return vico_ext.merge_visual_tokens(
            self.embeds, self.tokens, self.ids, self.plan, **OPTIONS, **{**given, **options}
        )


def make_batch(rows: list[str], compress: list[bool], *, left: bool, tokens=(4, 2), dtype=torch.float32) -> Batch:
    """Rows of "t" (a text token) and "I" (a tile), padded to one length."""
    lists = [[i for c in row for i in ([IMG] * tokens[0] if c == "I" else [20])] for row in rows]
    length = max(map(len, lists), default=0)
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.int64)
    for b, row in enumerate(lists):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[b, where] = torch.tensor([i + 10 * (i == 20) * (k % 3) for k, i in enumerate(row)], dtype=torch.int64)
        mask[b, where] = 1
    plan = RoutingPlan.from_compress(torch.tensor(compress, dtype=torch.bool), tokens)
    embeds = torch.randn(len(rows), length, HIDDEN).to(dtype)
    embeds[mask == 0] = torch.nan
    embeds[ids == IMG] = torch.nan
    return Batch(
        ids,
        mask,
        (mask.cumsum(1) - 1).clamp_min(0),
        torch.randint(0, 99, ids.shape),
        embeds,
        torch.randn(plan.total_tokens, HIDDEN).to(dtype),
        plan,
    )


@st.composite
def batches(draw):
    torch.manual_seed(draw(st.integers(0, 10_000)))
    rows = draw(st.lists(st.text("tI", max_size=6), min_size=1, max_size=4))
    tiles = "".join(rows).count("I")
    compress = draw(st.lists(st.booleans(), min_size=tiles, max_size=tiles))
    tokens = draw(st.sampled_from([(4, 2), (3, 1), (2, 1)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    return make_batch(rows, compress, left=draw(st.booleans()), tokens=tokens, dtype=dtype)


def naive(batch: Batch, left: bool) -> dict[str, Tensor]:
    """One row at a time, position by position."""
    rows: dict[str, list[Tensor]] = {k: [] for k in ("input_ids", "labels", "position_ids", "inputs_embeds", "mask")}
    tokens, seen, (full, compressed) = iter(batch.tokens), 0, batch.plan.tokens
    keep = torch.zeros_like(batch.mask, dtype=torch.bool)
    for b in range(len(batch.ids)):
        embeds = []
        for i in batch.mask[b].nonzero()[:, 0].tolist():
            visual = batch.ids[b, i] == IMG
            keep[b, i] = not visual or not batch.plan.compress[seen // full] or seen % full < compressed
            seen += int(visual)
            if keep[b, i]:
                embeds.append(next(tokens) if visual else batch.embeds[b, i])
        rows["input_ids"].append(batch.ids[b][keep[b]])
        rows["labels"].append(batch.labels[b][keep[b]])
        rows["position_ids"].append(torch.arange(len(embeds)))
        rows["inputs_embeds"].append(torch.stack(embeds) if embeds else batch.embeds.new_zeros(0, HIDDEN))
        rows["mask"].append(torch.ones(len(embeds), dtype=torch.int64))
    fill = {"input_ids": PAD, "labels": LABEL_PAD}
    side = "left" if left else "right"
    want = {k: torch.nn.utils.rnn.pad_sequence(v, True, fill.get(k, 0), padding_side=side) for k, v in rows.items()}
    return {**want, "keep_mask": keep}


@given(batches(), st.booleans())
@settings(deadline=None, max_examples=150)
def test_matches_naive(batch, left):
    got, want = batch.merge(padding_side="left" if left else "right"), naive(batch, left)
    for name in ("input_ids", "labels", "position_ids", "inputs_embeds", "keep_mask"):
        assert torch.equal(getattr(got, name), want[name]), name
    assert torch.equal(got.attention_mask, want["mask"])
    flat = torch.cat([batch.ids.flatten(), torch.tensor([PAD])])
    assert torch.equal(flat[got.position], got.input_ids)


@given(batches())
@settings(deadline=None, max_examples=60)
def test_compression_without_embeddings_is_the_same(batch):
    merged = batch.merge()
    alone = vico_ext.compress_sequence(
        batch.ids,
        batch.plan,
        attention_mask=batch.mask,
        labels=batch.labels,
        position_ids=batch.position_ids,
        **OPTIONS,
    )
    for field in dataclasses.fields(CompressedSequence):
        if field.name != "inputs_embeds":
            assert torch.equal(getattr(alone, field.name), getattr(merged, field.name)), field.name
    assert alone.inputs_embeds is None
    assert torch.equal(alone.merge(batch.embeds, batch.tokens), merged.inputs_embeds)


@given(batches())
@settings(deadline=None, max_examples=40)
def test_a_row_alone_is_the_row_of_the_batch(batch):
    """One dimension less in, one dimension less out; and no row depends on its neighbours."""
    whole = batch.merge(padding_side="right")
    tile = 0
    for b in range(len(batch.ids)):
        tiles = int((batch.ids[b] == IMG).sum()) // batch.plan.tokens[0]
        owned = slice(int(batch.plan.cu_tokens[tile]), int(batch.plan.cu_tokens[tile + tiles]))
        alone = vico_ext.merge_visual_tokens(
            batch.embeds[b],
            batch.tokens[owned],
            batch.ids[b],
            RoutingPlan.from_compress(batch.plan.compress[tile : tile + tiles], batch.plan.tokens),
            attention_mask=batch.mask[b],
            labels=batch.labels[b],
            position_ids=batch.position_ids[b],
            **OPTIONS,
        )
        count = len(alone.input_ids)
        for name in ("input_ids", "attention_mask", "labels", "position_ids", "inputs_embeds"):
            assert torch.equal(getattr(alone, name), getattr(whole, name)[b, :count]), name
        assert torch.equal(alone.keep_mask, whole.keep_mask[b])
        tile += tiles


@pytest.mark.parametrize("compress", [[False] * 3, [True] * 3, [True, False, True]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_mask_given(compress, side):
    batch = make_batch(["tIIt", "tttttIt"], compress, left=True)  # ten positions each
    got = vico_ext.merge_visual_tokens(batch.embeds, batch.tokens, batch.ids, batch.plan, padding_side=side, **OPTIONS)
    counts = got.keep_mask.sum(1)
    assert got.attention_mask.dtype == torch.int64
    assert torch.equal(got.attention_mask.sum(1), counts)
    assert got.input_ids.shape[1] == int(counts.max())
    edge = got.attention_mask[:, -1 if side == "left" else 0]
    assert edge.all()


def test_masks_keep_their_dtype_and_holes():
    batch = make_batch(["tIt"], [True], left=False)
    for dtype in (torch.bool, torch.int64, torch.int32, torch.uint8):
        mask = batch.mask.to(dtype)
        mask[0, 5:6] = 1
        got = batch.merge(attention_mask=mask)
        assert got.attention_mask.dtype == dtype
        assert got.attention_mask.all()
    hole = make_batch(["tttt"], [], left=False)
    got = hole.merge(attention_mask=torch.tensor([[1, 0, 1, 0]]))
    assert got.attention_mask.tolist() == [[1, 0, 1]]


def test_packed_rows_and_shared_position_ids():
    ids = torch.tensor([[1, IMG, IMG, 2, 1, IMG, IMG, 2]])
    plan = RoutingPlan.from_compress(torch.tensor([True, True]), (2, 1))
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    assert vico_ext.compress_sequence(ids, plan, placeholder_id=IMG, position_ids=packed).position_ids.tolist() == [
        [0, 1, 2, 0, 1, 2]
    ]
    plan = RoutingPlan.from_compress(torch.tensor([True, False] * 2), (2, 1))
    shared = vico_ext.compress_sequence(
        ids.repeat(2, 1), plan, placeholder_id=IMG, position_ids=torch.arange(10, 18)[None]
    )
    assert shared.position_ids.tolist() == [[10, 11, 12, 13, 14, 15, 16]] * 2


def test_a_given_length_pads_every_row():
    batch = make_batch(["tIt", "t"], [True], left=True)
    got = batch.merge(length=9)
    assert got.inputs_embeds.shape == (2, 9, HIDDEN)
    assert got.attention_mask.sum(1).tolist() == [4, 1]
    assert not got.inputs_embeds[got.attention_mask == 0].any()


@ends_the_device
def test_a_given_length_holds_every_row():
    with pytest.raises(RuntimeError, match="length must be at least the 4 positions that row 0 keeps, got 3"):
        make_batch(["tIt", "t"], [True], left=True).merge(length=3)


def test_empty_batches():
    none = RoutingPlan.from_compress(torch.zeros(0, dtype=torch.bool))
    for shape in ((0, 4), (2, 0), (0,)):
        got = vico_ext.merge_visual_tokens(
            torch.zeros(*shape, 5), torch.zeros(0, 5), torch.zeros(shape, dtype=torch.int64), none, placeholder_id=IMG
        )
        assert got.inputs_embeds.shape == (*shape[:-1], 0, 5)
    padding = make_batch(["t", "t"], [], left=True).merge(attention_mask=torch.zeros(2, 1, dtype=torch.int64))
    assert padding.input_ids.shape == (2, 0)


def test_inputs_are_left_alone():
    batch = make_batch(["tIt", "It"], [True, False], left=True)
    before = copy.deepcopy(batch)
    batch.merge()
    for name in ("ids", "mask", "position_ids", "labels", "tokens"):
        assert torch.equal(getattr(batch, name), getattr(before, name))
    torch.testing.assert_close(batch.embeds, before.embeds, rtol=0, atol=0, equal_nan=True)


def _differentiable(dtype=torch.float64):
    batch = make_batch(["tItI", "tt", "It"], [True, False, True], left=True, dtype=dtype)
    batch.embeds = torch.randn_like(batch.embeds).requires_grad_()
    batch.tokens.requires_grad_()
    return batch


def test_gradcheck():
    batch = _differentiable()

    def merged(embeds, tokens):
        batch.embeds, batch.tokens = embeds, tokens
        return batch.merge().inputs_embeds

    inputs = batch.embeds, batch.tokens
    assert torch.autograd.gradcheck(merged, inputs)


def test_gradients_go_to_what_was_read_and_nowhere_else():
    batch = _differentiable()
    got = batch.merge()
    got.inputs_embeds.backward(torch.ones_like(got.inputs_embeds))
    assert torch.equal(batch.tokens.grad, torch.ones_like(batch.tokens))
    text = got.keep_mask & (batch.ids != IMG)
    assert torch.equal(batch.embeds.grad, text[..., None].expand_as(batch.embeds).double())


def test_checkpointing_and_autocast():
    batch = _differentiable(torch.float32)
    inputs = batch.embeds, batch.tokens

    def merged(embeds, tokens):
        return dataclasses.replace(batch, embeds=embeds * 2, tokens=tokens * 3).merge().inputs_embeds.square().sum()

    want = torch.autograd.grad(merged(*inputs), inputs)
    got = torch.autograd.grad(checkpoint(merged, *inputs, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.autocast(DEVICE, torch.bfloat16):
        batch.tokens = batch.tokens.detach().bfloat16()
        assert batch.merge().inputs_embeds.dtype == torch.float32


class Merge(torch.nn.Module):
    def forward(self, embeds, tokens, ids, plan, mask=None, length=None):
        merged = vico_ext.merge_visual_tokens(embeds, tokens, ids, plan, attention_mask=mask, length=length, **OPTIONS)
        return merged.inputs_embeds * 2, merged.input_ids, merged.attention_mask


def _equal(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_with_a_plan(dynamic):
    compiled = torch.compile(Merge(), fullgraph=True, dynamic=dynamic)
    for rows, compress in ((["tIIt"], [True, False]), (["tItIttt"], [False, True])):
        b = make_batch(rows, compress, left=True)
        b.embeds = torch.randn_like(b.embeds).requires_grad_()
        arguments = b.embeds, b.tokens, b.ids, b.plan
        got, want = compiled(*arguments), Merge()(*arguments)
        assert _equal(got, want)
        grads = [torch.autograd.grad(out[0].square().sum(), b.embeds) for out in (got, want)]
        assert _equal(*grads)


def test_compiles_whole_for_several_rows_of_given_length():
    b = make_batch(["tIt", "IIt"], [True, False, True], left=True)
    arguments = b.embeds.nan_to_num(), b.tokens, b.ids, b.plan, b.mask, 10
    assert _equal(torch.compile(Merge(), fullgraph=True)(*arguments), Merge()(*arguments))


def test_exports_saves_and_loads():
    b = make_batch(["tIIt"], [True, False], left=True)
    arguments = b.embeds.nan_to_num(), b.tokens, b.ids, b.plan
    exported = torch.export.export(Merge(), arguments)
    assert _equal(exported.module()(*arguments), Merge()(*arguments))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    assert _equal(torch.export.load(buffer).module()(*arguments), Merge()(*arguments))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_sequences_copy(how):
    sequence = make_batch(["tIt"], [True], left=True).merge()
    if how == "torch.save":
        buffer = io.BytesIO()
        torch.save(sequence, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=True)
    else:
        twin = copy.deepcopy(sequence) if how == "deepcopy" else pickle.loads(pickle.dumps(sequence))
    assert torch.equal(twin.source, sequence.source)
    assert torch.equal(twin.inputs_embeds, sequence.inputs_embeds)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"plan": torch.tensor([True])}, TypeError, "plan must be a RoutingPlan .* got Tensor"),
        ({"padding_side": "up"}, ValueError, "padding_side must be 'left' or 'right', got 'up'"),
        ({"input_ids": torch.zeros(1, 1, 6).long()}, ValueError, r"\[rows, length\] or \[length\], got \[1, 1, 6\]"),
        (
            {"attention_mask": torch.ones(1, 5)},
            ValueError,
            r"attention_mask must have the shape .* \[1, 6\], got \[1, 5",
        ),
        ({"attention_mask": torch.ones(1, 6)}, ValueError, "attention_mask must be bool or int, .* got torch.float32"),
        ({"labels": torch.ones(2, 6)}, ValueError, r"labels must have the shape of input_ids, \[1, 6\], got \[2, 6\]"),
        ({"position_ids": torch.ones(3, 1, 6)}, ValueError, r"position_ids must have the shape .* got \[3, 1, 6\]"),
        ({"position_ids": torch.ones(1, 6)}, RuntimeError, "position_ids must be int64, got float32"),
        ({"inputs_embeds": torch.zeros(1, 5, 2)}, ValueError, r"shape \[1, 6, 'H'\] like input_ids, got \[1, 5, 2\]"),
        ({"inputs_embeds": torch.zeros(1, 6)}, ValueError, r"shape \[1, 6, 'H'\] like input_ids, got \[1, 6\]"),
        ({"inputs_embeds": torch.zeros(1, 6, 3)}, RuntimeError, r"hidden size of embeds \(3\), got shape \[2, 2\]"),
        ({"visual_tokens": torch.zeros(4, 2)}, ValueError, r"\[2, H\], .*0 tiles of 4, 1 of 2\), got \[4, 2\]"),
        value_case(
            {"input_ids": torch.zeros(1, 6).long()}, RuntimeError, "must hold 4 placeholders .* got 0. Is the plan that"
        ),
        value_case(
            {"input_ids": torch.tensor([[7, 7, 0, 7, 7, 0]])}, RuntimeError, "only 2 at row 0, position 0, before anoth"
        ),
        ({"input_ids": torch.zeros(1, 6).int()}, RuntimeError, "input_ids must be int64, got int32"),
        value_case({"placeholder_id": 8}, RuntimeError, r"4 placeholders \(id 8\)"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "inputs_embeds": torch.zeros(1, 6, 2),
        "visual_tokens": torch.zeros(2, 2),
        "input_ids": torch.tensor([[0, 7, 7, 7, 7, 0]]),
        "plan": RoutingPlan.from_compress(torch.tensor([True]), (4, 2)),
        "placeholder_id": IMG,
    }
    vico_ext.merge_visual_tokens(**arguments)
    with pytest.raises(error, match=message):
        vico_ext.merge_visual_tokens(**{**arguments, **change})


def test_a_plan_of_another_batch():
    batch = make_batch(["tIIt"], [True, False], left=True)
    batch.plan = RoutingPlan.from_compress(torch.tensor([True, False, True]), (4, 2))
    with pytest.raises(ValueError, match=r"visual_tokens must have shape \[8, H\]"):
        batch.merge()


@ends_the_device
def test_ids_of_another_batch():
    batch = make_batch(["tIIt"], [True, False], left=True)
    batch.plan = RoutingPlan.from_compress(torch.tensor([True, False, True]), (4, 2))
    with pytest.raises(RuntimeError, match=r"must hold 12 placeholders \(id 7\) in the whole batch.* 3 tiles .* got 8"):
        vico_ext.compress_sequence(batch.ids, batch.plan, placeholder_id=IMG)
