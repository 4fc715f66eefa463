"""Functions on tensors: what the modules are made of. Shapes: P tiles, N tokens per tile, V ViT width, H LLM width."""

from vico_ext.functional.bias_gelu import bias_gelu
from vico_ext.functional.connector import connector
from vico_ext.functional.consistency import ConsistencyLossOutput, consistency_loss
from vico_ext.functional.folded import FoldedLinear, FoldedWeights, fold_layer_norm
from vico_ext.functional.pack import Destination, pack_tokens, pack_tokens_
from vico_ext.functional.router import attention_pool, router_gate, router_pool, skinny_linear
from vico_ext.functional.routing import budget_route, checked_probabilities, plan_tokens, released_route
from vico_ext.functional.shuffle import normalized_shuffle, pixel_shuffle
from vico_ext.functional.tokens import (
    compress_positions,
    gather_tokens,
    keep_placeholders,
    merge_tokens,
    renumber_positions,
    scatter_tokens,
    scatter_tokens_,
    text_rows,
    tile_rows,
)

__all__ = [
    "ConsistencyLossOutput",
    "Destination",
    "FoldedLinear",
    "FoldedWeights",
    "attention_pool",
    "bias_gelu",
    "budget_route",
    "checked_probabilities",
    "compress_positions",
    "connector",
    "consistency_loss",
    "fold_layer_norm",
    "gather_tokens",
    "keep_placeholders",
    "merge_tokens",
    "normalized_shuffle",
    "pack_tokens",
    "pack_tokens_",
    "pixel_shuffle",
    "plan_tokens",
    "released_route",
    "renumber_positions",
    "router_gate",
    "router_pool",
    "scatter_tokens",
    "scatter_tokens_",
    "skinny_linear",
    "text_rows",
    "tile_rows",
]
