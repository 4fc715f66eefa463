"""compress_sequence: keeping placeholders, laying out the shorter batch, renumbering; against plain Python loops."""

from __future__ import annotations

import pytest
import torch
from device import ends_the_device, value_case
from hypothesis import given, settings
from hypothesis import strategies as st

from vico_ext import functional as VF
from vico_ext import reference

ops = torch.ops.vico
IMG, PAD = 7, 0


@st.composite
def batches(draw):
    """(input_ids, mask, compress, (full, compressed)): rows of text, images, and padding on either side."""
    full = draw(st.integers(2, 6))
    compressed = draw(st.integers(1, full - 1))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        parts = draw(st.lists(st.sampled_from(["text", "tile"]), max_size=7))
        rows.append([i for part in parts for i in ([IMG] * full if part == "tile" else [11, 12])])
    length = max(map(len, rows)) + draw(st.integers(0, 3))
    ids = torch.full((len(rows), length), draw(st.sampled_from([PAD, IMG])))  # padding may look like a placeholder
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for b, row in enumerate(rows):
        start = draw(st.integers(0, length - len(row)))
        ids[b, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[b, start : start + len(row)] = True
    tiles = sum(row.count(IMG) for row in rows) // full
    compress = torch.tensor(draw(st.lists(st.booleans(), min_size=tiles, max_size=tiles)), dtype=torch.bool)
    return ids, mask, compress, (full, compressed)


def naive_keep(ids, mask, compress, tokens):
    """Each row by itself: walk over it, and count the placeholders of the tile in hand."""
    keep, seen = torch.zeros_like(mask), 0
    for b in range(len(ids)):
        for i in range(ids.shape[1]):
            if not mask[b, i]:
                continue
            keep[b, i] = True
            if ids[b, i] == IMG:
                keep[b, i] = not compress[seen // tokens[0]] or seen % tokens[0] < tokens[1]
                seen += 1
    return keep


def _keep(ids, mask, compress, tokens):
    return VF.keep_placeholders(
        ids, compress, placeholder_id=IMG, attention_mask=mask, full_tokens=tokens[0], compressed_tokens=tokens[1]
    )


@given(batches())
@settings(deadline=None, max_examples=150)
def test_keep_matches_naive(batch):
    keep, counts = _keep(*batch)
    assert torch.equal(keep, naive_keep(*batch))
    assert torch.equal(counts, keep.sum(1))


@given(st.lists(st.sampled_from(["text", "tile"]), max_size=12), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_keep_matches_reference(parts, seed):
    torch.manual_seed(seed)
    ids = torch.tensor([[i for part in parts for i in ([IMG] * 4 if part == "tile" else [11])]], dtype=torch.int64)
    ids = ids.reshape(1, -1)
    compress = torch.rand(parts.count("tile")) < 0.5
    keep, _ = _keep(ids, None, compress, (4, 1))
    assert torch.equal(keep, reference.compress_sequence(ids, compress, IMG, full_tokens=4, compressed_tokens=1))


def test_a_hole_in_the_mask_is_no_padding():
    ids, mask = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[0, 1, 0, 1, 0]]).bool()
    keep, counts = _keep(ids, mask, torch.zeros(0, dtype=torch.bool), (4, 1))
    assert keep.tolist() == [[False, True, True, True, False]]
    assert counts.tolist() == [3]


@given(batches(), st.booleans(), st.integers(0, 3))
@settings(deadline=None, max_examples=120)
def test_positions_match_naive(batch, left, spare):
    ids = batch[0]
    keep, counts = _keep(*batch)
    length = int(counts.max()) + spare
    position, source = VF.compress_positions(
        ids, keep, length, placeholder_id=IMG, padding_side="left" if left else "right"
    )
    want_position, want_source, visual = [], [], ids.numel()
    for b in range(len(ids)):
        kept = keep[b].nonzero()[:, 0].tolist()
        flat = [b * ids.shape[1] + i for i in kept]
        from_ = []
        for i, f in zip(kept, flat, strict=True):
            from_.append(visual if ids[b, i] == IMG else f)
            visual += int(ids[b, i] == IMG)
        pad = [-1] * (length - len(kept))
        want_position.append(pad + flat if left else flat + pad)
        want_source.append(pad + from_ if left else from_ + pad)
    assert position.tolist() == want_position
    assert source.tolist() == want_source


@given(batches(), st.booleans(), st.integers(0, 3))
@settings(deadline=None, max_examples=100)
def test_tiles_begin_where_their_first_token_is(batch, left, spare):
    ids, _, compress, tokens = batch
    keep, counts = _keep(*batch)
    _, source = VF.compress_positions(
        ids, keep, int(counts.max()) + spare, placeholder_id=IMG, padding_side="left" if left else "right"
    )
    cu_tokens = torch.cat([torch.zeros(1).long(), torch.where(compress, tokens[1], tokens[0]).cumsum(0)])
    got = VF.tile_rows(source.flatten(), cu_tokens, ids.numel())
    flat = source.flatten().tolist()
    assert got.tolist() == [flat.index(ids.numel() + k) for k in cu_tokens[:-1].tolist()]


@pytest.mark.parametrize(
    ("source", "cu_tokens", "message"),
    [
        value_case([0, 2, 3, -1], [0, 3], "must hold the tokens of tile 0, 0 to 3 of cu_tokens behind 2 rows"),
        value_case([2, 0, 3], [0, 2], "tile 0, 0 to 2 of cu_tokens .* one after another: is the plan of another batch"),
        value_case([2, 3, 4], [0, 2, 2], "the tokens of tile 1, 2 to 2 of cu_tokens"),
        value_case([2, 3, 4], [0, 2, 1], "the tokens of tile 1, 2 to 1 of cu_tokens"),
        value_case([2, 3, 4], [0, 2, 2**62], "the tokens of tile 1, 2 to 4611686018427387904"),
        value_case([2, 3, 4], [-1, 2], "the tokens of tile 0, -1 to 2"),
        ([[2, 3, 4]], [0, 2], r"source must have shape \[rows\]"),
        ([2.0], [0, 2], "source must be int64, got float32"),
        ([2, 3], [0.0, 2.0], "cu_tokens must be int64, got float32"),
        ([2, 3], [], r"cu_tokens must have shape \[tiles \+ 1\], got \[0\]"),
    ],
)
def test_tiles_of_another_batch(source, cu_tokens, message):
    cu_tokens = torch.tensor(cu_tokens) if cu_tokens else torch.zeros(0, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=message):
        VF.tile_rows(torch.tensor(source), cu_tokens, 2)


def test_rows_that_cannot_be_counted():
    for embed_rows in (-1, 2**63 - 2):
        with pytest.raises(RuntimeError, match=f"not be negative nor more than can be counted, got {embed_rows}"):
            VF.tile_rows(torch.tensor([0, 1]), torch.tensor([0, 2]), embed_rows)


def naive_renumber(position_ids, position):
    out = torch.zeros_like(position)
    rows, length = position_ids.shape
    for b in range(rows):
        kept = [int(i) - b * length for i in position[b] if i >= 0]
        columns = (position[b] >= 0).nonzero()[:, 0].tolist()
        for j, i in zip(columns, kept, strict=True):
            dropped = 0
            for k in range(kept[0], i + 1):
                if k > 0 and position_ids[b, k] != position_ids[b, k - 1] + 1:
                    dropped = 0
                dropped += k not in kept
            out[b, j] = position_ids[b, i] - dropped
    return out


@given(batches(), st.booleans(), st.data())
@settings(deadline=None, max_examples=100)
def test_renumber_matches_naive(batch, left, data):
    ids, mask = batch[:2]
    keep, counts = _keep(*batch)
    position, _ = VF.compress_positions(
        ids, keep, int(counts.max()), placeholder_id=IMG, padding_side="left" if left else "right"
    )
    kind = data.draw(st.sampled_from(["arange", "from mask", "packed"]))
    position_ids = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    if kind == "from mask":
        position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    elif kind == "packed" and ids.numel():
        resets = torch.tensor(data.draw(st.lists(st.booleans(), min_size=ids.shape[1], max_size=ids.shape[1])))
        position_ids = position_ids - (position_ids * resets).cummax(1).values
    got = VF.renumber_positions(position_ids, position)
    assert torch.equal(got, naive_renumber(position_ids, position))
    if kind == "from mask":
        assert all(
            row[kept].tolist() == list(range(int(kept.sum()))) for row, kept in zip(got, position >= 0, strict=True)
        )


def test_packed_sequences_start_again():
    ids = torch.tensor([[1, IMG, IMG, IMG, 2, 3, 1, IMG, IMG, IMG, 4]])
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]])
    keep, _ = _keep(ids, None, torch.tensor([True, True]), (3, 1))
    position, _ = VF.compress_positions(ids, keep, 7, placeholder_id=IMG)
    assert VF.renumber_positions(position_ids, position).tolist() == [[0, 1, 2, 3, 0, 1, 2]]


