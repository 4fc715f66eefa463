"""ViCO inside other libraries' models. Nothing here imports those libraries before it is used."""

from vico_ext.integrations.internvl import load_internvl, patch_internvl, unpatch_internvl
from vico_ext.integrations.report import ImageReport, VicoReport

__all__ = ["ImageReport", "VicoReport", "load_internvl", "patch_internvl", "unpatch_internvl"]
