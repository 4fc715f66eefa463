"""Cases that only make sense on a GPU: bare GEMMs, CUDA graphs, training of the connectors, time to the first token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cases import PLACEHOLDER, Model, Size, compiled, half_plan, inputs, no_grad, router, with_backward
from contenders import Inputs, ReleasedParts, released_visual_side
from interleaved import Contenders
from torch import Tensor

import vico_ext

__all__ = [
    "connectors",
    "connectors_into_prompt",
    "connectors_training",
    "first_token",
    "gemms",
    "projection",
    "router_graph",
    "skinny_linear",
    "visual_side_graph",
]


def gemms(size: Size, tiles: int) -> Contenders:
    """The products that the visual side needs with half of the tiles compressed, by cuBLAS, and nothing else."""
    vit, llm = size.vit, size.llm
    full, small = (tiles - tiles // 2) * 256, tiles // 2 * 64
    shapes = [
        (full, 4 * vit, llm),
        (full, llm, llm),
        (small, 16 * vit, 2 * llm),
        (small, 2 * llm, 2 * llm),
        (small, 2 * llm, llm),
    ]
    pairs = [(torch.randn(m, k), torch.randn(n, k)) for m, k, n in shapes]
    outs = [torch.empty(m, n) for m, _, n in shapes]

    def run() -> None:
        for (a, w), out in zip(pairs, outs, strict=True):
            torch.matmul(a, w.t(), out=out)

    # Timed as vico_ext's row of its own: the ratio to visual_side is in the report.
    return no_grad({"vico_ext": run})


def projection(size: Size, tiles: int) -> Contenders:
    """The middle layers of both connectors with bias and GELU: own GEMMs in one launch, and cuBLAS without and with."""
    full, small = (tiles - tiles // 2) * 256, tiles // 2 * 64
    a = torch.randn(full, 4 * size.vit), torch.randn(size.llm, 4 * size.vit), torch.randn(size.llm)
    b = torch.randn(small, 2 * size.llm), torch.randn(2 * size.llm, 2 * size.llm), torch.randn(2 * size.llm)

    def routed() -> None:
        for x, weight, bias in (a, b):
            torch.ops.vico.bias_gelu_(F.linear(x, weight), bias, None, 0.0)

    return no_grad(
        {
            "gemms": lambda: (F.linear(a[0], a[1]), F.linear(b[0], b[1])),
            "routed": routed,
            "vico_ext": lambda: torch.ops.vico.projection(*a, *b, True),
        }
    )


def connectors(size: Size, tiles: int) -> Contenders:
    """Both connectors, half of the tiles compressed: by cuBLAS and own epilogues, by own GEMMs, and by those that read
    the raw tokens through their shuffled view, the norms folded in."""
    model, x, plan = Model(size), inputs(size, tiles), half_plan(tiles)

    def run(projection: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            model.connector.projection = projection
            return model.connector(x.tokens, plan)

        return call

    return no_grad({"routed": run("torch"), "folded": run("folded"), "vico_ext": run("fused")})


def connectors_into_prompt(size: Size, tiles: int) -> Contenders:
    """Both connectors and their rows in the prompt, half of the tiles compressed: packed and merged, and straight."""
    model, x, plan = Model(size), inputs(size, tiles), half_plan(tiles)

    def merged() -> Tensor:
        visual = model.connector(x.tokens, plan)
        return vico_ext.merge_visual_tokens(
            x.embeds, visual, x.input_ids, plan, placeholder_id=PLACEHOLDER
        ).inputs_embeds

    return no_grad({"routed": merged, "vico_ext": lambda: model.connect(x, plan)})


def skinny_linear(size: Size, tiles: int) -> Contenders:
    """Few rows through a wide layer, by the router's own kernel; cuBLAS beside it."""
    x, weight = torch.randn(tiles, size.vit), torch.randn(4 * size.vit, size.vit)
    return no_grad(
        {"released": lambda: F.linear(x, weight), "vico_ext": lambda: torch.ops.vico.skinny_linear(x, weight)}
    )


def router_graph(size: Size, tiles: int) -> Contenders:
    """The router as a CUDA graph, so that the host's time for its launches does not count; others as in ``router``.

    ``reduce_overhead``: the graph that torch.compile makes of our router when asked for that mode.
    """
    contenders = router(size, tiles)
    model, x = Model(size), inputs(size, tiles)
    module = torch.compile(model.router, mode="reduce-overhead", dynamic=False)
    return {
        **contenders,
        **no_grad({"reduce_overhead": lambda: module(x.tokens)}),
        "vico_ext": captured(contenders["vico_ext"]),
    }