def test_opcheck():
    ids = torch.tensor([[1, IMG, IMG, IMG, 2], [IMG, IMG, IMG, 3, 0]])
    mask = ids != 0
    compress = torch.tensor([True, False])
    keep, _ = _keep(ids, mask, compress, (3, 1))
    position, _ = VF.compress_positions(ids, keep, 4, placeholder_id=IMG)
    torch.library.opcheck(ops.keep_placeholders.default, (ids, mask, compress, IMG, 3, 1))
    torch.library.opcheck(ops.keep_placeholders.default, (ids, None, compress, IMG, 3, 1))
    torch.library.opcheck(ops.compress_sequence.default, (ids, keep, IMG, 4, True))
    torch.library.opcheck(ops.tile_rows.default, (torch.tensor([1, 10, 11, -1, 12]), torch.tensor([0, 2, 3]), 10))
    torch.library.opcheck(ops.renumber_positions.default, (torch.arange(5).expand(2, 5), position))


def test_inputs_of_any_layout():
    ids = torch.tensor([[IMG, IMG, 1], [2, IMG, IMG]])
    wide = torch.full((3, 4), IMG)
    wide[:, :2] = ids.t()
    strided, compress = wide[:, :2].t(), torch.tensor([False, True, True])[::2]
    mask = torch.ones(3, 2, dtype=torch.bool).t()
    keep, _ = _keep(strided, mask, compress, (2, 1))
    assert keep.tolist() == [[True, True, True], [True, True, False]]
    position, source = VF.compress_positions(strided, keep.t().contiguous().t(), 3, placeholder_id=IMG)
    assert position.tolist() == [[0, 1, 2], [-1, 3, 4]]
    assert source.tolist() == [[6, 7, 2], [-1, 3, 8]]


