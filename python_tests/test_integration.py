"""The whole visual side, module by module: exactness, independence, compilation, training set-ups."""

from __future__ import annotations

import copy
import os
import pickle
import socket
import time
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from device import DEVICE, cpu_only
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vico_ext
from vico_ext import functional as VF
from vico_ext import reference

V, H, PLACEHOLDER = 32, 48, 7


class VisualSide(nn.Module):
    """Router, plan, connector and merge, as a model would call them."""

    def __init__(self, policy: vico_ext.RoutingPolicy, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.connector = vico_ext.FusedConnector(V, H, dtype=dtype)
        self.router = vico_ext.VisualResolutionRouter(V, dtype=dtype)
        self.policy = policy

    def forward(self, tokens: Tensor, embeds: Tensor, input_ids: Tensor) -> Tensor:
        plan = vico_ext.plan_routing(self.router(tokens), self.policy)
        visual = self.connector(tokens, plan)
        return vico_ext.merge_visual_tokens(embeds, visual, input_ids, plan, placeholder_id=PLACEHOLDER).inputs_embeds


def prompt(tiles: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randn(tiles, 1025, V, dtype=dtype)
    ids = torch.cat([torch.tensor([1, 2]), torch.full((256 * tiles,), PLACEHOLDER), torch.tensor([3])])
    return tokens, torch.randn(1, len(ids), H, dtype=dtype), ids[None]


def test_golden_from_tokens_to_embeddings(golden):
    side = VisualSide(vico_ext.ReleasedPolicy(0.3, 0.0), torch.float64).eval()
    connector = {k: v.double() for k, v in golden.weights.items() if k.startswith("mlp")}
    router = {k: v.double() for k, v in golden.weights.items() if not k.startswith("mlp")}
    side.connector.load_state_dict(connector)
    side.router.load_state_dict(router)
    with torch.no_grad():
        out = side(golden["vit_tokens"].double(), golden["input_embeds"][None], golden["input_ids"][None])
    torch.testing.assert_close(out[0], golden["compressed_embeds"], rtol=0, atol=1e-10)
    assert {**side.connector.state_dict(), **side.router.state_dict()}.keys() == golden.weights.keys()


def test_a_tile_does_not_depend_on_the_batch():
    side = VisualSide(vico_ext.ThresholdPolicy(0.5)).eval()
    tokens, _, _ = prompt(6)
    with torch.no_grad():
        together = side.router(tokens)
        alone = torch.cat([side.router(tokens[t : t + 1]) for t in range(6)])
    assert torch.equal(together, alone)


class CountOps(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "policy",
    [
        vico_ext.ThresholdPolicy(0.5),
        vico_ext.BudgetPolicy(fraction=0.6),
        vico_ext.ReleasedPolicy(0.5, 0.0),
    ],
    ids=lambda p: type(p).__name__,
)
def test_work_is_the_same_number_of_operators_for_any_number_of_tiles(policy):
    side = VisualSide(policy).eval()
    counts = []
    for tiles in (2, 9):
        with torch.no_grad(), CountOps() as mode:
            side(*prompt(tiles))
        counts.append(mode.counts)
    assert counts[0] == counts[1]
    syncs = counts[0]["aten._local_scalar_dense.default"]
    assert syncs <= 1, counts[0]
    if isinstance(policy, vico_ext.BudgetPolicy):
        assert syncs == 0


def test_two_runs_are_bit_equal():
    side = VisualSide(vico_ext.ThresholdPolicy(0.5)).train()
    inputs = prompt(5)

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        tokens = inputs[0].clone().requires_grad_()
        out = side(tokens, *inputs[1:])
        return [out, *torch.autograd.grad(out.square().sum(), [tokens, *side.connector.parameters()])]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("compressed", [0, 2, 5])
def test_gradients_match_the_reference(compressed):
    connector = vico_ext.FusedConnector(V, H, dtype=torch.float64).eval()
    tokens = torch.randn(5, 65, V, dtype=torch.float64, requires_grad=True)
    compress = torch.arange(5) < compressed
    plan = vico_ext.RoutingPlan.from_compress(compress, tokens=(16, 4))
    ours, want = connector(tokens, plan), reference.connector(tokens, dict(connector.named_parameters()), compress)
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-10)
    params = [tokens, *connector.parameters()]
    seed = torch.randn_like(want)
    got = torch.autograd.grad(ours, params, seed, allow_unused=False)
    expected = torch.autograd.grad(want, params, seed, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-10, atol=1e-10)


def test_compiles_whole_forward_and_backward():
    torch._dynamo.reset()
    side = VisualSide(vico_ext.BudgetPolicy(fraction=0.7))
    side.eval()
    compiled = torch.compile(side, fullgraph=True)
    inputs = prompt(4)
    want, got = side(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, want)
    params = list(side.connector.parameters())
    for a, b in zip(
        torch.autograd.grad(got.square().mean(), params), torch.autograd.grad(want.square().mean(), params), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("policy", [vico_ext.ThresholdPolicy(0.5), vico_ext.ReleasedPolicy(0.5, 0.0)])
def test_compiles_whole_where_the_policy_looks_at_p(policy):
    """The number of compressed tiles is data; it must not end in a check that the compiler cannot decide."""
    torch._dynamo.reset()
    connector, router = vico_ext.FusedConnector(V, H).eval(), vico_ext.VisualResolutionRouter(V).eval()

    def side(tokens):
        return connector(tokens, vico_ext.plan_routing(router(tokens), policy, tokens=(16, 4)))

    compiled = torch.compile(side, fullgraph=True, backend="aot_eager")
    for tiles in (5, 3):
        tokens = torch.randn(tiles, 65, V)
        torch.testing.assert_close(compiled(tokens), side(tokens))


def test_exports_for_any_number_of_tiles_where_the_policy_looks_at_p():
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.connector = vico_ext.FusedConnector(V, H)
            self.router = vico_ext.VisualResolutionRouter(V)

        def forward(self, tokens: Tensor) -> Tensor:
            plan = vico_ext.plan_routing(self.router(tokens), vico_ext.ThresholdPolicy(0.5), tokens=(16, 4))
            return self.connector(tokens, plan)

    side = Side().eval()
    tiles = torch.export.Dim("tiles", min=2, max=64)
    program = torch.export.export(side, (torch.randn(5, 65, V),), dynamic_shapes=({0: tiles},)).module()
    for count in (5, 3):
        tokens = torch.randn(count, 65, V)
        torch.testing.assert_close(program(tokens), side(tokens))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("pixel_shuffle", lambda x: VF.pixel_shuffle(x, 2)),
        ("normalized_shuffle", lambda x: VF.normalized_shuffle(x, torch.ones(16), torch.ones(16), 2)),
        ("bias_gelu", VF.bias_gelu),
        ("attention_pool", lambda x: VF.attention_pool(x, x[:, :2])),
        ("merge_tokens", lambda x: VF.merge_tokens(x[0], x[0], torch.tensor([0, 20]))),
        (
            "pack_tokens",
            lambda x: VF.pack_tokens(
                x[:, :4], x[:0, :1], vico_ext.RoutingPlan.from_compress(torch.zeros(1) > 0, (4, 1))
            ),
        ),
    ],
)
def test_second_derivatives_are_refused_and_not_zero(name, function):
    x = torch.randn(1, 17, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=f"vico::{name}_backward has no derivative: .* first derivatives only"
    ):
        gradient.square().sum().backward()


