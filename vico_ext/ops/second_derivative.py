"""What the backward ops say to those who differentiate them again: torch would warn, and give zeros."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


def refuse_second_derivative(*names: str) -> None:
    """Makes the backward ops ``vico::<name>`` raise NotImplementedError when a gradient is taken through them."""
    for name in names:

        def refuse(ctx: Any, *_: Any, name: str = name) -> NoReturn:
            raise NotImplementedError(
                f"vico::{name} has no derivative: the ops of vico_ext have first derivatives only. For second ones use "
                "vico_ext.reference, which is plain PyTorch"
            )

        torch.library.register_autograd(f"vico::{name}", refuse)
