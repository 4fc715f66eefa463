"""Every benchmark case: what is computed, at which size, by whom.

A case builds its inputs once and returns its contenders, functions of no argument that compute the same thing:

- ``released``  the released semantics in eager PyTorch (for a single op: its eager twin)
- ``compiled``  the same under torch.compile
- ``routed``    the best plain PyTorch: chosen connector only, absorbed attention pooling (whole visual side and router)
- ``vico_ext``  this package
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from consistency import SMOKE_WORDS, WORDS
from consistency import consistency_loss as consistency_contenders
from contenders import (
    NUM_HEADS,
    RELATIVE,
    Inputs,
    ReleasedParts,
    released_visual_side,
    routed_connector,
    routed_merge,
    routed_router,
    routed_visual_side,
)
from interleaved import Contenders
from torch import Tensor

import vico_ext
from vico_ext import functional as VF
from vico_ext import reference

PLACEHOLDER = 151_667
POLICY = vico_ext.ReleasedPolicy(RELATIVE, 0.0)


@dataclass(frozen=True)
class Size:
    """A model of REFERENCE §2: ViT width V, language model width H."""

    name: str
    vit: int
    llm: int


B1, B8 = Size("1B", 1024, 1024), Size("8B", 1024, 4096)
# What a CPU can do of the consistency loss: the whole vocabulary, small hidden states.
H64, H256 = Size("H64", 64, 64), Size("H256", 256, 256)
SMOKE = Size("smoke", 64, 96)


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    name: str
    size: Size
    tiles: int
    build: Callable[[Size, int], Contenders]
    rounds: int = 15
    memory: bool = False

    @property
    def id(self) -> str:
        return f"{self.name}-{self.size.name}-{self.tiles}tiles"


class Model:
    """Connector and router of one size with random weights, as modules and as the reference's dictionary."""

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        self.connector = vico_ext.FusedConnector(size.vit, size.llm).eval()
        self.router = vico_ext.VisualResolutionRouter(size.vit, NUM_HEADS).eval()
        self.weights = {**self.connector.state_dict(keep_vars=True), **self.router.state_dict(keep_vars=True)}

    def visual_side(self, x: Inputs) -> Tensor:
        with torch.no_grad():
            p = self.router(x.tokens)
        plan = vico_ext.plan_routing(p, POLICY)
        return self.connect(x, plan)

    def connect(self, x: Inputs, plan: vico_ext.RoutingPlan) -> Tensor:
        """The connector's rows in the prompt."""
        arguments = (x.embeds, x.tokens, self.connector, x.input_ids, plan)
        return vico_ext.connect_visual_tokens(*arguments, placeholder_id=x.placeholder).inputs_embeds


