"""Flags of training and evaluation, made from their options' dataclasses; a YAML file comes before them."""

from __future__ import annotations

import argparse
import typing
from dataclasses import MISSING, fields
from typing import Any

__all__ = ["add_options", "given_options", "require_training"]


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """One flag per option, and ``--config``."""
    from vico_ext.training.options import option_type

    parser.add_argument("--config", metavar="YAML", help="options by name; flags win over it")
    for item in fields(kind):
        assert item.default is not MISSING
        wanted = option_type(item, kind)
        several = typing.get_origin(wanted) is tuple
        default = " ".join(map(str, item.default)) if several else item.default
        shown = str(default).lower() if wanted is bool else str(default)
        choices = item.metadata["choices"]
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            dest=f"option_{item.name}",
            default=argparse.SUPPRESS,
            nargs="+" if several else None,
            metavar="|".join(choices) if choices else ("true|false" if wanted is bool else _METAVARS.get(wanted, "X")),
            help=(item.metadata["help"] + (f" ({shown})" if shown else "")).replace("%", "%%"),
        )


_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}


def given_options(args: argparse.Namespace, kind: Any) -> Any:
    """The options: defaults, then the YAML file, then flags."""
    from vico_ext.training.options import build_options, read_yaml

    flags = {name.removeprefix("option_"): value for name, value in vars(args).items() if name.startswith("option_")}
    return build_options(kind, read_yaml(args.config) if args.config else {}, flags)


def require_training() -> None:
    """Says what to install where an optional dependency is missing."""
    from importlib.util import find_spec

    from vico_ext.cli.errors import CliError

    names = {
        "PIL": "pillow",
        "transformers": "transformers",
        "tqdm": "tqdm",
        "accelerate": "accelerate",
        "yaml": "pyyaml",
    }
    missing = [package for module, package in names.items() if find_spec(module) is None]
    if missing:
        raise CliError(f"this command needs {', '.join(missing)}: pip install 'vico_ext[train]'")
