"""Modules: parameters under the released checkpoints' names, and a forward made of ``vico_ext.functional``."""

from vico_ext.modules.connector import FusedConnector

__all__ = ["FusedConnector"]
