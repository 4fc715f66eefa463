"""The command ``vico``. Subcommands import what they need when they run, so that ``vico --help`` is quick."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vico_ext.cli import convert, demo, eval, info, route, train
from vico_ext.cli.errors import CliError

__all__ = ["main"]

_DESCRIPTION = """\
Dynamic visual resolution for InternVL: each image tile gets 256 or 64 visual tokens, whichever a router says is enough.

Start here:
  vico demo                                       see it work (a small trained model, no download)
  vico route page.png --model DIR --out routed    which tiles of your image are compressed, with a real checkpoint
  vico train consistency --help                   make a Flash model from your InternVL
  vico convert DIR NEW                            a Flash checkpoint for transformers, or back
  vico info                                       what is installed
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    from vico_ext import __version__

    shared = _Parser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="on an error show where in the program it happened")
    parser = _Parser(
        prog="vico", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"vico_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for module in (info, route, train, eval, convert, demo):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            parents=[shared],
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, prog=command.prog)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    0: done; 1: some images could not be read, the others were done; 2: nothing useful could be done, and one line on
    stderr says why; 130: interrupted; 141: whoever read the output stopped reading. As argparse does, ``--help`` and
    usage errors raise SystemExit.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            args = _parser().parse_args(argv)
        except SystemExit:  # after --help, or a usage error
            print(end="", flush=True)
            raise
        return _run(args)
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has enough: no error. What is left to print goes nowhere, or else
        # Python complains of the closed pipe on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a program that the signal ends


def _run(args: argparse.Namespace) -> int:
    try:
        status = int(args.run(args))
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        print(f"{args.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if args.debug:
            raise
        print(f"{args.prog}: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    """The message on one line; errors nobody foresaw also say their kind, and how to see more."""
    text = " ".join(str(error).split())
    if isinstance(error, CliError | ValueError | OSError | ModuleNotFoundError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text} (--debug shows where)"
