"""``vico eval``: what routing costs and saves on data with answers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vico_ext.cli.options import add_options, given_options, require_training
from vico_ext.cli.policies import FORMS

__all__ = ["DESCRIPTION", "EPILOG", "SUMMARY", "add_arguments", "run"]

SUMMARY = "score, divergence and speed of a Flash model under several routings"
DESCRIPTION = """\
Runs a Flash model over conversations with all tiles whole, all compressed, routed by policies of the router, and routed
at random at the same budgets. A table, and OUT/report.json.
"""
EPILOG = f"""\
{FORMS}
examples:
  vico eval --model runs/stage2/model --reference InternVL3_5-1B-HF --data test.jsonl --out runs/eval
  vico eval --config eval.yaml --policies threshold:0.5 budget:40% --throughput-batches 1 32

score: share of conversations all of whose answer tokens are the most likely ones given those before, which is when
greedy decoding would give exactly those answers. loss: cross-entropy. kl: KL(reference, model). Per conversation, then
the mean.

exit status: 0 done; 1 done, but some lines were left out (see report.json); 2 not done, one line says why.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from vico_ext.training.options import EvalOptions

    add_options(parser, EvalOptions)


def run(args: argparse.Namespace) -> int:
    require_training()
    import torch
    from tqdm import tqdm
    from transformers.utils import logging

    from vico_ext.checkpoint import CheckpointFiles
    from vico_ext.cli.errors import CliError
    from vico_ext.cli.policies import parse_policy
    from vico_ext.cli.report import write_json
    from vico_ext.cli.versions import versions
    from vico_ext.training.evaluation import Evaluation
    from vico_ext.training.models import load_model
    from vico_ext.training.options import EvalOptions, to_dict
    from vico_ext.training.setup import load_dtype, load_reference, read_data

    logging.set_verbosity_error()
    options: EvalOptions = given_options(args, EvalOptions)
    try:
        specs = [parse_policy(text) for text in options.policies]
    except argparse.ArgumentTypeError as error:
        raise CliError(f"policies: {error}") from error
    config = CheckpointFiles(options.model).config()
    policies = {spec.text: spec.build(config) for spec in specs}
    model, has_flash = load_model(options.model, load_dtype(options), options.seed, options.attention)
    if not has_flash:
        raise CliError(f"{options.model} has no router: train one with `vico train`")
    samples = read_data(options, model.config, measure=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    reference = load_reference(model, options.reference, load_dtype(options), options.attention).to(device)
    bar: Any = tqdm(unit="batch", disable=None)

    def progress(name: str, done: int, total: int) -> None:
        if done == 1:
            bar.reset(total=total)
            bar.set_description(name)
        bar.update(1)

    evaluation = Evaluation(model, reference, samples, policies, options, progress)
    routings = evaluation.run()
    bar.close()
    _stop_on(evaluation.problems, options)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    problems = [{"kind": p.kind, "line": p.line, "message": p.message} for p in evaluation.problems]
    report = {
        "command": "vico eval",
        "versions": versions(),
        "options": to_dict(options),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "routings": routings,
        "left_out": problems,
    }
    write_json(out / "report.json", report)
    _print(routings, options)
    if problems:
        print(f"{len(problems)} lines were left out: the first, {evaluation.problems[0]}")
    print(f"{out / 'report.json'} has all of it, and each family.")
    return 1 if problems else 0


def _stop_on(problems: Any, options: Any) -> None:
    from vico_ext.cli.errors import CliError

    for kind, option in (("record", "on_bad_record"), ("image", "on_unreadable_image")):
        found = [problem for problem in problems if problem.kind == kind]
        if found and getattr(options, option) == "stop":
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise CliError(f"{options.data}: {found[0]}{more}. --{option.replace('_', '-')} skip goes on without")


def _print(routings: dict[str, Any], options: Any) -> None:
    from vico_ext.cli.report import table

    sizes = [str(size) for size in options.throughput_batches] if options.throughput_seconds else []
    header = ["routing", "score", "loss", "KL", "tokens kept", "tiles compressed", *(f"prompts/s x{s}" for s in sizes)]
    rows = []
    for name, entry in routings.items():
        speed = entry["first_token_prompts_per_s"]
        rows.append(
            [
                name,
                f"{entry['score']:.1%}",
                f"{entry['loss']:.4f}",
                f"{entry['kl']:.4f}",
                f"{entry['tokens_kept']:.1%}",
                f"{entry['tiles_compressed']:.1%}",
                *(f"{speed[s]:.2f}" if s in speed else "" for s in sizes),
            ]
        )
    print(table(header, rows))
