"""VisualResolutionRouter and its functions: the released semantics, absorbed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from tolerance import LOW_PRECISION, assert_as_accurate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vico_ext
from vico_ext import _C, reference
from vico_ext import functional as VF

UNUSED = ("attn3", "attn4", "norm3", "norm4")


def make_router(width=32, heads=4, dtype=torch.float32, **kwargs) -> vico_ext.VisualResolutionRouter:
    """A router in evaluation mode whose every parameter is random: defaults of zero and one hide mistakes."""
    router = vico_ext.VisualResolutionRouter(width, heads, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for p in router.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() == 2 else 0.3) + (p.dim() == 1) * 0.5)
    return router.to(dtype).eval()


def released(tokens: Tensor, weights: dict[str, Tensor], heads: int, skip: int = 1) -> Tensor:
    pooled = reference.router_pool(tokens, weights, num_heads=heads, skip=skip)
    return reference.router_gate(pooled, weights)


def pool(router: vico_ext.VisualResolutionRouter, tokens: Tensor) -> Tensor:
    weights = {k.removeprefix("pooling_before_gating."): p for k, p in router.named_parameters()}

    def attention(name):
        return tuple(
            weights[f"{name}.{k}"] for k in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        )

    def norm(name):
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    return VF.router_pool(
        tokens,
        weights["query_token"],
        attention("attn1"),
        norm("norm1"),
        attention("attn2"),
        norm("norm2"),
        router.num_heads,
        has_cls=router.has_cls,
    )


@pytest.fixture(scope="module")
def golden_router(golden):
    router = vico_ext.VisualResolutionRouter(32, dtype=torch.float64).eval()
    keys = router.state_dict().keys()
    router.load_state_dict({k: w.double() for k, w in golden.weights.items() if k in keys}, strict=True)
    return router


def test_golden(golden, golden_router):
    tokens = golden["vit_tokens"].double()
    torch.testing.assert_close(pool(golden_router, tokens), golden["pooled"].double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(golden_router(tokens), golden["gate"][:, 0].double(), rtol=0, atol=1e-10)
    logits = golden_router.logits(tokens)
    torch.testing.assert_close(logits.softmax(-1), golden["gate"].double(), rtol=0, atol=1e-10)


def test_state_dict_has_the_released_keys(golden, golden_router):
    mine = {k for k in golden.weights if k.startswith(("pooling_before_gating.", "gating."))}
    state = golden_router.state_dict()
    assert set(state) == mine
    assert any(f".{name}." in key for key in mine for name in UNUSED)
    for key, value in state.items():
        assert torch.equal(value, golden.weights[key].double())
    with pytest.raises(RuntimeError, match=r"Missing key.*gating\.gate\.1\.bias"):
        golden_router.load_state_dict({k: v for k, v in state.items() if k != "gating.gate.1.bias"})


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(
    ("width", "heads", "tiles", "count"), [(256, 16, 16, 300), (72, 3, 24, 100)]
)  # tiles enough for errors to average
def test_accuracy(dtype, width, heads, tiles, count):
    router, tokens = make_router(width, heads, dtype), torch.randn(tiles, 1 + count, width).to(dtype)
    weights = router.state_dict()
    wide = {k: w.double() for k, w in weights.items()}
    with torch.no_grad():
        exact, eager = (
            reference.router_pool(t, w, num_heads=heads) for t, w in ((tokens.double(), wide), (tokens, weights))
        )
        assert_as_accurate(pool(router, tokens), eager, exact)
        p = router(tokens)
        assert p.dtype == torch.float32
        exact, eager = (released(t, w, heads)[:, 0] for t, w in ((tokens.double(), wide), (tokens, weights)))
        assert_as_accurate(p, eager.float(), exact)


@pytest.mark.parametrize("grad", [True, False])  # without, CUDA has one call for each half
@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize(("tiles", "heads", "count"), [(1, 1, 1), (3, 4, 17), (0, 4, 5), (2, 16, 600)])
def test_any_shape_and_layout(grad, has_cls, tiles, heads, count):
    router = make_router(48, heads, torch.float64, has_cls=has_cls)
    tokens = torch.randn(48, tiles, has_cls + count + 2, dtype=torch.float64).permute(1, 2, 0)[:, 1:-1]
    want = released(tokens, router.state_dict(), heads, int(has_cls))[:, 0]
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(router(tokens), want, rtol=1e-12, atol=1e-12)


HAS_ONE_CALL = DEVICE == "cuda" or _C.cuda == "host"


def called_ops(fn) -> set[str]:
    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Names() as mode:
        fn()
    return mode.names


def test_one_call_where_nothing_else_is_wanted():
    router, tokens = make_router(), torch.randn(2, 17, 32)
    halves = {"vico::router_pool", "vico::router_gate"}
    with torch.no_grad():
        assert halves <= called_ops(lambda: router(tokens)) or not HAS_ONE_CALL
        router.train()
        assert "vico::router_gate" not in called_ops(lambda: router(tokens))  # dropout
        router.eval()
        with torch.autocast(tokens.device.type, torch.bfloat16):
            assert not halves & called_ops(lambda: router(tokens))
    assert not halves & called_ops(lambda: router(tokens))
    for p in router.parameters():
        p.requires_grad_(False)
    assert halves <= called_ops(lambda: router(tokens)) or not HAS_ONE_CALL
    assert not halves & called_ops(lambda: router(tokens.clone().requires_grad_()))


def halves_arguments(width=32, heads=4):
    router = make_router(width, heads).requires_grad_(False)
    pooling, gating = router.pooling_before_gating, router.gating
    rounds = [
        [attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias, norm.weight, norm.bias]
        for attn, norm in ((pooling.attn1, pooling.norm1), (pooling.attn2, pooling.norm2))
    ]
    blocks = [t for i in range(1, 5) for n in (0, 3, 5) for t in getattr(gating, f"block{i}")[n].parameters()]
    pool = [torch.randn(2, 17, width), pooling.query_token, *rounds, heads, 1, 1e-5]
    return pool, [torch.randn(2, width), blocks, list(gating.gate.parameters()), 1e-5, False]


@pytest.mark.skipif(HAS_ONE_CALL, reason="there are kernels")
def test_one_call_is_for_cuda():
    pool, gate = halves_arguments()
    for op, arguments in ((torch.ops.vico.router_pool, pool), (torch.ops.vico.router_gate, gate)):
        with pytest.raises(
            RuntimeError, match=r"there is a kernel for CUDA alone, got \w+ on cpu: functional\.router_"
        ):
            op(*arguments)


@pytest.mark.skipif(not HAS_ONE_CALL, reason="no kernels")
def test_opcheck_of_one_call():
    pool, gate = halves_arguments()
    calls = [(torch.ops.vico.router_pool, pool), (torch.ops.vico.router_gate, gate)]
    for op, arguments in [*calls, (torch.ops.vico.router_gate, [*gate[:4], True])]:
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_probability_is_the_softmax_of_the_logits(dtype):
    router, tokens = make_router().to(dtype), torch.randn(3, 17, 32, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        p = router(tokens)
        want = router.logits(tokens).to(wide).softmax(-1)[:, 0]
    assert p.dtype == wide
    torch.testing.assert_close(p, want, rtol=1e-6, atol=1e-7)
    assert router(tokens[:0]).shape == (0,)


class Wrapper(torch.nn.Module):
    """As wrappers for checkpointing or sharding do it: everything goes on to the module inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def __getitem__(self, i):
        return self.inner[i]


