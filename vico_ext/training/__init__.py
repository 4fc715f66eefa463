"""Training of ViCO: consistency (stage 1), router (stage 2), evaluation. Needs ``pip install 'vico_ext[train]'``."""

from vico_ext.training.options import ConsistencyOptions, EvalOptions, RouterOptions, build_options, read_yaml

__all__ = ["ConsistencyOptions", "EvalOptions", "RouterOptions", "build_options", "read_yaml"]
