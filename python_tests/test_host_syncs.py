"""What makes the host wait for an accelerator, counted without one: one number per size that only the device knows.

On the CPU every read of a tensor's values that the dispatcher or the Python methods see is counted. On the meta device
there are no values, so that any read fails, and copies to or from it are counted.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vico_ext
from vico_ext import functional as VF

V, H, PLACEHOLDER, TILES = 32, 48, 7, 4
KNOWN = (
    vico_ext.BudgetPolicy(fraction=0.6),
    vico_ext.BudgetPolicy(max_tokens=TILES * 256),
    vico_ext.ThresholdPolicy(0.0),
    vico_ext.ThresholdPolicy(1.5),
)
COUNTED = (
    vico_ext.ThresholdPolicy(0.5),
    vico_ext.ReleasedPolicy(0.5, 0.0),
    vico_ext.PerImagePolicy(0.5, 0.0),
)

READS = {
    "aten._local_scalar_dense",
    "aten.bincount",
    "aten.equal",
    "aten.is_nonzero",
    "aten.item",
    "aten.masked_select",
    "aten.nonzero",
    "aten.repeat_interleave",
    "aten.unique_consecutive",
    "aten.unique_dim",
    "aten._unique2",
}
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}


class HostReads(TorchDispatchMode):
    """Counts operators that need a tensor's values on the host, and copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        masks = name in INDEXING and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        out = func(*args, **(kwargs or {}))
        if name in READS or masks:
            self.reads[name] += 1
        if name in ("aten._to_copy", "aten.copy_") and out.device != args[-1 if name == "aten.copy_" else 0].device:
            self.reads[f"{name} to {out.device}"] += 1
        return out


@pytest.fixture
def host_reads(monkeypatch):
    """A HostReads that also counts the methods which bypass the dispatcher on the CPU."""
    mode = HostReads()
    for name in ("tolist", "numpy", "cpu", "__array__"):
        method = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, _name: str = name, _method: Any = method, **kwargs: Any) -> Any:
            mode.reads[_name] += 1
            return _method(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)
    return mode


class VisualSide(nn.Module):
    """Router, plan and connector into the prompt: by the merge where there are gradients, else straight there."""

    def __init__(self, policy: vico_ext.RoutingPolicy, device: str) -> None:
        super().__init__()
        self.connector = vico_ext.FusedConnector(V, H, device=torch.device(device))
        self.router = vico_ext.VisualResolutionRouter(V, device=torch.device(device))
        self.policy = policy

    def forward(
        self, tokens: Tensor, embeds: Tensor, ids: Tensor, mask: Tensor | None, length: int | None
    ) -> vico_ext.CompressedSequence:
        plan = vico_ext.plan_routing(self.router(tokens), self.policy, tiles_per_image=[1, 2, 1])
        return vico_ext.connect_visual_tokens(
            embeds,
            tokens,
            self.connector,
            ids,
            plan,
            placeholder_id=PLACEHOLDER,
            attention_mask=mask,
            labels=ids,
            position_ids=torch.arange(ids.shape[1], device=ids.device)[None],
            length=length,
        )


def inputs(device: str, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    visual = torch.full((rows, 256 * TILES // rows), PLACEHOLDER)
    text = torch.arange(20, 20 + 3 * rows).view(rows, 3)
    ids = torch.cat([text[:, :2], visual, text[:, 2:]], 1)
    mask = None if rows == 1 else ids != 20
    tokens, embeds = torch.randn(TILES, 1025, V), torch.randn(*ids.shape, H)
    return tuple(None if t is None else t.to(device) for t in (tokens, embeds, ids, mask))


@pytest.mark.parametrize("policy", KNOWN + COUNTED, ids=repr)
def test_reads_of_the_visual_side(policy, host_reads):
    side, known = VisualSide(policy, "cpu"), policy in KNOWN
    wanted = Counter() if known else Counter({"aten._local_scalar_dense": 1})
    single, padded = inputs("cpu", 1), inputs("cpu", 2)
    with host_reads:
        out = side(*single, None)
        out.inputs_embeds.square().mean().backward()
    assert host_reads.reads == wanted
    host_reads.reads.clear()
    with host_reads, torch.no_grad():  # the rows go straight to their places
        side(*single, None)
    assert host_reads.reads == wanted
    host_reads.reads.clear()
    with host_reads:
        side(*padded, 900)
    assert host_reads.reads == wanted
    with host_reads:
        side(*padded, None)  # the longest row is one more number
    assert host_reads.reads == wanted + wanted + Counter({"aten._local_scalar_dense": 1})


class FirstValue(nn.Module):
    """In the place of the router, which asks for the device's autocast dtype: the meta device has none."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0, 0]


@pytest.mark.parametrize("policy", KNOWN, ids=repr)
@pytest.mark.parametrize("rows", [1, 2])
def test_known_counts_need_no_values_at_all(policy, rows):
    side, given, length = VisualSide(policy, "meta"), inputs("meta", rows), None if rows == 1 else 900
    side.router = FirstValue()
    with HostReads() as mode:
        with torch.no_grad():
            side(*given, length)
        out = side(*given, length)
        out.inputs_embeds.square().mean().backward()
    assert not mode.reads
    assert all(p.grad is not None for p in side.connector.parameters())
    kept = 3 * rows + 256 * TILES - policy.compressed_tiles(TILES, (256, 64)) * 192
    assert out.inputs_embeds.shape == (rows, length or kept, H)


@pytest.mark.parametrize("policy", COUNTED, ids=repr)
def test_meta_tensors_refuse_the_count(policy):
    p = torch.empty(TILES, device="meta")
    with pytest.raises(RuntimeError, match="meta tensor"):
        vico_ext.plan_routing(p, policy, tiles_per_image=[1, 3])


def test_images_on_the_device_are_not_read():
    p, images = torch.empty(5, device="meta"), torch.empty(2, dtype=torch.int32, device="meta")
    plan = vico_ext.plan_routing(p, vico_ext.BudgetPolicy(fraction=0.5), tiles_per_image=images)
    assert plan.cu_tokens.is_meta
    assert vico_ext.PerImagePolicy(0.5, 0.0).compress(p, images.long(), (256, 64)).is_meta


def test_rows_of_tokens_without_values():
    embeds = torch.empty(6, H, device="meta", requires_grad=True)
    tokens = torch.empty(2, H, device="meta", requires_grad=True)
    index = torch.empty(2, dtype=torch.int64, device="meta")
    out = VF.gather_tokens(VF.scatter_tokens(embeds, index, tokens), index)
    out.sum().backward()
    with torch.no_grad():
        VF.scatter_tokens_(embeds, index, tokens)
    assert embeds.grad.shape == embeds.shape


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.parametrize("policy", KNOWN, ids=repr)
def test_cuda_graph_of_the_whole_visual_side(policy):
    side, given = VisualSide(policy, "cuda").eval(), inputs("cuda", 1)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        side(*given, None)  # once before, as torch asks: libraries allocate their workspaces
        with torch.cuda.graph(graph):
            captured = side(*given, None)
        given[0].copy_(torch.randn_like(given[0]))
        graph.replay()
        want = side(*given, None)
    for field in dataclasses.fields(want):
        torch.testing.assert_close(getattr(captured, field.name), getattr(want, field.name))


@needs_gpu
@pytest.mark.parametrize("policy", KNOWN + COUNTED, ids=repr)
def test_cuda_syncs(policy):
    side, given = VisualSide(policy, "cuda").eval(), inputs("cuda", 1)
    side(*given, None)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            side(*given, None).inputs_embeds.square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchronizing" in str(w.message)]) == (policy not in KNOWN)
