"""The kernels of the consistency loss on one chunk of the vocabulary, as the loss composes them."""

from __future__ import annotations

import pytest
import torch
from device import DEVICE

from vico_ext import _C

BETAS = {"forward": 0.0, "reverse": 1.0, "mixture": 0.3}


def test_opcheck_of_the_kernels():
    policy, reference_, state = torch.randn(3, 11), torch.randn(3, 11), torch.zeros(3, 6, dtype=torch.float64)
    state[:, 0:4:2] = -torch.inf
    ops = torch.ops.vico
    torch.library.opcheck(
        ops.consistency_statistics_.default, (policy, reference_, state, torch.randn(11), None, 0.5, 2.0)
    )
    ops.consistency_statistics_(policy, reference_, state, None, None, 0.5, 1.0)
    torch.library.opcheck(ops.consistency_mixture_.default, (policy, reference_, state, 0.5))
    torch.library.opcheck(ops.consistency_gradient_.default, (policy, reference_, state, 0.5, 2.0))
    torch.library.opcheck(ops.consistency_result.default, (state, 0.5))


@pytest.mark.skipif(DEVICE == "cpu" and _C.cuda != "host", reason="for CUDA kernels")
@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("words", [44, 48])
def test_gradient_in_16_bits(kind, dtype, words):
    policy, reference_, state = torch.randn(3, words), torch.randn(3, words), torch.zeros(3, 6, dtype=torch.float64)
    state[:, 0:4:2] = -torch.inf
    ops, beta = torch.ops.vico, BETAS[kind]
    ops.consistency_statistics_(policy, reference_, state, None, None, beta, 1.0)
    if 0 < beta < 1:
        ops.consistency_mixture_(policy, reference_, state, beta)
    out, logits = torch.empty(3, words, dtype=dtype), policy.clone()
    ops.consistency_gradient_(policy, reference_, state, beta, 1.0, out)
    assert policy.equal(logits)
    ops.consistency_gradient_(policy, reference_, state, beta, 1.0)
    assert out.equal(policy.to(dtype))
    for bad, message in (
        (out.float(), "out must be bfloat16 or float16 beside float32 policy, got float32 beside float32"),
        (out[:, 1:], r"out must have shape \[rows, words\] = \[3, \d+\], got"),
        (out.t().contiguous().t(), "out must be contiguous"),
        (policy.view(-1).view(dtype)[: 3 * words].view(3, words), "out must share no memory with policy or reference"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.consistency_gradient_(policy, reference_, state, beta, 1.0, bad)


@pytest.mark.skipif(DEVICE != "cpu" or _C.cuda == "host", reason="about the CPU")
def test_gradient_of_the_cpu_stays_in_place():
    policy, state = torch.randn(3, 11), torch.zeros(3, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="out is for CUDA alone"):
        torch.ops.vico.consistency_gradient_(policy, policy.clone(), state, 0.0, 1.0, policy.bfloat16())