@pytest.mark.parametrize(
    ("dtype", "plan", "message"),
    [
        (
            torch.float16,
            None,
            "tokens must have the dtype of the connector's weights, torch.float32, got torch.float16",
        ),
        (torch.float32, torch.zeros(2) > 0, r"plan must be a RoutingPlan \(see plan_routing\), got Tensor"),
    ],
)
def test_bad_arguments_of_the_connector(dtype, plan, message):
    with pytest.raises(TypeError, match=message):
        vico_ext.FusedConnector(V, H)(torch.zeros(2, 65, V, dtype=dtype), plan)


def test_runs_without_data():
    """On the meta device, as tools that count operations do."""
    with torch.device("meta"):
        connector, router = vico_ext.FusedConnector(V, H), vico_ext.VisualResolutionRouter(V)
        tokens = torch.empty(3, 65, V)
    assert router(tokens).shape == (3,)
    assert connector(tokens).shape == (3, 16, H)


def test_exports():
    side = VisualSide(vico_ext.BudgetPolicy(fraction=0.7)).eval()
    inputs = prompt(4)
    program = torch.export.export(side, inputs)
    torch.testing.assert_close(program.module()(*inputs), side(*inputs))


def test_autocast_follows_the_linear_layers():
    side = VisualSide(vico_ext.ThresholdPolicy(0.5)).eval()
    tokens, _, _ = prompt(3)
    plan = vico_ext.RoutingPlan.from_compress(torch.tensor([True, False, True]))
    exact = side.connector(tokens, plan)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, p = side.connector(tokens, plan), side.router(tokens)
    assert out.dtype == torch.bfloat16
    assert p.dtype == torch.float32
    assert (out.float() - exact).norm() / exact.norm() < 0.02
    out.float().sum().backward()
    assert side.connector.mlp2[1].weight.grad.dtype == torch.float32


