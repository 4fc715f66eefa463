"""Functions on tensors: what the modules are made of. Shapes: P tiles, N tokens per tile, V ViT width, H LLM width."""

from vico_ext.functional.router import attention_pool, router_gate, router_pool, skinny_linear
from vico_ext.functional.shuffle import pixel_shuffle

__all__ = ["attention_pool", "pixel_shuffle", "router_gate", "router_pool", "skinny_linear"]
