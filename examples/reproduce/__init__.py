"""A small InternVL trained with ViCO from nothing, to watch the whole recipe work: ``python -m reproduce.run``."""

from pathlib import Path

__all__ = ["SHIPPED_REFERENCE"]

SHIPPED_REFERENCE = Path(__file__).with_name("reference")
