"""Modules whose ``state_dict`` has the released checkpoints' keys."""

from vico_ext.modules.router import VisualResolutionRouter

__all__ = ["VisualResolutionRouter"]
