"""What ops without a derivative say to those who differentiate them: torch would warn, and give zeros."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


def refuse_derivative(instead: str, *names: str) -> None:
    """Makes the ops ``vico::<name>`` raise NotImplementedError when a gradient is taken through them."""
    for name in names:

        def refuse(ctx: Any, *_: Any, name: str = name) -> NoReturn:
            raise NotImplementedError(f"vico::{name} has no derivative: {instead}")

        torch.library.register_autograd(f"vico::{name}", refuse)


def refuse_second_derivative(*names: str) -> None:
    """The same for the backward ops."""
    refuse_derivative(
        "the ops of vico_ext have first derivatives only. For second ones use vico_ext.reference, which is plain "
        "PyTorch",
        *names,
    )