def test_parts_may_be_wrapped_and_put_in_again():
    router, tokens = make_router(), torch.randn(2, 17, 32)
    with torch.no_grad():
        want = router(tokens)
        pooling, gating = router.pooling_before_gating, router.gating
        pooling.attn1, pooling.norm2 = Wrapper(pooling.attn1), Wrapper(pooling.norm2)
        gating.block1, gating.gate = Wrapper(gating.block1), Wrapper(gating.gate)
        block = gating.block2
        del gating.block2
        gating.block2 = block
        gating.block3[0] = Wrapper(gating.block3[0])
        assert torch.equal(router(tokens), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deep_layers_of_the_gate(dtype):
    """Layers whose depth the CUDA kernels cut into parts: a row's bits do not depend on how many there are."""
    width, hidden = 16, 2048 + 32

    def weight(*shape):
        return torch.randn(*shape) * shape[-1] ** -0.5

    block = [
        weight(hidden, width),
        weight(hidden),
        weight(width, hidden),
        weight(width),
        1 + weight(width),
        weight(width),
    ]
    gate = [1 + weight(width), weight(width), weight(2, width), weight(2)]
    pooled = torch.randn(19, width)
    args = [t.to(dtype) for t in (pooled, *block, *gate)]
    pooled, block, gate = args[0], tuple(args[1:7]), tuple(args[7:])
    with torch.no_grad():
        got = VF.router_gate(pooled, [block, block], gate)
        alone = torch.cat([VF.router_gate(pooled[i : i + 1], [block, block], gate) for i in (0, 18)])
        x = pooled.double()
        w1, b1, w2, b2, *norm = (t.double() for t in block)
        for _ in range(2):
            h = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
            x = x + F.layer_norm(h, (width,), *norm)
        want = F.linear(F.layer_norm(x, (width,), *(t.double() for t in gate[:2])), *(t.double() for t in gate[2:]))
    assert got[[0, 18]].equal(alone)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.skipif(not HAS_ONE_CALL, reason="no kernels")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pool, gate: pool[2].pop(), r"first must hold 6 tensors .*, got 5"),
        (lambda pool, gate: pool.__setitem__(4, 5), "heads must divide the channels, got 5 heads for 32 channels"),
        (
            lambda pool, gate: pool[3].__setitem__(2, torch.ones(32, 31)),
            r"later's out_proj.weight must have shape .*31",
        ),
        (lambda pool, gate: pool[2].__setitem__(5, torch.ones(32).double()), r"first's norm.bias must have the dtype"),
        (lambda pool, gate: pool.__setitem__(1, torch.ones(2, 32)), r"query_token must have shape \[1, channels\]"),
        (lambda pool, gate: pool.__setitem__(5, 17), "tokens must hold at least one token per tile after the first 17"),
        (lambda pool, gate: gate[1].pop(), "blocks must hold 6 tensors for each block, got 23"),
        (lambda pool, gate: gate[1].__setitem__(8, torch.ones(32, 7)), "block 2's second weight must have shape"),
        (lambda pool, gate: gate[2].pop(), "gate must hold 4 tensors, got 3"),
        (lambda pool, gate: gate[2].__setitem__(3, torch.ones(3)), r"gate's bias must have shape \[classes\] = \[2\]"),
    ],
)
def test_bad_arguments_of_one_call(change, message):
    pool, gate = halves_arguments()
    change(pool, gate)

    def both() -> None:
        torch.ops.vico.router_pool(*pool)
        torch.ops.vico.router_gate(*gate)

    with pytest.raises(RuntimeError, match=message):
        both()


