"""vico_ext: dynamic visual resolution (ViCO, InternVL3.5-Flash) for PyTorch."""

# isort: off
from vico_ext import _load, ops  # noqa: F401  (first: loads the compiled ops, or says why it cannot)
from vico_ext import functional, reference
from vico_ext.checkpoint import FlashCheckpointError, FlashWeights, load_flash, save_flash
from vico_ext.integrations import load_internvl, patch_internvl, unpatch_internvl
from vico_ext.modules import ConsistencyLoss, FusedConnector, VisualResolutionRouter
from vico_ext.routing import (
    BudgetPolicy,
    PerImagePolicy,
    ReleasedPolicy,
    RoutingPlan,
    RoutingPolicy,
    ThresholdPolicy,
    plan_routing,
)
from vico_ext.tokens import CompressedSequence, compress_sequence, connect_visual_tokens, merge_visual_tokens
# isort: on

__all__ = [
    "BudgetPolicy",
    "CompressedSequence",
    "ConsistencyLoss",
    "FlashCheckpointError",
    "FlashWeights",
    "FusedConnector",
    "PerImagePolicy",
    "ReleasedPolicy",
    "RoutingPlan",
    "RoutingPolicy",
    "ThresholdPolicy",
    "VisualResolutionRouter",
    "compress_sequence",
    "connect_visual_tokens",
    "functional",
    "load_flash",
    "load_internvl",
    "merge_visual_tokens",
    "patch_internvl",
    "plan_routing",
    "reference",
    "save_flash",
    "unpatch_internvl",
]
__version__ = "0.1.0"