def test_no_rows_and_no_columns():
    for shape in ((0, 5), (3, 0), (0, 0)):
        ids = torch.zeros(shape, dtype=torch.int64)
        keep, counts = _keep(ids, None, torch.zeros(0, dtype=torch.bool), (4, 1))
        position, source = VF.compress_positions(ids, keep, 0, placeholder_id=IMG)
        assert keep.shape == shape
        assert counts.tolist() == [0] * shape[0]
        assert position.shape == source.shape == (shape[0], 0)
        assert VF.renumber_positions(ids, position).shape == (shape[0], 0)


ROW = [1, IMG, IMG, IMG, 2, IMG, IMG, IMG]
TWO = torch.tensor([True, False])


@pytest.mark.parametrize(
    ("ids", "mask", "compress", "message"),
    [
        ([ROW], [[True] * 8] * 2, TWO, r"attention_mask must have shape that of input_ids = \[1, 8\], got \[2, 8\]"),
        ([ROW], [[1] * 8], TWO, "attention_mask must be bool, got int64"),
        ([ROW], None, torch.ones(2), "compress must be bool, got float32"),
        (ROW, None, TWO, r"input_ids must have shape \[rows, length\]"),
        ([[1.0]], None, TWO, "input_ids must be int64, got float32"),
    ],
)
def test_bad_batches(ids, mask, compress, message):
    with pytest.raises(RuntimeError, match=message):
        _keep(torch.tensor(ids), None if mask is None else torch.tensor(mask), compress, (3, 1))


@ends_the_device
@pytest.mark.parametrize(
    ("ids", "compress", "message"),
    [
        ([ROW], TWO[:1], r"must hold 3 placeholders \(id 7\) in the whole batch.*1 tiles .* times 3, got 6\."),
        ([ROW], torch.cat([TWO, TWO]), r"must hold 12 placeholders .*: 4 tiles of the plan times 3, got 6\."),
        (
            [[IMG, IMG, 1, IMG]],
            TWO[:1],
            r"3 consecutive placeholders \(id 7\) of one row, got only 2 at row 0, p.* 0, before another token",
        ),
        ([[1, IMG, IMG], [IMG, 1, 1]], TWO[:1], r"got only 2 at row 0, position 1, where the row ends"),
        ([ROW, [IMG, 1] * 3 + [1, 1]], torch.ones(3) > 0, r"got only 1 at row 1, position 0, before another"),
    ],
)
def test_placeholders_of_other_tiles(ids, compress, message):
    with pytest.raises(RuntimeError, match=message):
        _keep(torch.tensor(ids), None, compress, (3, 1))


def test_bad_lengths():
    ids, keep = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[True, False], [True, True]])
    with pytest.raises(RuntimeError, match="length must not be negative, got -1"):
        VF.compress_positions(ids, keep, -1, placeholder_id=IMG)
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right', got 'up'"):
        VF.compress_positions(ids, keep, 2, placeholder_id=IMG, padding_side="up")
    with pytest.raises(RuntimeError, match="both be positive, got 4 and 4"):
        _keep(ids, None, TWO[:0], (4, 4))


@ends_the_device
def test_lengths_and_positions_of_another_batch():
    ids, keep = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[True, False], [True, True]])
    with pytest.raises(RuntimeError, match="length must be at least the 2 positions that row 1 keeps, got 1"):
        VF.compress_positions(ids, keep, 1, placeholder_id=IMG)
    for position in ([[0, 1], [1, 2]], [[1, 0], [2, 3]], [[0, 1], [2, 4]]):
        with pytest.raises(RuntimeError, match="position must hold flat positions of its own row, ascending, or -1"):
            VF.renumber_positions(ids, torch.tensor(position))
