"""``vico convert``: a Flash checkpoint from the released layout to transformers', and back."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "rewrite a Flash checkpoint for transformers, or back into the released layout"
DESCRIPTION = """\
Rewrites an InternVL Flash checkpoint under the names and the configuration of the other layout: the released one of the
custom code, or transformers' (for vico_ext.load_internvl). No value changes; every tensor is read back and compared.

Works shard by shard, with at most one in memory. Stopped in the middle it leaves nothing that loads; the same command
goes on where it was.
"""
EPILOG = """\
examples:
  vico convert InternVL3_5-8B-Flash InternVL3_5-8B-Flash-HF
  vico convert fine-tuned InternVL3_5-8B-Flash-mine --to released

Tokenizer and other files beside the tensors are copied; Python files are not. The custom code that runs a released
checkpoint, and the processor that transformers wants, are those of the original repositories.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="checkpoint folder")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to write")
    parser.add_argument("--to", choices=("hf", "released"), help="the layout to write (the one SOURCE does not have)")
    parser.add_argument(
        "--image-token-id", type=int, metavar="ID", help="id of <IMG_CONTEXT> (from SOURCE's tokenizer files)"
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="largest file, such as 5GB (as large as SOURCE's largest)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that TARGET holds")


def run(args: argparse.Namespace) -> int:
    from vico_ext.checkpoint import convert_checkpoint

    done = convert_checkpoint(
        args.source,
        args.target,
        args.to,
        image_token_id=args.image_token_id,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        progress=print,
    )
    again = f", {done.resumed} of them from an earlier run" if done.resumed else ""
    layout = "transformers" if done.to == "hf" else "released"
    print(f"{done.path}: {done.tensors} tensors in the {layout} layout, all compared; {done.shards} files{again}")
    return 0
