"""The table of GPU measurements, from the record that bench/gpu/measure.py writes."""

from __future__ import annotations

from typing import Any

__all__ = ["gpu_table"]

HEADER = (
    "| case | size | tiles | released | compiled | routed | vico_ext | × released | × compiled | × routed | note |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
# What an H100 should reach, by case and size.
TARGETS = {
    ("visual_side", "8B"): "≥ 4× released, ≥ 2× compiled, ≤ 1.25× the bare GEMMs",
    ("visual_side", "1B"): "≥ 6× released, ≥ 3× compiled",
    ("visual_side_graph", "1B"): "one tile ≥ 3× released",
    ("visual_side_graph", "8B"): "one tile ≥ 3× released",
    ("connectors_training", "8B"): "≥ 2× released, peak memory ≤ 0.6×",
    ("normalized_shuffle_2x2", "8B"): "≥ 85% of copy bandwidth",
    ("normalized_shuffle_4x4", "8B"): "≥ 85% of copy bandwidth",
    ("normalized_shuffle_2x2", "38B"): "≥ 85% of copy bandwidth",
    ("router_graph", "1B"): "≥ 20× released",
    ("router_graph", "38B"): "≥ 20× released",
    ("projection", "8B"): "≥ 0.95× cuBLAS on the GEMMs, faster than cuBLAS + own epilogue",
    ("projection", "38B"): "≥ 0.95× cuBLAS on the GEMMs, faster than cuBLAS + own epilogue",
    ("first_token", "8B"): "≥ 1.8× the all-256 model, visual side ≤ 2% of the prefill",
}


def _microseconds(times: dict[str, dict[str, float]], name: str) -> str:
    if name not in times:
        return "–"
    p20, p50, p80 = (times[name][k] * 1e6 for k in ("p20", "p50", "p80"))
    return f"{p50:.0f} ({p20:.0f}–{p80:.0f})"


def _ratio(times: dict[str, dict[str, float]], name: str) -> str:
    return f"{times[name]['p50'] / times['vico_ext']['p50']:.2f}" if name in times else "–"


def _note(entry: dict[str, Any], gemms: dict[tuple[str, int], float]) -> str:
    times, notes = entry["times"], []
    ours = times["vico_ext"]["p50"]
    if entry["case"] in ("visual_side", "visual_side_graph") and (entry["size"], entry["tiles"]) in gemms:
        notes.append(f"{ours / gemms[entry['size'], entry['tiles']]:.2f}× the bare GEMMs")
    if "of_copy_bandwidth" in entry:
        kind = "a copy of as many bytes" if "copy" in times else "a copy of 1 GiB"
        notes.append(f"{100 * entry['of_copy_bandwidth']:.0f}% of the bandwidth of {kind}")
    if "gemms" in times:
        notes.append(f"{times['gemms']['p50'] / ours:.2f}× as fast as the bare GEMMs by cuBLAS")
    if "folded" in times:
        notes.append(f"norms folded in {times['folded']['p50'] * 1e6:.0f}")
    if "reduce_overhead" in times:
        notes.append(f"by torch.compile's own graph {times['reduce_overhead']['p50'] * 1e6:.0f}")
    if "eager" in times:
        notes.append(f"without a graph {times['eager']['p50'] * 1e6:.0f}")
    if entry.get("peak_bytes"):
        peak = entry["peak_bytes"]
        notes.append(f"peak memory {peak['vico_ext'] / 2**20:.0f} MiB, {peak['vico_ext'] / peak['released']:.2f}×")
    if "all256" in times:
        shares = [f"{100 * times[name]['p50'] / ours:.1f}%" for name in ("visual", "visual_graph") if name in times]
        notes.append(
            f"{times['all256']['p50'] / ours:.2f}× the all-256 model, visual side {', as a graph '.join(shares)}"
        )
    if (target := TARGETS.get((entry["case"], entry["size"]))) is not None:
        notes.append(f"target {target}")
    return "; ".join(notes) or "–"


def gpu_table(record: dict[str, Any] | None) -> str:
    """The table with its certificate; without a record, what there would be to say."""
    if record is None:
        rows = "\n".join(f"| {case} | {size} | {target} |" for (case, size), target in TARGETS.items())
        return (
            "Not measured on a GPU: there is no `bench/results/gpu.json`; `make gpu` on a GPU machine writes it.\n\n"
            f"| case | size | target on an H100, bf16 |\n|---|---|---|\n{rows}"
        )
    facts, ceiling = record["certificate"], record["ceilings"]
    gemms = {(e["size"], e["tiles"]): e["times"]["vico_ext"]["p50"] for e in record["results"] if e["case"] == "gemms"}
    rows = []
    for entry in record["results"]:
        times = entry["times"]
        cells = [entry["case"], entry["size"], str(entry["tiles"])]
        cells += [_microseconds(times, name) for name in ("released", "compiled", "routed", "vico_ext")]
        cells += [_ratio(times, name) for name in ("released", "compiled", "routed")]
        rows.append("| " + " | ".join([*cells, _note(entry, gemms)]) + " |")
    skipped = "".join(f"\n\nNot measured: `{case}`: {why}." for case, why in record["skipped"].items())
    smoke = "A smoke run at tiny sizes, no measurement. " if record["smoke"] else ""
    certificate = (
        f"{smoke}Microseconds, median (p20–p80), contenders interleaved, cold L2; × is their median over ours. Single "
        "ops are timed by the device alone; wholes with the host's time where the device waits for it; `_graph` is our "
        "side as a CUDA graph. "
        f"{facts['device']}, CUDA {facts.get('cuda', '–')}, driver and clocks {facts.get('driver_and_clocks', '–')}, "
        f"torch {facts['torch']}, {facts['dtype']}, kernels for {facts['kernels'] or 'the CPU'}; in the same run a "
        f"copy moved {ceiling['copy_bytes_per_second'] / 1e12:.2f} TB/s and a product ran at "
        f"{ceiling['product_operations_per_second'] / 1e12:.0f} TFLOP/s; commit {facts['commit'][:10]}"
        f"{', with uncommitted changes' if facts['uncommitted'] else ''}, {facts['date'][:10]}; `{facts['command']}`."
        f"{' Corrected afterwards: ' + facts['corrected'] + '.' if 'corrected' in facts else ''}"
    )
    title = f"### {facts['device']}, commit {facts['commit'][:7]}"
    return f"{title}\n\n{certificate}\n\n{HEADER}\n" + "\n".join(rows) + skipped
