"""The one place where the host waits for the device: a number that decides how large a tensor is."""

from __future__ import annotations

from typing import cast

from torch import Tensor

__all__ = ["size_on_host"]


def size_on_host(count: Tensor) -> int:
    """A device's number ``count`` [] as an int.

    On an accelerator this waits until the number has been computed, and cannot be captured in a CUDA graph. Two callers
    need it: a plan, for how many tiles its policy compressed (not where :meth:`RoutingPolicy.compressed_tiles` knows),
    and :func:`vico_ext.compress_sequence`, for the longest row (not where ``length`` is given, nor for a single row
    without a mask). Nothing else between the ViT's tokens and ``inputs_embeds`` reads a tensor's values on the host.
    """
    # NOTE: not int(count), which torch.export takes for a number to be known when it traces.
    return cast(int, count.item())