def test_activation_checkpointing_gives_the_same_gradients():
    connector = vico_ext.FusedConnector(V, H).train()
    tokens, _, _ = prompt(3)
    plan = vico_ext.RoutingPlan.from_compress(torch.tensor([True, False, True]))
    grads = []
    for run in (connector, lambda *a: checkpoint(connector, *a, use_reentrant=False)):
        torch.manual_seed(5)
        connector.zero_grad()
        run(tokens, plan).square().mean().backward()
        grads.append([p.grad.clone() for p in connector.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(clone):
    side = VisualSide(vico_ext.PerImagePolicy(0.5, 0.0)).eval()
    side.policy = vico_ext.ThresholdPolicy(0.4)
    inputs = prompt(3)
    assert torch.equal(clone(side)(*inputs), side(*inputs))
    plan = vico_ext.plan_routing(torch.rand(4), vico_ext.ThresholdPolicy(0.4))
    assert torch.equal(clone(plan).cu_tokens, plan.cu_tokens)


def test_no_tiles():
    side = VisualSide(vico_ext.ThresholdPolicy(0.5)).eval()
    tokens, embeds, ids = prompt(0)
    out = side(tokens.requires_grad_(), embeds, ids)
    assert torch.equal(out, embeds)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _ddp_worker(rank: int, port: int, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    side = VisualSide(vico_ext.ThresholdPolicy(0.5)).eval()
    connector, router = DistributedDataParallel(side.connector), DistributedDataParallel(side.router)
    torch.manual_seed(1)
    tokens = torch.randn(4, 1025, V)
    # rank 0 compresses nothing, rank 1 everything: both connectors must take part in every step, and nothing must wait
    # for the parameters that the router never uses
    plan = vico_ext.RoutingPlan.from_compress(torch.full((2,), rank == 1))
    for _ in range(3):
        own = tokens[2 * rank : 2 * rank + 2]
        connector.zero_grad()
        router.zero_grad()
        (connector(own, plan).sum() + router(own).sum()).backward()
    results[rank] = {n: p.grad.clone() for n, p in side.named_parameters() if p.requires_grad}
    dist.barrier()
    os._exit(0)  # gloo's destructor may wait for a thread that waits for the interpreter lock


@cpu_only("gloo on the CPU")
def test_ddp_of_two_processes_averages_gradients():
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        workers = mp.spawn(_ddp_worker, (_free_port(), results), nprocs=2, join=False)
        deadline = time.monotonic() + 300
        while not workers.join(timeout=10):
            assert time.monotonic() < deadline, "the two processes wait for each other"
        first, second = results[0], results[1]
    torch.manual_seed(0)
    side = VisualSide(vico_ext.ThresholdPolicy(0.5)).eval()
    torch.manual_seed(1)
    tokens = torch.randn(4, 1025, V)
    for rank in range(2):
        own = tokens[2 * rank : 2 * rank + 2]
        plan = vico_ext.RoutingPlan.from_compress(torch.full((2,), rank == 1))
        ((side.connector(own, plan).sum() + side.router(own).sum()) / 2).backward()
    for name, p in side.named_parameters():
        if p.requires_grad:
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], p.grad, rtol=1e-4, atol=1e-4, msg=name)
