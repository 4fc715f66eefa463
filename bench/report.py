"""Writes the benchmark tables from the recorded runs: the CPU's into README.md, the GPU's into docs/gpu.md.

`--check` fails if they differ from the records.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gpu_report import gpu_table

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench" / "results" / "cpu.json"
GPU_RECORDS = "gpu*.json"  # gpu.json as `make gpu` writes it; records of other cards or commits under longer names
README, GPU_PAGE = ROOT / "README.md", ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- benchmarks: written by bench/report.py -->", "<!-- benchmarks: end -->"
HEADER = (
    "| case | size | tiles | released | compiled | routed | vico_ext | × released | × compiled | × routed "
    "| peak memory, of released |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def milliseconds(times: dict[str, dict[str, float]], name: str) -> str:
    if name not in times:
        return "–"
    p20, p50, p80 = (times[name][k] * 1e3 for k in ("p20", "p50", "p80"))
    digits = 3 if p50 < 1 else 1 if p50 < 100 else 0
    return f"{p50:.{digits}f} ({p20:.{digits}f}–{p80:.{digits}f})"


def ratio(times: dict[str, dict[str, float]], name: str) -> str:
    return f"{times[name]['p50'] / times['vico_ext']['p50']:.2f}" if name in times else "–"


def row(entry: dict[str, Any]) -> str:
    info = entry["extra_info"]
    times = info["times"]
    peak = info.get("peak_bytes")
    memory = f"{peak['vico_ext'] / 2**20:.0f} MiB, {peak['vico_ext'] / peak['released']:.2f}×" if peak else "–"
    cells = [info["case"], info["size"], str(info["tiles"])]
    cells += [milliseconds(times, name) for name in ("released", "compiled", "routed", "vico_ext")]
    cells += [ratio(times, name) for name in ("released", "compiled", "routed")]
    return "| " + " | ".join([*cells, memory]) + " |"


def certificate(record: dict[str, Any]) -> str:
    machine, commit = record["machine_info"], record["commit_info"]
    dirty = ", with uncommitted changes" if commit["dirty"] else ""
    return (
        "Milliseconds, median (p20–p80), contenders interleaved in one process; × is the contender's median over ours. "
        f"{machine['cpu']['brand_raw']}, {machine['torch_threads']} threads, {machine['kernels']} kernels, "
        f"torch {machine['torch']}, Python {machine['python']}, {machine['compiler']}; fp32; commit "
        f"{commit['id'][:10]}{dirty}, {record['datetime'][:10]}; "
        f"[`bench/results/cpu.json`](bench/results/cpu.json), `make bench`."
    )


def tables(record: dict[str, Any]) -> str:
    rows = "\n".join(row(entry) for entry in record["benchmarks"])
    return f"{BEGIN}\n{certificate(record)}\n\n{HEADER}\n{rows}\n{END}"


def update(page: Path, tables: str, *, check: bool) -> bool:
    """Puts `tables` into their place in the page, or checks that they are there."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        print(f"{page.name} has no place for the tables: it needs the lines {BEGIN!r} and {END!r}", file=sys.stderr)
        return False
    updated = before + tables + after
    if check and updated != text:
        print(f"{page.name} does not match bench/results: run `make bench-report`", file=sys.stderr)
        return False
    if not check:
        page.write_text(updated)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is not up to date")
    parser.add_argument("--show-gpu", type=Path, metavar="RECORD", help="print the table of this GPU record, no more")
    args = parser.parse_args()
    if args.show_gpu:
        print(gpu_table(json.loads(args.show_gpu.read_text())))
        return 0
    gpu_records = [json.loads(path.read_text()) for path in sorted(RECORD.parent.glob(GPU_RECORDS))]
    gpu_tables = "\n\n".join(map(gpu_table, gpu_records or [None]))
    pages = [
        update(README, tables(json.loads(RECORD.read_text())), check=args.check),
        update(GPU_PAGE, f"{BEGIN}\n{gpu_tables}\n{END}", check=args.check),
    ]
    return 0 if all(pages) else 1


if __name__ == "__main__":
    sys.exit(main())
