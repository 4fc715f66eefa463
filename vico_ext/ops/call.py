"""How the functions call an op: past its gradient formula where no gradient is recorded."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["call"]

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
