"""connect_visual_tokens: bit-equal to the connector and merge_visual_tokens, whichever way the rows go."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from device import DEVICE, value_case
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vico_ext
from vico_ext import FusedConnector, RoutingPlan

IMG, PAD, V, H, TOKENS = 7, 3, 16, 24, (16, 4)  # an 8 x 8 grid
DIRECT = {"torch": "pack_tokens_", "fused": "packed_projection_"}


class Ops(TorchDispatchMode):
    """The names of the package's ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vico":
            self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass
class Problem:
    """A batch of rows of "t" (text) and "I" (a tile), padded; NaN where embeddings must not be read."""

    embeds: Tensor
    vit_tokens: Tensor
    connector: nn.Module
    ids: Tensor
    plan: RoutingPlan
    options: dict[str, Any]

    def two_steps(self, **options: Any) -> vico_ext.CompressedSequence:
        visual = self.connector(self.vit_tokens, self.plan)
        return vico_ext.merge_visual_tokens(self.embeds, visual, self.ids, self.plan, **{**self.options, **options})

    def one_step(self, **options: Any) -> vico_ext.CompressedSequence:
        return vico_ext.connect_visual_tokens(
            self.embeds, self.vit_tokens, self.connector, self.ids, self.plan, **{**self.options, **options}
        )

    def check(self, direct: bool, **options: Any) -> None:
        """Both ways give the same, and the one step is taken by the way that it should."""
        with Ops() as ops:
            got = self.one_step(**options)
        assert_equal(got, self.two_steps(**options))
        assert ("merge_tokens" in ops.names) != direct
        assert ("text_rows" in ops.names) == direct


def assert_equal(got: vico_ext.CompressedSequence, want: vico_ext.CompressedSequence) -> None:
    for field in dataclasses.fields(want):
        a, b = getattr(got, field.name), getattr(want, field.name)
        assert (a is None and b is None) or torch.equal(a, b), field.name
    assert got.inputs_embeds is not None
    assert got.inputs_embeds.is_contiguous()


def make_problem(rows, compress, *, left=True, dtype=torch.float32, projection="torch") -> Problem:
    lists = [[i for c in row for i in ([IMG] * TOKENS[0] if c == "I" else [20])] for row in rows]
    length = max(map(len, lists), default=0)
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.int64)
    for b, row in enumerate(lists):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[b, where] = torch.tensor(row, dtype=torch.int64)
        mask[b, where] = 1
    embeds = torch.randn(len(rows), length, H).to(dtype)
    embeds[mask == 0] = torch.nan
    embeds[ids == IMG] = torch.nan
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    given = {"attention_mask": mask, "labels": ids, "position_ids": positions, "padding_side": "left"}
    return Problem(
        embeds,
        torch.randn(len(compress), 65, V).to(dtype),
        FusedConnector(V, H, dtype=dtype, projection=projection).eval(),
        ids,
        RoutingPlan.from_compress(torch.tensor(compress, dtype=torch.bool), TOKENS),
        {"placeholder_id": IMG, "pad_token_id": PAD, **given},
    )


@st.composite
def problems(draw):
    torch.manual_seed(draw(st.integers(0, 10_000)))
    rows = draw(st.lists(st.text("tI", max_size=5), min_size=1, max_size=4))
    tiles = "".join(rows).count("I")
    problem = make_problem(
        rows,
        draw(st.lists(st.booleans(), min_size=tiles, max_size=tiles)),
        left=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        projection=draw(st.sampled_from(["torch", "fused"])),
    )
    problem.options["padding_side"] = draw(st.sampled_from(["left", "right"]))
    return problem


@given(problems(), st.integers(0, 3))
@settings(deadline=None, max_examples=120)
def test_bit_equal_to_the_two_steps(problem, spare):
    with torch.no_grad():
        problem.check(direct=True)
        if problem.ids.numel() > 0:
            longest = int(problem.two_steps().attention_mask.sum(1).max())
            problem.check(direct=True, length=longest + spare)


@pytest.mark.parametrize("projection", DIRECT)
@pytest.mark.parametrize("compress", [(True,) * 4, (False,) * 4, (True, False, False, True)])
def test_one_row_without_a_mask(compress, projection):
    problem = make_problem(["ttIIttIIt"], compress, projection=projection)
    for name in ("attention_mask", "labels", "position_ids"):
        del problem.options[name]
    with torch.no_grad():
        problem.check(direct=True)
        problem.ids, problem.embeds = problem.ids[0], problem.embeds[0]
        with Ops() as ops:
            got = problem.one_step()
        assert_equal(got, problem.two_steps())
    assert got.inputs_embeds.shape == (5 + problem.plan.total_tokens, H)
    assert ops.names >= {DIRECT[projection], "tile_rows", "text_rows"}
    assert not ops.names & {"pack_tokens", "packed_projection", "merge_tokens"}