def test_gradients_match_reference():
    router, tokens = make_router(dtype=torch.float64), torch.randn(3, 40, 32, dtype=torch.float64, requires_grad=True)
    used = {k: p for k, p in router.named_parameters() if p.requires_grad}
    weights = {k: p.detach().clone().requires_grad_(k in used) for k, p in router.named_parameters()}
    want_logits = reference.router_pool(tokens, weights, num_heads=4)
    want = torch.autograd.grad(
        reference.router_gate(want_logits, weights).log().square().sum(), [*(weights[k] for k in used), tokens]
    )
    got = torch.autograd.grad(router.logits(tokens).log_softmax(-1).square().sum(), [*used.values(), tokens])
    for name, a, b in zip([*used, "tokens"], got, want, strict=True):
        assert (a - b).norm() <= 1e-10 * (1 + b.norm()), name
    assert {k for k, p in router.named_parameters() if not p.requires_grad} == {
        k for k in weights if any(f".{name}." in k for name in UNUSED)
    }


def test_trains_without_gradients_of_the_tokens():
    router, tokens = make_router().train(), torch.randn(3, 17, 32)
    router.logits(tokens).sum().backward()
    for name, p in router.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bits_do_not_depend_on_the_other_tiles_or_the_threads(dtype, grad):
    router, tokens = make_router(64, 16, dtype).requires_grad_(grad), torch.randn(70, 50, 64).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([router(tokens[t : t + 1]) for t in range(70)])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for tiles in (2, 7, 33, 70):
                for _ in range(2):
                    assert torch.equal(router(tokens[-tiles:]), alone[-tiles:])
    finally:
        torch.set_num_threads(before)


def test_dropout_in_training_only():
    router, tokens = make_router(dropout=0.5), torch.randn(4, 17, 32)
    assert torch.equal(router(tokens), router(tokens))
    router.train()
    first, second = router(tokens), router(tokens)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    first = router(tokens)
    torch.manual_seed(1)
    assert torch.equal(first, router(tokens))
    no_dropout = make_router(dropout=0.0)
    assert torch.equal(no_dropout.train()(tokens), no_dropout.eval()(tokens))


