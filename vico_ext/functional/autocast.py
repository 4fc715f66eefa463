"""What autocast does to the operands of torch's matrix products, for products of our own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cast_for_product", "product_dtype"]


def product_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which torch's own matrix products would take the tensor: autocast's, but float64 stays."""
    device = t.device.type
    if t.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return t.dtype
    return torch.get_autocast_dtype(device)


def cast_for_product(t: Tensor) -> Tensor:
    """The tensor as torch's own matrix products would take it: cast under autocast, float64 left alone."""
    return t.to(product_dtype(t))
