"""Fake kernels and gradients of the compiled ops (``torch.ops.vico``), one module per op.

Schemas are in ``csrc/registration.cpp``. Everything a user calls is in ``vico_ext.functional``.
"""

from vico_ext.ops import (
    attention_pool,
    bias_gelu,
    compress_sequence,
    consistency,
    merge_tokens,
    normalized_shuffle,
    pack_tokens,
    pixel_shuffle,
    projection,
    router_gate,
    router_pool,
    routing_plan,
    shuffled_projection,
    skinny_linear,
)

__all__ = [
    "attention_pool",
    "bias_gelu",
    "compress_sequence",
    "consistency",
    "merge_tokens",
    "normalized_shuffle",
    "pack_tokens",
    "pixel_shuffle",
    "projection",
    "router_gate",
    "router_pool",
    "routing_plan",
    "shuffled_projection",
    "skinny_linear",
]
