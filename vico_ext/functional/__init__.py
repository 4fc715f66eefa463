"""Functions on tensors: what the modules are made of. Shapes: P tiles, N tokens per tile, V ViT width, H LLM width."""

from vico_ext.functional.shuffle import pixel_shuffle

__all__ = ["pixel_shuffle"]
