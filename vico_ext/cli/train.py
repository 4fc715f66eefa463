"""``vico train``: the two stages of ViCO."""

from __future__ import annotations

import argparse
from typing import Any

from vico_ext.cli.options import add_options, given_options, require_training

__all__ = ["DESCRIPTION", "EPILOG", "SUMMARY", "add_arguments", "run"]

SUMMARY = "train Flash from an InternVL: consistency, then router"
DESCRIPTION = """\
Trains ViCO. Stage 1, consistency: with a random rate per tile the model learns to answer as it did with every tile
whole. Stage 2, router: it learns which tiles lose little at 64 tokens. Each writes OUT/model, a Flash checkpoint.
"""
EPILOG = """\
examples:
  vico train consistency --model InternVL3_5-1B-HF --data chats.jsonl --out runs/stage1
  vico train router --model runs/stage1/model --reference InternVL3_5-1B-HF --data chats.jsonl --out runs/stage2
  accelerate launch --num_processes 8 -m vico_ext train consistency --config stage1.yaml

Run it again with the same OUT to go on after an interruption: the result is the same. docs/training.md has the data
format and says what the options mean.

exit status: 0 done; 2 not done, one line says why.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from vico_ext.training.options import ConsistencyOptions, RouterOptions

    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE", title="stages")
    kinds: dict[str, tuple[type, str]] = {
        "consistency": (ConsistencyOptions, "stage 1: answers with few visual tokens as with all"),
        "router": (RouterOptions, "stage 2: which tiles can do with 64"),
    }
    for name, (kind, summary) in kinds.items():
        stage = stages.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_options(stage, kind)
        # SUPPRESS: or the default would overwrite a --debug given before the stage
        stage.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error happened"
        )
        stage.set_defaults(kind=kind)


def run(args: argparse.Namespace) -> int:
    require_training()
    from accelerate import PartialState
    from transformers.utils import logging

    from vico_ext.training.trainer import train

    logging.set_verbosity_error()
    options: Any = given_options(args, args.kind)
    if options.tensorboard:
        _require_tensorboard()
    model = train(options)
    if PartialState().is_main_process:
        print(f"Trained model: {model}")
    return 0


def _require_tensorboard() -> None:
    from importlib.util import find_spec

    from vico_ext.cli.errors import CliError

    if find_spec("tensorboard") is None:
        raise CliError("TensorBoard is missing: pip install 'vico_ext[train]', or --tensorboard false")
