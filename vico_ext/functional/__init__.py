"""Functions on tensors: what the modules are made of. Shapes: P tiles, N tokens per tile, V ViT width, H LLM width."""

from vico_ext.functional.connector import bias_gelu, connector, pack_tokens
from vico_ext.functional.shuffle import normalized_shuffle, pixel_shuffle

__all__ = ["bias_gelu", "connector", "normalized_shuffle", "pack_tokens", "pixel_shuffle"]
