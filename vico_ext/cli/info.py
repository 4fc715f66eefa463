"""``vico info``: versions, ops, CPU and CUDA, what was built."""

from __future__ import annotations

import argparse
import json
import textwrap

SUMMARY = "versions, compiled ops, CPU and CUDA: what to paste into a bug report"
DESCRIPTION = "Says what is installed: versions, how the compiled ops were built, what this machine offers."
EPILOG = """\
examples:
  vico info            for people
  vico info --json     for programs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from vico_ext.cli.versions import build_facts, versions

    facts = {"versions": versions(), **build_facts()}
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, version in facts["versions"].items():
        print(f"{name:<17}{version or 'not installed (optional)'}")
    print(f"{'compiler':<17}{facts['compiler']}")
    print(f"{'instruction set':<17}{facts['instruction_set']}")
    print(f"{'CPU threads':<17}{facts['cpu_threads']}")
    built = f"built for {', '.join(facts['cuda_kernels'])}" if facts["cuda_kernels"] else "not built"
    print(
        f"{'CUDA kernels':<17}{built}; a CUDA device is {'' if facts['cuda_available'] else 'not '}available to torch"
    )
    print(f"{'platform':<17}{facts['platform']}")
    names = textwrap.fill(", ".join(facts["ops"]), 100, initial_indent=" " * 17, subsequent_indent=" " * 17)
    print(f"{'ops':<17}{names.lstrip()}")
    return 0
