"""What only a GPU can show: streams, devices, CUDA graphs, memory, waits. The ops' own tests run there too."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from device import DEVICE
from tolerance import assert_as_accurate

import vico_ext
from vico_ext import functional as VF

pytestmark = pytest.mark.cuda

PLACEHOLDER, GRID, TILES = 7, 16, 4
TOKENS = (GRID * GRID // 4, GRID * GRID // 16)  # of a whole tile, and of a compressed one


class VisualSide:
    """Router, plan and connector into the prompt at a small size; ``tokens`` and ``embeds`` are static inputs."""

    def __init__(
        self, policy: vico_ext.RoutingPolicy, dtype: torch.dtype = torch.bfloat16, projection: str = "torch"
    ) -> None:
        torch.manual_seed(0)
        self.policy = policy
        self.connector = vico_ext.FusedConnector(64, 96, dtype=dtype, projection=projection).eval()
        self.router = vico_ext.VisualResolutionRouter(64, dtype=dtype).eval()
        self.tokens = torch.randn(TILES, 1 + GRID * GRID, 64, dtype=dtype)
        ids = [torch.arange(10, 15), torch.full((TILES * TOKENS[0],), PLACEHOLDER), torch.arange(20, 25)]
        self.input_ids = torch.cat(ids)[None]
        self.embeds = torch.randn(1, self.input_ids.shape[1], 96, dtype=dtype)

    def __call__(self) -> torch.Tensor:
        plan = self.plan()
        arguments = (self.embeds, self.tokens, self.connector, self.input_ids, plan)
        return vico_ext.connect_visual_tokens(*arguments, placeholder_id=PLACEHOLDER).inputs_embeds

    def plan(self) -> vico_ext.RoutingPlan:
        return vico_ext.plan_routing(self.router(self.tokens), self.policy, tokens=TOKENS)

    def two_steps(self) -> torch.Tensor:
        plan = self.plan()
        visual = self.connector(self.tokens, plan)
        merged = vico_ext.merge_visual_tokens(self.embeds, visual, self.input_ids, plan, placeholder_id=PLACEHOLDER)
        return merged.inputs_embeds


def _ops():
    """One call of each op that trains, as (function, inputs that need gradients, further arguments)."""
    index = torch.tensor([2, 0])
    tokens = torch.randn(3, 1 + GRID * GRID, 64).bfloat16()
    weight, bias = torch.randn(256).bfloat16(), torch.randn(256).bfloat16()
    plan = vico_ext.RoutingPlan.from_compress(torch.tensor([False, True]), (8, 2))
    return {
        "pixel_shuffle": (lambda t: VF.pixel_shuffle(t, 2, tile_index=index), [tokens]),
        "normalized_shuffle": (lambda *a: VF.normalized_shuffle(*a, 2, tile_index=index), [tokens, weight, bias]),
        "bias_gelu": (lambda *a: VF.bias_gelu(*a), [torch.randn(300, 256).bfloat16(), bias]),
        "pack_tokens": (
            lambda *a: torch.ops.vico.pack_tokens(*a, plan.cu_tokens, plan.order),
            [torch.randn(1, 8, 256).bfloat16(), torch.randn(1, 2, 256).bfloat16(), weight, bias],
        ),
        "attention_pool": (lambda *a: VF.attention_pool(*a), [tokens, torch.randn(3, 4, 64).bfloat16()]),
    }


OPS = ("pixel_shuffle", "normalized_shuffle", "bias_gelu", "pack_tokens", "attention_pool")


def _run(name: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The op's result and all gradients."""
    fn, _ = _ops()[name]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = fn(*leaves)
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@pytest.mark.parametrize("name", OPS)
def test_two_runs_are_bit_equal(name):
    _, inputs = _ops()[name]
    for one, two in zip(_run(name, inputs), _run(name, inputs), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("projection", ["torch", "fused", "folded"])
@pytest.mark.parametrize("grad", [False, True])
def test_two_runs_of_the_visual_side_are_bit_equal(projection, grad):
    side = VisualSide(vico_ext.BudgetPolicy(fraction=0.5), projection=projection)

    def run() -> list[torch.Tensor]:
        with torch.set_grad_enabled(grad):
            out = side()
            params = list(side.connector.parameters())
            return [out, *torch.autograd.grad(out.float().square().sum(), params)] if grad else [out]

    for one, two in zip(run(), run(), strict=True):
        assert torch.equal(one, two)


def test_two_runs_of_the_router_are_bit_equal():
    router, tokens = vico_ext.VisualResolutionRouter(64, dtype=torch.bfloat16).eval(), torch.randn(5, 65, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(router(tokens), router(tokens))


def test_two_consistency_losses_are_bit_equal():
    hidden, ref = (torch.randn(50, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight = torch.randn(3000, 64, dtype=torch.bfloat16, requires_grad=True)

    def run() -> list[torch.Tensor]:
        loss = VF.consistency_loss(hidden, weight, ref.detach(), weight.detach(), divergence="jsd").loss
        return [loss, *torch.autograd.grad(loss, [hidden, weight])]

    for one, two in zip(run(), run(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", OPS)
def test_runs_on_torchs_current_stream(name):
    """Inputs arrive late on another stream: a kernel on the default stream would read what was there before."""
    _, inputs = _ops()[name]
    want = _run(name, inputs)
    late = [torch.zeros_like(x) for x in inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, value in zip(late, inputs, strict=True):
            x.copy_(value, non_blocking=True)
        got = _run(name, late)
    stream.synchronize()
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one, two)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_runs_on_the_device_of_the_tensors():
    tokens = torch.randn(2, 17, 8)
    with torch.cuda.device(0):
        there = VF.pixel_shuffle(tokens.to("cuda:1"), 2)
    assert there.device == torch.device("cuda:1")
    assert torch.equal(there.cpu(), VF.pixel_shuffle(tokens, 2).cpu())
    message = r"tile_index must be on the device of tokens \(cuda:0\), got cuda:1"
    with pytest.raises(RuntimeError, match=message):
        VF.pixel_shuffle(tokens.to("cuda:0"), 2, tile_index=torch.tensor([0], device="cuda:1"))


def test_cpu_tensors_go_to_the_cpu_kernels():
    tokens = torch.randn(2, 17, 8)
    got = VF.pixel_shuffle(tokens.cpu(), 2)
    assert got.device.type == "cpu"
    assert torch.equal(got, VF.pixel_shuffle(tokens, 2).cpu())
    with pytest.raises(RuntimeError, match=r"weight must be on the device of tokens \(cuda:0\), got cpu"):
        VF.normalized_shuffle(tokens, torch.ones(32, device="cpu"), torch.ones(32), 2)


@pytest.mark.parametrize("columns", [96, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dropout_masks_are_those_of_the_cpu(dtype, columns):
    x, seed = torch.ones(50, columns, dtype=dtype), torch.tensor([20250813])
    ours = torch.ops.vico.bias_gelu(x, None, seed, 0.3)
    for seed_device in ("cpu", DEVICE):
        assert torch.equal(torch.ops.vico.bias_gelu(x, None, seed.to(seed_device), 0.3), ours)
    assert torch.equal(torch.ops.vico.bias_gelu(x.cpu(), None, seed.cpu(), 0.3) == 0, ours.cpu() == 0)


@pytest.mark.parametrize("projection", ["torch", "fused", "folded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fraction", [0.25, 0.6, 1.0])
def test_rows_written_at_their_places_are_those_of_the_merge(projection, dtype, fraction):
    side = VisualSide(vico_ext.BudgetPolicy(fraction=fraction), dtype, projection)
    with torch.no_grad():
        assert torch.equal(side(), side.two_steps())


@pytest.mark.parametrize("projection", ["torch", "fused", "folded"])
def test_graph_of_the_whole_visual_side(projection):
    """Under a budget the count is known: one graph, replayed for other inputs, equals eager runs of those."""
    side = VisualSide(vico_ext.BudgetPolicy(fraction=0.5), projection=projection)
    with torch.no_grad():
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            for _ in range(2):
                side()
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = side()
        for _ in range(3):
            side.tokens.normal_()
            side.embeds.normal_()
            graph.replay()
            assert torch.equal(captured, side.two_steps())


def test_graph_draws_dropout_anew():
    x = torch.ones(64, 96)
    VF.bias_gelu(x, dropout_p=0.5, training=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = VF.bias_gelu(x, dropout_p=0.5, training=True)
    graph.replay()
    first = captured.clone()
    graph.replay()
    assert not torch.equal(captured, first)


def test_graphs_keep_the_folded_weights_that_they_read():
    side = VisualSide(vico_ext.BudgetPolicy(fraction=0.5), projection="folded")
    connector, plan = side.connector, vico_ext.RoutingPlan.from_compress(torch.tensor([True, False] * 2), TOKENS)

    def capture() -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = connector(side.tokens, plan)
        return graph, out

    with torch.no_grad():
        before = connector(side.tokens, plan)
        graph, out = capture()
        connector.mlp1[1].weight.mul_(2)
        now = connector(side.tokens, plan)  # frees what it no longer needs
        taken = [torch.full((1 << 20,), torch.nan) for _ in range(64)]
        graph.replay()
        assert torch.equal(out, before)
        assert not torch.equal(now, before)
        del taken
        graph, out = capture()
        graph.replay()
        assert torch.equal(out, now)
        # Nothing is folded while a graph is captured.
        connector.folded_weights.clear()
        graph, out = capture()
        graph.replay()
        torch.testing.assert_close(out, now, rtol=0.05, atol=0.05)
        assert not connector.folded_weights._kept


def test_folded_weights_are_ready_on_every_stream():
    """Made on one stream that is late, read on another right away."""
    side = VisualSide(vico_ext.BudgetPolicy(fraction=0.5), projection="folded")
    with torch.no_grad():
        want = side.connector(side.tokens)
        side.connector.folded_weights.clear()
        torch.cuda.synchronize()
        late, other = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(late):
            torch.cuda._sleep(50_000_000)
            side.connector(side.tokens)
        with torch.cuda.stream(other):
            got = side.connector(side.tokens)
        torch.cuda.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vit", "side"), [(64, 16), (64, 32), (40, 16)])
def test_folded_is_as_accurate_as_torch(dtype, vit, side):
    """Views that the sm_90a kernel takes, and one that it does not."""
    connector = vico_ext.FusedConnector(vit, 96, dtype=dtype).eval()
    exact_connector = vico_ext.FusedConnector(vit, 96, dtype=torch.float64).eval()
    exact_connector.load_state_dict(connector.state_dict())
    tokens = (torch.randn(TILES, 1 + side * side, vit) + 1).to(dtype)
    plan = vico_ext.RoutingPlan.from_compress(
        torch.tensor([True, False, False, True]), (side * side // 4, side * side // 16)
    )
    with torch.no_grad():
        exact, torchs = exact_connector(tokens.double(), plan), connector(tokens, plan)
        connector.projection = "folded"
        assert_as_accurate(connector(tokens, plan), torchs, exact, roundings=2.0)
        assert connector.folded_weights._kept


@pytest.mark.parametrize("projection", ["torch", "fused", "folded"])
def test_a_budget_waits_for_nothing(projection):
    side = VisualSide(vico_ext.BudgetPolicy(fraction=0.5), projection=projection)
    with torch.no_grad():
        side()
        torch.cuda.set_sync_debug_mode("error")
        try:
            side()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_threshold_waits_once():
    """For the number of tokens, which sizes the output."""
    side = VisualSide(vico_ext.ThresholdPolicy(0.5))
    with torch.no_grad():
        side()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                side()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) <= 1, waits


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other workers allocate on the same device")
def test_all_memory_is_torchs():
    """Whatever the device has less of after many calls, torch's allocator has; nothing else may use it then.

    But for what the driver keeps for the router's launches, a CUDA graph from the third call on: 2 MB on an H200, once.
    """
    side = VisualSide(vico_ext.BudgetPolicy(fraction=0.5))
    run = [lambda name=name: _run(name, _ops()[name][1]) for name in OPS]

    def taken(times: int) -> int:
        """Bytes of the device that so many rounds take beside what torch's allocator has of them."""
        torch.cuda.synchronize()
        free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
        for _ in range(times):
            for fn in run:
                fn()
            with torch.no_grad():
                side()
        torch.cuda.synchronize()
        return free - torch.cuda.mem_get_info()[0] - max(0, torch.cuda.memory_reserved() - reserved)

    taken(1)  # modules of kernels
    assert taken(5) <= 8 << 20
    assert taken(20) <= 0
