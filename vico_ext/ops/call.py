"""How the functions call an op: past its gradient formula where no gradient is recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["call", "refuse_gradient"]

# What torch.library itself steps below its formulas with.
_BelowAutograd: Any = torch._C._AutoDispatchBelowAutograd


def call(op: Any, *args: Any) -> Any:
    """``op(*args)``.

    A gradient formula written in Python is entered for every call, if only to find that there is nothing to record: 10
    to 20 microseconds of the host, more than many of the kernels take. Compilers trace the plain call.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with _BelowAutograd():
        return op(*args)


def refuse_gradient(what: str, instead: str, **tensors: Tensor | None) -> None:
    """Raises ValueError where an op that has no gradient would lose one that torch is recording.

    ``what`` the function does, ``instead`` what is differentiable; ``tensors`` under the names the user knows.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values()):
        *names, last = tensors
        among = f"{', '.join(names)} or {last} require" if names else f"{last} requires"
        raise ValueError(f"{what} and has no gradient, but {among} one: use {instead}, or torch.no_grad()")