def test_dropout_is_where_the_released_blocks_have_it():
    """With a generator at the same seed, each block is torch's own nn.Sequential in training."""
    router = make_router(dropout=0.3, dtype=torch.float64).train()
    x = pooled = torch.randn(5, 32, dtype=torch.float64)
    torch.manual_seed(3)
    for i in range(1, 5):
        x = x + getattr(router.gating, f"block{i}")(x)
    want = router.gating.gate(x)
    blocks = [
        tuple(p for n in (0, 3, 5) for p in (block[n].weight, block[n].bias))
        for block in (getattr(router.gating, f"block{i}") for i in range(1, 5))
    ]
    gate = tuple(router.gating.gate.parameters())
    torch.manual_seed(3)
    got = VF.router_gate(pooled, blocks, gate, dropout=0.3, training=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_compiles_whole_with_dynamic_tiles():
    router = make_router()
    compiled = torch.compile(router, fullgraph=True, dynamic=True, backend="aot_eager")
    for tiles in (2, 3, 70):
        tokens = torch.randn(tiles, 17, 32)
        assert torch.equal(compiled(tokens), router(tokens))


def test_compiles_with_inductor():
    router, tokens = make_router(), torch.randn(3, 17, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(router, fullgraph=True)(tokens), router(tokens))


def test_compiled_training_step():
    router = make_router(dtype=torch.float64)
    params = [p for p in router.parameters() if p.requires_grad]
    compiled = torch.compile(router.logits, fullgraph=True, backend="aot_eager")
    tokens = torch.randn(3, 17, 32, dtype=torch.float64)
    got = torch.autograd.grad(compiled(tokens).square().sum(), params)
    for a, b in zip(got, torch.autograd.grad(router.logits(tokens).square().sum(), params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_exports_with_dynamic_tiles():
    router = make_router()
    tiles = torch.export.Dim("tiles", min=1, max=4096)
    program = torch.export.export(router, (torch.randn(3, 17, 32),), dynamic_shapes=({0: tiles},))
    for count in (1, 5, 70):
        tokens = torch.randn(count, 17, 32)
        assert torch.equal(program.module()(tokens), router(tokens))


def test_autocast():
    router, tokens = make_router(), torch.randn(3, 17, 32)
    with torch.autocast(DEVICE, torch.bfloat16):
        p, logits = router(tokens), router.logits(tokens)
        logits.sum().backward()
    assert p.dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    exact = released(tokens.double(), {k: w.double() for k, w in router.state_dict().items()}, 4)[:, 0]
    with torch.autocast(DEVICE, torch.bfloat16):
        eager = released(tokens, router.state_dict(), 4)[:, 0]
    assert_as_accurate(p.detach(), eager.float(), exact)
    assert all(p.grad.dtype == torch.float32 for p in router.parameters() if p.requires_grad)


def test_checkpointing():
    router, tokens = make_router(dropout=0.2).train(), torch.randn(3, 17, 32)
    params = [p for p in router.parameters() if p.requires_grad]
    torch.manual_seed(5)
    want = torch.autograd.grad(router.logits(tokens).square().sum(), params)
    torch.manual_seed(5)
    logits = torch.utils.checkpoint.checkpoint(router.logits, tokens, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(logits.square().sum(), params), want, strict=True):
        assert torch.equal(a, b)


def test_copies():
    router, tokens = make_router(), torch.randn(3, 17, 32)
    want, file = router(tokens), io.BytesIO()
    torch.save(router.state_dict(), file)
    file.seek(0)
    loaded = vico_ext.VisualResolutionRouter(32, 4).eval()
    loaded.load_state_dict(torch.load(file))
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router)), loaded):
        assert torch.equal(twin(tokens), want)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((100, 16), {}, "vit_hidden must be a positive multiple of num_heads, got vit_hidden=100 and num_heads=16"),
        ((32, 0), {}, "got vit_hidden=32 and num_heads=0"),
        ((32,), {"dropout": 1.5}, r"dropout must lie in \[0, 1\), got 1.5"),
    ],
)
def test_bad_configuration(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        vico_ext.VisualResolutionRouter(*args, **kwargs)


def test_bad_tokens():
    router = make_router()
    for shape, message in (
        ((2, 17, 31), r"\[tiles, 1 \+ tokens, channels\] with 32 channels .* got \[2, 17, 31\] with has_cls=True"),
        ((2, 1, 32), r"at least one token per tile, got \[2, 1, 32\]"),
        ((17, 32), r"tokens must have shape .* got \[17, 32\]"),
    ):
        with pytest.raises(ValueError, match=message):
            router(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"dtype of the router's weights, torch\.float32, got torch\.bfloat16"):
        router(torch.zeros(2, 17, 32, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="num_heads must divide the channels, got 5 heads for 32 channels"):
        VF.router_pool(torch.zeros(2, 17, 32), torch.zeros(1, 32), (), (), (), (), 5)
