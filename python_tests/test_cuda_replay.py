"""Launches that come again as CUDA graphs (csrc/common/replay.h): the router, which is made of such sequences."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import vico_ext

pytestmark = pytest.mark.cuda


def make_router() -> vico_ext.VisualResolutionRouter:
    torch.manual_seed(0)
    return vico_ext.VisualResolutionRouter(64, 4, dtype=torch.bfloat16).eval().requires_grad_(False)


def graph_launches(fn) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fn()
        torch.cuda.synchronize()
    return sum("cudaGraphLaunch" in event.name for event in profile.events())


@pytest.fixture
def router():
    with torch.no_grad():
        yield make_router()


@pytest.fixture
def tokens():
    return torch.randn(5, 1 + 64, 64).bfloat16()


def test_what_is_read_may_change_and_results_do_not(router, tokens):
    others = [torch.randn_like(tokens) for _ in range(3)]
    want = [router(t.clone()).clone() for t in others]
    for i in range(9):
        tokens.copy_(others[i % 3])
        assert torch.equal(router(tokens), want[i % 3])
    router.gating.block1[0].weight.mul_(1.5)
    changed = make_router()
    changed.load_state_dict(router.state_dict())
    assert torch.equal(router(tokens), changed(tokens.clone()))
    assert not torch.equal(router(tokens), want[2])


def test_launches_that_come_again_are_one(router, tokens):
    for _ in range(4):
        router(tokens)
    assert graph_launches(lambda: router(tokens)) == 2  # pooling and gating
    # Another place: one by one again, until that has come often enough.
    kept = [tokens.clone() for _ in range(3)]
    assert graph_launches(lambda: router(kept[0])) < 2
    assert torch.equal(router(kept[0]), router(tokens))


def test_more_sequences_than_are_kept(router):
    """All results are right while graphs come and go, some of them perhaps still running."""
    several = [torch.randn(n, 1 + 64, 64).bfloat16() for n in range(1, 14)]
    want = [make_router()(t).clone() for t in several]
    for _ in range(3):
        got = []
        for t in several:
            for _ in range(3):
                router(t)  # nobody keeps the result: the next one takes its place, and the graph is made of that
            got.append(router(t).clone())
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert graph_launches(lambda: router(several[-1])) > 0


def test_streams_and_captures(router, tokens):
    want = router(tokens).clone()
    for _ in range(4):
        router(tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            got = router(tokens)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = router(tokens)
    tokens.normal_()
    graph.replay()
    assert torch.equal(captured, make_router()(tokens.clone()))


def test_threads(tokens):
    """Each with tensors of its own."""
    want, wrong = make_router()(tokens).clone(), []

    def run() -> None:
        with torch.no_grad():
            router, mine = copy.deepcopy(shared), tokens.clone()
            for _ in range(20):
                if not torch.equal(router(mine), want):
                    wrong.append(threading.get_ident())

    shared = make_router()
    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
