"""VisualResolutionRouter and its functions against the released semantics."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tolerance import LOW_PRECISION, assert_as_accurate
from torch.nn import functional as F

from vico_ext import VisualResolutionRouter, reference
from vico_ext import functional as VF

V = 32


def router(dtype: torch.dtype = torch.float32, **kw) -> VisualResolutionRouter:
    torch.manual_seed(1)
    module = VisualResolutionRouter(V, dtype=torch.float64, **kw)
    for parameter in module.parameters():  # biases and gains off their initial zeros and ones
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module.to(dtype).eval()


def weights_of(module: VisualResolutionRouter) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters())


def pool(tokens: torch.Tensor, w: dict[str, torch.Tensor], heads: int = 16) -> torch.Tensor:
    name = "pooling_before_gating"

    def attention(i: int) -> tuple[torch.Tensor, ...]:
        keys = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        return tuple(w[f"{name}.attn{i}.{key}"] for key in keys)

    def norm(i: int) -> tuple[torch.Tensor, ...]:
        return w[f"{name}.norm{i}.weight"], w[f"{name}.norm{i}.bias"]

    return VF.router_pool(tokens, w[f"{name}.query_token"], attention(1), norm(1), attention(2), norm(2), heads)


def test_golden(golden):
    module = VisualResolutionRouter(V, dtype=torch.float64).eval()
    module.load_state_dict({k: w for k, w in golden.weights_as(torch.float64).items() if not k.startswith("mlp")})
    tokens = golden["vit_tokens"].double()
    torch.testing.assert_close(pool(tokens, weights_of(module)), golden["pooled"], rtol=0, atol=1e-10)
    torch.testing.assert_close(module.logits(tokens).softmax(-1), golden["gate"], rtol=0, atol=1e-10)
    torch.testing.assert_close(module(tokens), golden["gate"][:, 0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_as_accurate_as_the_released_semantics(dtype):
    exact, module = router(torch.float64), router(dtype)
    # the exact result of the same, rounded, weights and tokens
    exact.load_state_dict(module.state_dict())
    tokens = torch.randn(6, 257, V).to(dtype)
    w = weights_of(module)
    want = reference.router_pool(tokens.double(), weights_of(exact))
    assert_as_accurate(pool(tokens, w), reference.router_pool(tokens, w), want)
    want = reference.router_gate(want, weights_of(exact))[:, 0]
    assert_as_accurate(module(tokens), reference.router_gate(reference.router_pool(tokens, w), w)[:, 0], want)


def test_gradients_match_the_reference():
    module = router(torch.float64)
    tokens = torch.randn(3, 50, V, dtype=torch.float64, requires_grad=True)
    w = weights_of(module)
    used = [p for p in module.parameters() if p.requires_grad]
    target = torch.tensor([0, 1, 0])
    ours = F.cross_entropy(module.logits(tokens), target)
    want = F.nll_loss(reference.router_gate(reference.router_pool(tokens, w), w).log(), target)
    for a, b in zip(
        torch.autograd.grad(ours, [tokens, *used]), torch.autograd.grad(want, [tokens, *used]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tiles", [1, 2, 37, 70])
def test_a_tile_has_the_same_bits_whatever_the_others(tiles):
    module = router()
    tokens = torch.randn(tiles, 65, V)
    with torch.no_grad():
        together = module(tokens)
        assert torch.equal(together[-1:], module(tokens[-1:]))
        assert torch.equal(together, module(tokens))


def test_threads_do_not_change_a_bit():
    module, tokens = router(), torch.randn(3, 1025, V)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            p = module(tokens)
            results.append([p.detach(), *torch.autograd.grad(p.sum(), [module.gating.block1[0].weight])])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])


def test_no_tiles_and_one_token():
    module = router()
    empty = torch.randn(0, 17, V, requires_grad=True)
    p = module(empty)
    assert p.shape == (0,)
    p.sum().backward()
    assert torch.equal(module(torch.randn(2, 2, V)).isfinite(), torch.ones(2, dtype=torch.bool))


def test_without_cls():
    tokens = torch.randn(2, 17, V)
    with_cls, without = router(), router(has_cls=False)
    assert torch.equal(with_cls(tokens), without(tokens[:, 1:]))


def test_state_dict_has_the_released_keys(golden):
    module = router()
    wanted = {k for k in golden.weights if not k.startswith("mlp")}
    assert module.state_dict().keys() == wanted
    state = module.state_dict()
    del state["pooling_before_gating.attn3.in_proj_bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*attn3\.in_proj_bias"):
        module.load_state_dict(state)
    assert not module.pooling_before_gating.attn4.in_proj_weight.requires_grad


def test_dropout_only_in_training():
    module, tokens = router(), torch.randn(4, 17, V)
    assert torch.equal(module(tokens), module(tokens))
    module.train()
    assert not torch.equal(module(tokens), module(tokens))


def test_autocast_compile_export_and_copies():
    module, tokens = router(), torch.randn(3, 17, V)
    want = module(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        p = module(tokens)
    assert p.dtype == torch.float32
    assert (p - want).abs().max() < 0.02
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for tiles in (3, 5):
        more = torch.randn(tiles, 17, V)
        torch.testing.assert_close(compiled(more), module(more))
    torch.testing.assert_close(torch.export.export(module, (tokens,)).module()(tokens), want)
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(clone(tokens), want)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(2, 17, V + 1), ValueError, f"with {V} channels and at least one token per tile"),
        (torch.zeros(2, 1, V), ValueError, "at least one token per tile, got"),
        (torch.zeros(17, V), ValueError, "tokens must have shape"),
        (torch.zeros(2, 17, V, dtype=torch.float64), TypeError, "tokens must have the dtype of the router's weights"),
    ],
)
def test_bad_tokens(tokens, error, message):
    with pytest.raises(error, match=message):
        router()(tokens)


def test_bad_sizes():
    with pytest.raises(ValueError, match="vit_hidden must be a positive multiple of num_heads"):
        VisualResolutionRouter(30)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\)"):
        VisualResolutionRouter(32, dropout=1.0)