def captured(fn: Callable[[], Any]) -> Callable[[], Any]:
    """fn as a CUDA graph; fn itself where there is no CUDA."""
    if not torch.cuda.is_available():
        return fn
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        fn()
    return graph.replay


def visual_side_graph(size: Size, tiles: int) -> Contenders:
    """The whole visual side under a budget, whose count is known, as one CUDA graph; half of the tiles compressed."""
    model, x = Model(size), inputs(size, tiles)
    policy = vico_ext.BudgetPolicy(max_tokens=256 * tiles - 192 * (tiles // 2))

    def ours() -> Tensor:
        return model.connect(x, vico_ext.plan_routing(model.router(x.tokens), policy))

    parts = ReleasedParts(compiled)
    contenders = no_grad(
        {
            "released": lambda: released_visual_side(x, model.weights),
            "compiled": lambda: released_visual_side(x, model.weights, parts=parts),
            "eager": ours,
        }
    )
    return {**contenders, "vico_ext": captured(ours)}


def connectors_training(size: Size, tiles: int) -> Contenders:
    """Forward and gradients of the connectors, half of the tiles compressed."""
    model, x, plan = Model(size), inputs(size, tiles), half_plan(tiles)
    params = list(model.connector.parameters())

    def released(parts: ReleasedParts) -> Callable[[], Tensor]:
        def run() -> Tensor:
            full, small = parts.connectors(x.tokens, model.weights)
            return torch.cat([small[t] if plan.compress[t] else full[t] for t in range(tiles)])

        return run

    return {
        "released": with_backward(released(ReleasedParts()), params),
        "compiled": with_backward(released(ReleasedParts(compiled)), params),
        "vico_ext": with_backward(lambda: model.connector(x.tokens, plan), params),
    }


def language_model(size: Size) -> torch.nn.Module:
    """The Qwen3 of InternVL3.5-8B with random weights; a very small one for other sizes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    large = size.llm == 4096
    config = Qwen3Config(
        vocab_size=151_936 if large else 512,
        hidden_size=size.llm,
        intermediate_size=12_288 if large else 2 * size.llm,
        num_hidden_layers=36 if large else 2,
        num_attention_heads=32 if large else 2,
        num_key_value_heads=8 if large else 2,
        head_dim=128 if large else 16,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model = model.to_empty(device=torch.get_default_device()).to(torch.bfloat16).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1.0)
        rotary = model.model.rotary_emb
        fresh = type(rotary)(config=config)  # its frequencies are a buffer that meta tensors have lost
        rotary.inv_freq = fresh.inv_freq.to(torch.get_default_device())
    return model


def first_token(size: Size, tiles: int) -> Contenders:
    """ViT tokens to first logits, for prompts of 12 tiles and 128 text tokens each, 71% of tiles compressed.

    ``all256``: the same model without routing. ``visual``: only router, connectors and merge of the routed one;
    ``visual_graph``: each prompt's as a CUDA graph.
    """
    per_prompt = min(12, tiles)
    prompts = tiles // per_prompt
    model, lm = Model(size), language_model(size)
    xs = [inputs(size, per_prompt) for _ in range(prompts)]
    # 17 of 24 tiles: 8 of the first prompt, 9 of the second.
    counts = [(17 * (i + 1) * per_prompt) // 24 - (17 * i * per_prompt) // 24 for i in range(prompts)]
    policies = [vico_ext.BudgetPolicy(max_tokens=256 * per_prompt - 192 * count) for count in counts]

    def embed(x: Inputs, policy: vico_ext.BudgetPolicy) -> Tensor:
        return model.connect(x, vico_ext.plan_routing(model.router(x.tokens), policy))

    def all_full(x: Inputs) -> Tensor:
        embeds = x.embeds.clone()
        embeds[x.input_ids == PLACEHOLDER] = model.connector(x.tokens).flatten(0, 1)
        return embeds

    def prefill(embeds: Tensor) -> Tensor:
        return lm(inputs_embeds=embeds[None], use_cache=True, logits_to_keep=1).logits

    embeddings = [partial(embed, x, policy) for x, policy in zip(xs, policies, strict=True)]
    graphs = [captured(run) for run in embeddings]
    return no_grad(
        {
            "all256": lambda: [prefill(all_full(x)) for x in xs],
            "visual": lambda: [run() for run in embeddings],
            "visual_graph": lambda: [run() for run in graphs],
            "vico_ext": lambda: [prefill(run()) for run in embeddings],
        }
    )
