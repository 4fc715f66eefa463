"""Puts a run's models where the project ships them: ``python -m reproduce.ship runs/reproduce``.

The trained model of the first seed goes to ``vico_ext/data/small`` with a page of each family, for ``vico demo``; the
reference to ``reproduce/reference``, for ``make reproduce-fast``; both in bfloat16. The figures in ``made.json`` are
measured on the files as they ship. The report and its pictures go to ``docs/reproduction``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from reproduce import SHIPPED_REFERENCE
from reproduce.evaluate import kept_share, read_pages
from reproduce.stages import TILES, flags
from vico_ext.training.models import load_model, tokens_per_tile

__all__ = ["SMALL", "main"]

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "vico_ext" / "data" / "small"


def copy_model(source: Path, target: Path) -> None:
    """A checkpoint folder with its weights in bfloat16."""
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.safetensors"):
        old.unlink()
    for path in source.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, target)
    # The name that transformers 4 and 5 both know; 5 writes one that 4 does not.
    named = target / "tokenizer_config.json"
    about = json.loads(named.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    named.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    weights = load_file(source / "model.safetensors")
    path = target / "model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in weights.items()}, path, {"format": "pt"})
    path.chmod(0o644)


def copy_pages(test: Path, target: Path) -> None:
    """The first test page of each family, with its questions."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    lines = [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()]
    first = {line["family"]: line["image"] for line in reversed(lines)}
    kept = []
    for line in lines:
        if line["image"] == first[line["family"]]:
            name = Path(line["image"]).name
            shutil.copy(test.parent / line["image"], target / name)
            kept.append({**line, "image": name})
    (target / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def measure(model: Path, reference: Path, test: Path, threshold: float) -> dict[str, float]:
    """Of the shipped files: the score by ``vico eval``, and the share of visual tokens, counted once per page."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "model": model, "reference": reference, "data": test, "out": folder, "micro_batch": 64,
            "throughput_seconds": 0, "attention": "eager", **TILES,
        }  # fmt: skip
        command = [sys.executable, "-m", "vico_ext", "eval", *flags(options), "--policies", f"threshold:{threshold}"]
        subprocess.run(command, check=True)
        routed = json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))["routings"]
    loaded, _ = load_model(model, torch.float32, 0)
    compress = read_pages(loaded.eval(), model, test).p >= threshold
    score = routed[f"threshold:{threshold}"]["score"]
    return {"score": score, "tokens_kept": kept_share(compress, tokens_per_tile(loaded.config))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reproduce.ship", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a finished reproduction")
    args = parser.parse_args()
    seed = min(args.run.glob("seed-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    results = json.loads((seed / "results.json").read_text(encoding="utf-8"))
    threshold = round(results["chosen"]["threshold"], 4)
    copy_model(args.run / "reference" / "model", SHIPPED_REFERENCE)
    copy_model(seed / "stage2" / "model", SMALL)
    test = args.run / "test" / "data.jsonl"
    copy_pages(test, SMALL / "pages")
    found = measure(SMALL, SHIPPED_REFERENCE, test, threshold)
    reference = results["routings"]["reference"]["score"]
    figures = {
        "kept_score": found["score"] / reference,
        **found,
        "reference_score": reference,
        "questions": results["questions"],
    }
    made = {
        "commit": results["commit"], "command": results["command"], "seed": results["seed"], "threshold": threshold,
        "figures": {name: round(value, 4) for name, value in figures.items()},
    }  # fmt: skip
    (SMALL / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(made, indent=1))
    record = ROOT / "docs" / "reproduction"
    record.mkdir(parents=True, exist_ok=True)
    for path in [args.run / "report.md", args.run / "summary.json", *args.run.glob("*.png")]:
        shutil.copy(path, record)


if __name__ == "__main__":
    main()
