from vico_ext.modules.connector import FusedConnector
from vico_ext.modules.consistency import ConsistencyLoss
from vico_ext.modules.router import VisualResolutionRouter

__all__ = [
    "ConsistencyLoss",
    "FusedConnector",
    "VisualResolutionRouter",
]
