"""vico_ext: dynamic visual resolution (ViCO, InternVL3.5-Flash) for PyTorch."""

# isort: off
from vico_ext import _load, ops  # noqa: F401  (first: loads the compiled ops, or says why it cannot)
from vico_ext import functional, reference
from vico_ext.modules import VisualResolutionRouter
# isort: on

__all__ = ["VisualResolutionRouter", "functional", "reference"]
__version__ = "0.1.0"
