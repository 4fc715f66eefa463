"""vico_ext: dynamic visual resolution (ViCO, InternVL3.5-Flash) for PyTorch."""

# isort: off
from vico_ext import _load, ops  # noqa: F401  (first: loads the compiled ops, or says why it cannot)
from vico_ext import functional, reference
from vico_ext.checkpoint import FlashCheckpointError, FlashWeights, load_flash, save_flash
from vico_ext.modules import FusedConnector
# isort: on

__all__ = [
    "FlashCheckpointError",
    "FlashWeights",
    "FusedConnector",
    "functional",
    "load_flash",
    "reference",
    "save_flash",
]
__version__ = "0.1.0"
