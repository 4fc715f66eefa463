"""The benchmarks of a GPU: bf16, 32 tiles, cold L2, against what the same GPU copies and multiplies in the same run.

    python bench/gpu/measure.py --out bench/results/gpu.json

Writes the record after every case, so a run that is cut short leaves what it has. ``--device cpu --smoke`` runs every
case once at a tiny size, to show that it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from timing import Timer, ceilings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cases
import kernels
import whole
from cases import B1, B8, SMOKE, Case, Size

import vico_ext
from vico_ext import _C

ROOT = Path(__file__).resolve().parents[2]
V1024, V3200 = B1, Size("38B", 3200, 5120)


@dataclass(frozen=True)
class Measured:
    """A case and how it is timed."""

    case: Case
    queued: bool = False  # an op: the device's time, without the host's for calling it
    least: Callable[[Size, int], float] | None = None  # bytes that must be moved, by size and tiles


def shuffled(size: Size, tiles: int) -> float:
    return 2 * 2 * 1024 * size.vit * tiles  # each of 1024 tokens once in, once out, 2 bytes per element


def activations(size: Size, tiles: int) -> float:
    return 2 * 2 * 256 * size.llm * tiles  # the rows of the first Linear


def shuffled_back(size: Size, tiles: int) -> float:
    return 1.5 * shuffled(size, tiles)  # tokens and gradient in, gradient out


def tokens_read(size: Size, tiles: int) -> float:
    return 2 * 1024 * size.vit * tiles


def weight_read(size: Size, tiles: int) -> float:
    return 2 * 4 * size.vit * size.vit


def op(case: Case, least: Callable[[Size, int], float] | None = None) -> Measured:
    return Measured(case, True, least)


# Those with a target first: a run may be short of time.
CASES = [
    Measured(Case("visual_side", B8, 32, cases.visual_side, memory=True)),
    Measured(Case("gemms", B8, 32, whole.gemms)),
    Measured(Case("visual_side", B1, 32, cases.visual_side, memory=True)),
    Measured(Case("gemms", B1, 32, whole.gemms)),
    Measured(Case("visual_side_graph", B8, 32, whole.visual_side_graph, rounds=15)),
    Measured(Case("visual_side_graph", B1, 32, whole.visual_side_graph, rounds=15)),
    Measured(Case("visual_side_graph", B1, 1, whole.visual_side_graph, rounds=31)),
    Measured(Case("visual_side_graph", B8, 1, whole.visual_side_graph, rounds=31)),
    Measured(Case("connectors_training", B8, 32, whole.connectors_training, rounds=9, memory=True)),
    Measured(Case("first_token", B8, 24, whole.first_token, rounds=7)),
    op(Case("projection", B8, 32, whole.projection, rounds=21)),
    op(Case("projection", V3200, 32, whole.projection, rounds=21)),
    op(Case("normalized_shuffle_2x2", B8, 32, cases.normalized_shuffle(2), rounds=31), shuffled),
    op(Case("normalized_shuffle_4x4", B8, 32, cases.normalized_shuffle(4), rounds=31), shuffled),
    op(Case("normalized_shuffle_2x2", V3200, 32, cases.normalized_shuffle(2), rounds=31), shuffled),
    op(
        Case("normalized_shuffle_backward_2x2", B8, 32, kernels.normalized_shuffle_backward(2), rounds=31),
        shuffled_back,
    ),
    op(
        Case("normalized_shuffle_backward_4x4", B8, 32, kernels.normalized_shuffle_backward(4), rounds=31),
        shuffled_back,
    ),
    op(Case("shuffle_statistics_2x2", B8, 32, kernels.shuffle_statistics(2), rounds=31), tokens_read),
    op(Case("shuffle_statistics_4x4", B8, 32, kernels.shuffle_statistics(4), rounds=31), tokens_read),
    op(Case("pixel_shuffle_2x2", B8, 32, cases.shuffle(2), rounds=31), shuffled),
    op(Case("bias_gelu", B8, 32, cases.bias_gelu(), rounds=31), activations),
    op(
        Case("bias_gelu_backward", B8, 32, kernels.bias_gelu_backward, rounds=31),
        lambda size, tiles: 1.5 * activations(size, tiles),
    ),
    op(Case("bias_gelu_training", B8, 32, cases.bias_gelu(training=True), rounds=15)),
    Measured(Case("router", V1024, 32, cases.router, rounds=15)),
    Measured(Case("router", V3200, 32, cases.router, rounds=9)),
    Measured(Case("router_graph", V1024, 32, whole.router_graph, rounds=15)),
    Measured(Case("router_graph", V3200, 32, whole.router_graph, rounds=9)),
    op(Case("attention_pool", V1024, 32, cases.attention_pool, rounds=31), tokens_read),
    op(Case("attention_pool", V3200, 32, cases.attention_pool, rounds=31), tokens_read),
    op(Case("attention_pool", V1024, 1, cases.attention_pool, rounds=31), tokens_read),
    op(Case("skinny_linear", V1024, 32, whole.skinny_linear, rounds=31), weight_read),
    op(Case("connectors", B8, 32, whole.connectors, rounds=15)),
    op(Case("connectors_into_prompt", B8, 32, whole.connectors_into_prompt, rounds=15)),
    op(Case("tile_rows", B8, 32, kernels.tile_rows, rounds=31)),
    Measured(Case("consistency_loss_training", B8, 16, cases.consistency_loss, rounds=5, memory=True)),
    op(Case("keep_placeholders", B8, 32, kernels.keep_placeholders, rounds=31)),
    op(Case("compress_sequence", B8, 32, kernels.compress_sequence, rounds=31)),
    Measured(Case("merge", B8, 32, cases.merge, rounds=21)),
    Measured(Case("plan", B8, 32, cases.plan, rounds=31)),
]


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip()


def certificate(device: str) -> dict[str, Any]:
    """What the numbers were measured on and with; no host's name."""
    sent = os.environ.get("VICO_COMMIT")
    facts: dict[str, Any] = {
        "vico_ext": vico_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": _C.cuda,
        "compiler": _C.compiler,
        # Where the sources travel without their repository, or beside an older one, the sender says which they are.
        "commit": sent or git("rev-parse", "HEAD") or "unknown",
        "uncommitted": not sent and bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]).replace(f"{ROOT}/", ""),
        "dtype": "bfloat16",
        "device": "CPU",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False)
        facts |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver_and_clocks": driver.stdout.strip() or "unknown",
        }
    return facts


