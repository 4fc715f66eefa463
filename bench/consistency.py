"""The consistency loss, forward and the gradient of the hidden states, at the size of a Qwen3 vocabulary.

There are 256 answer tokens per "tile" of the case. ``released`` is the loss that eager PyTorch computes from the logits
of all tokens, ``compiled`` the same under torch.compile. Liger's fused linear JSD is written in Triton and has no CPU
kernel: it can only be put beside these on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from interleaved import Contenders
from torch import Tensor

from vico_ext import functional as VF

WORDS = 151_936
SMOKE_WORDS = 2_000


def eager(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    log_q = F.linear(hidden, weight).log_softmax(-1)
    log_p = F.linear(ref_hidden, ref_weight).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(hidden)


def consistency_loss(width: int, tiles: int, words: int, compiled: Callable[..., Callable]) -> Contenders:
    hidden = torch.randn(256 * tiles, width, requires_grad=True)
    weight = torch.randn(words, width) * width**-0.5 * 3
    ref_hidden = hidden.detach() + 0.3 * torch.randn_like(hidden)
    twin = compiled(eager)

    def run(loss: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(loss(hidden, weight, ref_hidden, weight), hidden)

    return {
        "released": run(eager),
        "compiled": run(twin),
        "vico_ext": run(lambda *tensors: VF.consistency_loss(*tensors).loss),
    }