@pytest.mark.parametrize("projection", DIRECT)
@pytest.mark.parametrize("rows", [["ttt", "t"], ["", ""], []])
def test_no_tiles_and_no_rows(rows, projection):
    with torch.no_grad():
        make_problem(rows, [], projection=projection).check(direct=True)


def test_embeddings_of_any_layout():
    problem = make_problem(["tIt", "IIt"], [True, False, True])
    embeds = problem.embeds
    for layout in (
        torch.cat([embeds, embeds], -1)[..., 3 : 3 + H],
        embeds.transpose(1, 2).contiguous().transpose(1, 2),
        embeds.repeat_interleave(2, 0)[::2],
    ):
        problem.embeds = layout
        with torch.no_grad():
            problem.check(direct=True)


def test_inputs_are_left_alone():
    problem = make_problem(["tIt", "It"], [True, False])
    before = [problem.embeds.clone(), problem.vit_tokens.clone(), problem.ids.clone()]
    with torch.no_grad():
        problem.one_step()
    for now, was in zip((problem.embeds, problem.vit_tokens, problem.ids), before, strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)


# ---- where it takes the two steps


@pytest.mark.parametrize("projection", DIRECT)
def test_gradients_are_those_of_the_two_steps(projection):
    problem = make_problem(["tIt", "IIt"], [True, False, True], dtype=torch.float64, projection=projection)
    problem.embeds = torch.randn_like(problem.embeds).requires_grad_()
    problem.vit_tokens.requires_grad_()
    leaves = [problem.embeds, problem.vit_tokens, *problem.connector.parameters()]
    grads = [
        torch.autograd.grad(merged.inputs_embeds.square().sum(), leaves)
        for merged in (problem.one_step(), problem.two_steps())
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    problem.check(direct=False)


def test_frozen_modules_need_no_context():
    problem = make_problem(["tIt"], [True])
    problem.connector.requires_grad_(False)
    problem.check(direct=True)
    problem.embeds.requires_grad_()
    problem.check(direct=False)
    problem.embeds = problem.embeds.detach()
    problem.connector.mlp1[3].weight.requires_grad_()
    problem.check(direct=False)


def _subclass(problem):
    class Louder(FusedConnector):
        def forward(self, *args, **kw):
            return 2 * super().forward(*args, **kw)

    louder = Louder(V, H).eval()
    louder.load_state_dict(problem.connector.state_dict())
    problem.connector = louder


def _hook(problem):
    problem.connector.register_forward_hook(lambda module, args, out: out + 1)


def _function(problem):
    module = problem.connector
    problem.connector = lambda tokens, plan: module(tokens, plan) - 1


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def _wrapped(problem):
    problem.connector = Wrapper(problem.connector)


def _wider_embeds(problem):
    problem.embeds = problem.embeds.double()


def _narrower_embeds(problem):
    problem.embeds = problem.embeds.bfloat16()


CHANGES = [_subclass, _hook, _function, _wrapped, _wider_embeds, _narrower_embeds]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_is_not_a_plain_connector_of_this_dtype(change):
    problem = make_problem(["tIt", "IIt"], [True, False, True])
    change(problem)
    with torch.no_grad():
        problem.check(direct=False)


def test_autocast_is_part_of_the_dtype():
    problem = make_problem(["tIt", "IIt"], [True, False, True])
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        problem.check(direct=False)
        problem.embeds = problem.embeds.bfloat16()
        for projection in DIRECT:
            problem.connector.projection = projection
            problem.check(direct=True)


# ---- layers that users replaced


class LoRALinear(nn.Module):
    """Its result is of another dtype than the connector's, as a quantised layer's may be."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.base, self.dtype = base, dtype
        self.a = nn.Parameter(torch.randn(base.out_features, base.in_features))

    def forward(self, x):
        return (self.base(x) + x @ self.a.t()).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_replaced_layers_are_called(dtype):
    problem = make_problem(["tIt", "IIt"], [True, False, True])
    mlp1, mlp2 = problem.connector.mlp1, problem.connector.mlp2
    mlp1[3], mlp2[7] = LoRALinear(mlp1[3], dtype), LoRALinear(mlp2[7], dtype)
    with torch.no_grad():
        problem.check(direct=True)
    problem.check(direct=False)
    problem.connector.requires_grad_(False)
    problem.check(direct=False)  # what such layers record beside their parameters cannot be seen


# ---- the connector's own way


@pytest.mark.parametrize("projection", DIRECT)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_connector_writes_its_rows_and_nothing_else(projection, replaced):
    problem = make_problem(["IIII"], [True, False, True, False], projection=projection)
    if replaced:
        problem.connector.mlp1[2] = nn.SiLU()
    buffer, first_row = torch.randn(50, H + 8), torch.tensor([46, 1, 20, 28])
    want, out = buffer.clone(), buffer[:, :H]
    with torch.no_grad():
        rows = problem.connector(problem.vit_tokens, problem.plan).split([4, 16, 4, 16])
        assert problem.connector(problem.vit_tokens, problem.plan, destination=lambda: (out, first_row)) is out
    for row, tile in zip(first_row.tolist(), rows, strict=True):
        want[row : row + len(tile), :H] = tile
    assert torch.equal(buffer, want)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("projection", DIRECT)
def test_bad_destinations(replaced, projection):
    problem = make_problem(["II"], [True, False], projection=projection)
    connector, tokens, plan = problem.connector, problem.vit_tokens, problem.plan
    if replaced:
        connector.mlp1[2] = nn.SiLU()
    out, first_row = torch.zeros(20, H), torch.tensor([0, 4])
    with pytest.raises(ValueError, match="destination needs a plan, whose tiles' rows it places, got None"):
        connector(tokens, destination=lambda: (out, first_row))
    with pytest.raises(ValueError, match=r"written in place|writes in place.* or torch.no_grad\(\)"):
        connector(tokens, plan, destination=lambda: (out, first_row))
    with torch.no_grad(), pytest.raises(RuntimeError, match=rf"out must have shape .* = \[\*, {H}\], got \[20, 9\]"):
        connector(tokens, plan, destination=lambda: (out[:, :9], first_row))


# ---- what torch does to it


class Side(nn.Module):
    def __init__(self, problem: Problem):
        super().__init__()
        self.connector, self.options = problem.connector, {"placeholder_id": IMG, "length": 30}

    def forward(self, embeds, tokens, ids, plan):
        got = vico_ext.connect_visual_tokens(embeds, tokens, self.connector, ids, plan, **self.options)
        return got.inputs_embeds * 2, got.input_ids


@pytest.mark.parametrize("projection", DIRECT)
def test_compiles_whole(projection):
    problem = make_problem(["tIIt"], [True, False], projection=projection)
    side, arguments = Side(problem), (problem.embeds, problem.vit_tokens, problem.ids, problem.plan)
    with torch.no_grad():
        compiled = torch.compile(side, fullgraph=True, backend="aot_eager")
        for got, want in zip(compiled(*arguments), side(*arguments), strict=True):
            assert torch.equal(got, want)


def test_exports():
    problem = make_problem(["tIIt"], [True, False])
    side, arguments = Side(problem), (problem.embeds, problem.vit_tokens, problem.ids, problem.plan)
    with torch.no_grad():
        exported = torch.export.export(side, arguments)
        for got, want in zip(exported.module()(*arguments), side(*arguments), strict=True):
            torch.testing.assert_close(got, want)


# ---- bad input


def _good() -> dict[str, Any]:
    problem = make_problem(["tIIt"], [True, False])
    return {
        "inputs_embeds": problem.embeds,
        "vit_tokens": problem.vit_tokens,
        "connector": problem.connector,
        "input_ids": problem.ids,
        "plan": problem.plan,
        "placeholder_id": IMG,
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"plan": torch.tensor([True])}, TypeError, "plan must be a RoutingPlan .* got Tensor"),
        ({"padding_side": "up"}, ValueError, "padding_side must be 'left' or 'right', got 'up'"),
        ({"inputs_embeds": torch.zeros(1, 5, H)}, ValueError, r"shape \[1, 34, 'H'\] like input_ids, got \[1, 5, 24"),
        ({"inputs_embeds": torch.zeros(1, 34, 9)}, RuntimeError, r"out must have shape .* = \[\*, 24\], got \[22, 9\]"),
        ({"vit_tokens": torch.zeros(3, 65, V)}, ValueError, "the plan routes 2 tiles, but tokens hold 3"),
        ({"vit_tokens": torch.zeros(2, 65, V).bfloat16()}, TypeError, "tokens must have the dtype of the connector's"),
        ({"labels": torch.ones(2, 6)}, ValueError, r"labels must have the shape of input_ids, \[1, 34\], got \[2, 6\]"),
        value_case({"placeholder_id": 8}, RuntimeError, r"32 placeholders \(id 8\)"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = _good()
    with torch.no_grad():
        vico_ext.connect_visual_tokens(**arguments)
        with pytest.raises(error, match=message):
            vico_ext.connect_visual_tokens(**{**arguments, **change})


def test_rows_of_a_sequence():
    problem = make_problem(["tIt", "ttII"], [True, False, True], left=True)
    sequence = problem.two_steps()
    assert sequence.tile_rows(problem.plan).tolist() == [17, 24, 40]
    assert sequence.inputs_embeds.shape == (2, 22, H)


@pytest.mark.parametrize("compress", [value_case((False, True)), value_case((True, False, False))])
def test_rows_of_another_plan(compress):
    sequence = make_problem(["tItI"], [True, False]).two_steps()
    with pytest.raises(RuntimeError, match=r"source must hold the tokens of tile .* the plan of another batch"):
        sequence.tile_rows(RoutingPlan.from_compress(torch.tensor(compress), TOKENS))