def run_case(measured: Measured, timer: Timer, smoke: bool) -> dict[str, Any]:
    torch._dynamo.reset()  # each case compiles for its own sizes
    torch.manual_seed(0)
    case = measured.case
    size, rounds = (SMOKE, 2) if smoke else (case.size, case.rounds)
    # Not torch.set_default_device: that would cost every call, of every contender, microseconds of the host.
    with torch.device(timer.device):
        contenders = case.build(size, case.tiles)
    if smoke:
        for name in ("compiled", "reduce_overhead"):
            contenders.pop(name, None)
    entry: dict[str, Any] = {"case": case.name, "size": case.size.name, "tiles": case.tiles, "queued": measured.queued}
    if measured.least is not None:  # a copy that moves as many bytes, among the contenders
        source = torch.ones(int(measured.least(size, case.tiles)) // 2, dtype=torch.uint8, device=timer.device)
        target = torch.empty_like(source)
        contenders = {"copy": lambda: target.copy_(source), **contenders}
    entry["times"] = timer.compare(contenders, rounds, measured.queued)
    if measured.least is not None:
        entry["of_copy_bandwidth"] = entry["times"]["copy"]["p50"] / entry["times"]["vico_ext"]["p50"]
    if case.memory:
        entry["peak_bytes"] = timer.peak_bytes(contenders)
    return entry


def chosen(names: list[str]) -> Iterator[Measured]:
    yield from (m for m in CASES if not names or m.case.name in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of cases; all of them by default")
    parser.add_argument("--out", type=Path, required=True, help="the JSON record")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="every case once, tiny, without torch.compile")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after this time")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device: run on a machine with a GPU, or with --device cpu --smoke", file=sys.stderr)
        return 1
    end = time.monotonic() + args.seconds
    torch.set_default_dtype(torch.bfloat16)
    timer = Timer(args.device)
    record: dict[str, Any] = {
        "certificate": certificate(args.device),
        "smoke": args.smoke,
        "results": [],
        "skipped": {},
    }
    record["ceilings"] = ceilings(timer, args.smoke)
    failed = False

    def save() -> None:
        partial = args.out.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(args.out)

    for measured in chosen(args.cases):
        case = measured.case
        if time.monotonic() > end:
            record["skipped"][case.id] = "no time left"
            save()
            continue
        start = time.monotonic()
        try:
            entry = run_case(measured, timer, args.smoke)
        except Exception as error:  # the other cases are worth having; this one is reported and fails the run
            record["skipped"][case.id] = f"{type(error).__name__}: {error}"[:500]
            failed = True
            print(f"{case.id}: FAILED: {record['skipped'][case.id]}", flush=True)
        else:
            record["results"].append(entry)
            times = ", ".join(f"{name} {t['p50'] * 1e3:.3f} ms" for name, t in entry["times"].items())
            print(f"{case.id} ({time.monotonic() - start:.0f} s): {times}", flush=True)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        save()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