def inputs(size: Size, tiles: int, text: int = 128) -> Inputs:
    tokens = torch.randn(tiles, 1025, size.vit)
    ids = torch.cat([torch.arange(text // 2), torch.full((256 * tiles,), PLACEHOLDER), torch.arange(text // 2)])
    return Inputs(tokens, ids, torch.randn(len(ids), size.llm), PLACEHOLDER)


def half_plan(tiles: int) -> vico_ext.RoutingPlan:
    return vico_ext.RoutingPlan.from_compress(torch.arange(tiles) % 2 == 1)


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(fn, dynamic=False)


def no_grad(contenders: Contenders) -> Contenders:
    def wrap(fn: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return fn()

        return run

    return {name: wrap(fn) for name, fn in contenders.items()}


def with_backward(forward: Callable[[], Tensor], params: list[Tensor]) -> Callable[[], Any]:
    """forward() and the gradients of its mean square for `params` (those that took part)."""

    def run() -> Any:
        return torch.autograd.grad(forward().square().mean(), params, allow_unused=True)

    return run


# ---- the whole visual side after the ViT


def visual_side(size: Size, tiles: int) -> Contenders:
    model, x = Model(size), inputs(size, tiles)
    parts = ReleasedParts(compiled)
    return no_grad(
        {
            "released": lambda: released_visual_side(x, model.weights),
            "compiled": lambda: released_visual_side(x, model.weights, parts=parts),
            "routed": lambda: routed_visual_side(x, model.weights),
            "vico_ext": lambda: model.visual_side(x),
        }
    )


def visual_side_training(size: Size, tiles: int) -> Contenders:
    """Forward and the connectors' gradients; the router decides and does not train, the ViT is frozen."""
    model, x = Model(size), inputs(size, tiles)
    parts = ReleasedParts(compiled)
    params = list(model.connector.parameters())
    return {
        "released": with_backward(lambda: released_visual_side(x, model.weights), params),
        "compiled": with_backward(lambda: released_visual_side(x, model.weights, parts=parts), params),
        "routed": with_backward(lambda: routed_visual_side(x, model.weights), params),
        "vico_ext": with_backward(lambda: model.visual_side(x), params),
    }


# ---- its parts


def router(size: Size, tiles: int) -> Contenders:
    model, x = Model(size), inputs(size, tiles)
    parts = ReleasedParts(compiled)
    eager = ReleasedParts()
    return no_grad(
        {
            "released": lambda: eager.route(x.tokens, model.weights),
            "compiled": lambda: parts.route(x.tokens, model.weights),
            "routed": lambda: routed_router(x.tokens, model.weights),
            "vico_ext": lambda: model.router(x.tokens),
        }
    )


def router_training(size: Size, tiles: int) -> Contenders:
    model, x = Model(size), inputs(size, tiles)
    params = [p for p in model.router.parameters() if p.requires_grad]
    parts = ReleasedParts(compiled)
    eager = ReleasedParts()
    return {
        "released": with_backward(lambda: eager.route(x.tokens, model.weights), params),
        "compiled": with_backward(lambda: parts.route(x.tokens, model.weights), params),
        "routed": with_backward(lambda: routed_router(x.tokens, model.weights), params),
        "vico_ext": with_backward(lambda: model.router(x.tokens), params),
    }


def dual_connector(size: Size, tiles: int) -> Contenders:
    model, x, plan = Model(size), inputs(size, tiles), half_plan(tiles)
    parts = ReleasedParts(compiled)
    eager = ReleasedParts()

    def choose(run: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        full, small = run(x.tokens, model.weights)
        return torch.cat([small[t] if plan.compress[t] else full[t] for t in range(tiles)])

    return no_grad(
        {
            "released": lambda: choose(eager.connectors),
            "compiled": lambda: choose(parts.connectors),
            "routed": lambda: routed_connector(x.tokens, model.weights, plan.compress),
            "vico_ext": lambda: model.connector(x.tokens, plan),
        }
    )


def merge(size: Size, tiles: int) -> Contenders:
    x, plan = inputs(size, tiles), half_plan(tiles)
    visual = torch.randn(plan.total_tokens, size.llm)

    def released() -> Tensor:
        keep = reference.compress_sequence(x.input_ids, plan.compress, PLACEHOLDER)
        ids, embeds = x.input_ids[keep], x.embeds[keep]
        embeds[ids == PLACEHOLDER] = visual
        return embeds

    return no_grad(
        {
            "released": released,
            "routed": lambda: routed_merge(x.embeds, x.input_ids, visual, plan.compress, PLACEHOLDER),
            "vico_ext": lambda: vico_ext.merge_visual_tokens(
                x.embeds, visual, x.input_ids, plan, placeholder_id=PLACEHOLDER
            ),
        }
    )


# ---- single ops against their eager twins


def _op(eager: Callable[..., Any], ours: Callable[..., Any], *args: Any) -> Contenders:
    twin = compiled(eager)
    return no_grad({"released": lambda: eager(*args), "compiled": lambda: twin(*args), "vico_ext": lambda: ours(*args)})


def _op_training(eager: Callable[..., Tensor], ours: Callable[..., Tensor], *args: Any) -> Contenders:
    params = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    twin = compiled(eager)
    return {
        "released": with_backward(lambda: eager(*args), params),
        "compiled": with_backward(lambda: twin(*args), params),
        "vico_ext": with_backward(lambda: ours(*args), params),
    }


def shuffle(rate: int) -> Callable[[Size, int], Contenders]:
    def build(size: Size, tiles: int) -> Contenders:
        return _op(
            lambda t: reference.pixel_shuffle(t, rate),
            lambda t: VF.pixel_shuffle(t, rate),
            inputs(size, tiles).tokens,
        )

    return build


def normalized_shuffle(rate: int, *, training: bool = False) -> Callable[[Size, int], Contenders]:
    def build(size: Size, tiles: int) -> Contenders:
        tokens = inputs(size, tiles).tokens.requires_grad_(training)
        weight, bias = (torch.randn(rate * rate * size.vit, requires_grad=training) for _ in range(2))
        return (_op_training if training else _op)(
            lambda t, w, b: reference.normalized_shuffle(t, w, b, rate),
            lambda t, w, b: VF.normalized_shuffle(t, w, b, rate),
            tokens,
            weight,
            bias,
        )

    return build


def bias_gelu(*, training: bool = False) -> Callable[[Size, int], Contenders]:
    def build(size: Size, tiles: int) -> Contenders:
        x = torch.randn(256 * tiles, size.llm, requires_grad=training)
        bias = torch.randn(size.llm, requires_grad=training)
        return (_op_training if training else _op)(lambda x, b: F.gelu(x + b), VF.bias_gelu, x, bias)

    return build


def attention_pool(size: Size, tiles: int) -> Contenders:
    """One round of absorbed attention pooling."""
    tokens, query = inputs(size, tiles).tokens, torch.randn(tiles, NUM_HEADS, size.vit) * size.vit**-0.5

    def eager(tokens: Tensor, query: Tensor) -> Tensor:
        x = tokens[:, 1:]
        return torch.bmm(torch.bmm(query, x.transpose(1, 2)).softmax(-1), x)

    return _op(eager, VF.attention_pool, tokens, query)


def skinny_linear(size: Size, tiles: int) -> Contenders:
    x, weight = torch.randn(tiles, size.vit), torch.randn(4 * size.vit, size.vit)
    return _op(F.linear, VF.skinny_linear, x, weight)


def consistency_loss(size: Size, tiles: int) -> Contenders:
    return consistency_contenders(size.llm, tiles, SMOKE_WORDS if size is SMOKE else WORDS, compiled)


def plan(size: Size, tiles: int) -> Contenders:
    p = torch.rand(tiles, dtype=torch.float32)

    def eager(p: Tensor) -> tuple[Tensor, Tensor]:
        return reference.plan_tokens(reference.released_route(p, RELATIVE, 0.0))

    return no_grad({"released": lambda: eager(p), "vico_ext": lambda: vico_ext.plan_routing(p, POLICY)})


WHOLE = [
    Case("visual_side", B1, 8, visual_side, rounds=9, memory=True),
    Case("visual_side", B8, 8, visual_side, rounds=5, memory=True),
    Case("visual_side", B1, 1, visual_side),
    Case("visual_side", B8, 1, visual_side, rounds=9),
    Case("visual_side_training", B1, 8, visual_side_training, rounds=5, memory=True),
    Case("visual_side_training", B8, 8, visual_side_training, rounds=3, memory=True),
]
PARTS = [
    Case("router", B1, 8, router, rounds=11),
    Case("router", B1, 1, router),
    Case("router_training", B1, 8, router_training, rounds=5),
    Case("dual_connector", B1, 8, dual_connector, rounds=9),
    Case("dual_connector", B8, 8, dual_connector, rounds=5),
    Case("merge", B1, 8, merge, rounds=41),
    Case("merge", B8, 8, merge, rounds=41),
]
OPS = [
    Case("pixel_shuffle_2x2", B1, 8, shuffle(2), rounds=21),
    Case("pixel_shuffle_4x4", B1, 8, shuffle(4), rounds=21),
    Case("normalized_shuffle_2x2", B1, 8, normalized_shuffle(2), rounds=21),
    Case("normalized_shuffle_4x4", B1, 8, normalized_shuffle(4), rounds=21),
    Case("normalized_shuffle_2x2_training", B1, 8, normalized_shuffle(2, training=True), rounds=11),
    Case("normalized_shuffle_4x4_training", B1, 8, normalized_shuffle(4, training=True), rounds=11),
    Case("bias_gelu", B1, 8, bias_gelu(), rounds=21),
    Case("bias_gelu", B8, 8, bias_gelu(), rounds=21),
    Case("bias_gelu_training", B8, 8, bias_gelu(training=True), rounds=21),
    Case("attention_pool", B1, 8, attention_pool, rounds=21),
    Case("attention_pool", B1, 1, attention_pool, rounds=41),
    Case("skinny_linear", B1, 8, skinny_linear, rounds=41),
    Case("skinny_linear", B1, 1, skinny_linear, rounds=41),
    Case("consistency_loss_training", H64, 8, consistency_loss, rounds=5, memory=True),
    Case("consistency_loss_training", H256, 8, consistency_loss, rounds=5, memory=True),
    Case("plan", B1, 8, plan, rounds=101),
    Case("plan", B1, 96, plan, rounds=101),
]
CASES = WHOLE + PARTS + OPS
