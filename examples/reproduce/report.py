"""The report of a run: ``python -m reproduce.report OUT`` reads what an evaluation left there, and judges it.

Writes ``report.md``, ``summary.json`` and pictures into OUT, all of them or none. Every figure and every verdict is
computed from the files; what is missing is said in words.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reproduce import plots
from reproduce.runs import DRAWS, REFERENCE, ROUNDING, SPEED, Gaps, Range, Run, figure
from vico_ext._files import replacing_all

__all__ = ["Verdict", "verdicts", "write_report"]

# The bar: of the reference per family, of its score kept, of tokens kept, points above random.
FAMILY_BAR, KEPT_BAR, TOKENS_BAR, RANDOM_BAR = 0.95, 0.996, 0.5, 0.10
LEGEND = """The reference is the frozen model before ViCO. The other rows are the trained policy with every tile whole
(all-256) or compressed (all-64; "before": ahead of stage 1), or with tiles chosen by the router (ViR), by chance
(random), by the density of edges (edges) or by the loss that each tile really costs (oracle). 256 and 64 are the
released models' tokens per tile; here they are 16 and 4. Figures are means over seeds, in brackets the least and the
largest."""


@dataclass(frozen=True)
class Verdict:
    """A row of the bar; ``holds`` is None where something is missing and nothing failed."""

    part: str
    claim: str
    measured: str
    holds: bool | None


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "---:") -> str:
    """A table of Markdown; all columns but the first have the same alignment."""
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def judged(parts: Iterable[bool | None]) -> bool | None:
    """Whether all hold; None where none fails but some, or all, are unknown."""
    known = list(parts)
    return False if False in known else None if None in known or not known else True


def verdicts(run: Run) -> list[Verdict]:
    """The rows of the bar, each with what was measured; a row holds where it holds in every seed."""
    rows = []

    def row(part: str, claim: str, found: dict[str, tuple[str, bool | None]]) -> None:
        measured = "<br>".join(f"{label}: {text}" for label, (text, _) in found.items())
        rows.append(Verdict(part, claim, measured or "nothing", judged(holds for _, holds in found.values())))

    for family in run.keys("families") or ["every family"]:
        seen = run.values(REFERENCE, "families", family, "score")
        holds = judged(seen[s.number] >= FAMILY_BAR - ROUNDING if s.number in seen else None for s in run.seeds)
        measured = figure(Range.over(seen.values()))
        rows.append(Verdict("a", f"reference, {family}: at least {figure(FAMILY_BAR, 0)}", measured, holds))

    kept, score = run.values(run.chosen, "tokens_kept"), run.values(run.chosen, "score")
    share, rival = run.values(run.chosen, "score", of=REFERENCE), run.values(run.rival("random"), "score")
    saved: dict[str, tuple[str, bool | None]] = {}
    ahead: dict[str, tuple[str, bool | None]] = {}
    for seed, own in score.items():
        label, few = f"seed {seed}", kept[seed] <= TOKENS_BAR + ROUNDING
        text = f"{figure(share.get(seed))} of the score with {figure(kept[seed])} of the tokens"
        saved[label] = (text, None if seed not in share else few and share[seed] >= KEPT_BAR - ROUNDING)
        ahead[label] = ("random was not measured", None)
        if seed in rival:
            text = f"{100 * (own - rival[seed]):+.2f} points ({figure(own)}, {figure(rival[seed])})"
            ahead[label] = (text, own - rival[seed] >= RANDOM_BAR - ROUNDING)
    keeps = f"{run.chosen}: at least {figure(KEPT_BAR, 1)} of the reference's score"
    row("b", f"{keeps} with at most {figure(TOKENS_BAR, 0)} of the visual tokens, in every seed", saved)
    row("c", f"{run.chosen}: at least {100 * RANDOM_BAR:.0f} points above random at its budget, in every seed", ahead)
    edges = run.compare(run.rival("edges")).items()
    above = {label: (figure(own, unit=" points"), None if own is None else own.low > 0) for label, own in edges}
    row("d", f"{run.chosen}: above edges at its budget, 95% interval above 0, in every seed and pooled", above)
    return rows


def opening(run: Run) -> list[str]:
    """What was run, and what to know before reading on."""
    heads = [seed.results for seed in run.seeds]

    def noted(key: str, between: str = ", ") -> str:
        return between.join(dict.fromkeys(str(head.get(key, "not noted")) for head in heads))

    picks = [(seed.number, seed.results["chosen"]) for seed in run.seeds]
    rules = "\n".join(f"- seed {n}: threshold {pick.get('threshold')}. {pick.get('rule', '')}" for n, pick in picks)
    return [
        "# ViCO, reproduced small: what was measured",
        f"Commit {noted('commit')}; seeds {', '.join(str(n) for n, _ in picks)}; {noted('pages')} test pages, "
        f"{noted('questions')} questions, {noted('tiles')} tiles.",
        "```\n" + noted("command", "\n") + "\n```",
        LEGEND,
        f"{run.chosen}, how it was chosen:\n\n{rules}",
        *(["Careful:\n\n" + "\n".join(f"- {note}" for note in run.notes)] if run.notes else []),
    ]


def sections(run: Run, bar: list[Verdict], gaps: Gaps, pictures: plots.Pictures) -> list[str]:
    """The report's parts."""
    says = {True: "holds", False: "**does not hold**", None: "**not measured**"}
    names, whole, batches = run.names(), run.whole(), sorted(run.keys(SPEED), key=int)

    def picture(name: str) -> str:
        drawn = pictures[name]
        return f"No picture: {drawn}." if isinstance(drawn, str) else f"![{name}]({name}.png)"

    def parts(what: str, columns: list[str], part: str, *end: str, digits: int = 2) -> str:
        rows = [[key, *(figure(run.spread(n, part, key, *end), digits) for n in columns)] for key in run.keys(part)]
        return table([what, *columns], rows) if rows else f"Nothing was measured per {what}."

    every = [
        [n, figure(run.spread(n, "tokens_kept")), figure(run.spread(n, "score")),
         figure(run.spread(n, "score", of=REFERENCE)), figure(run.spread(n, "kl"), 4, 1, "")]
        for n in names
    ]  # fmt: skip
    ratios = [[n, *(figure(run.spread(n, SPEED, b, of=whole), 2, 1, "") for b in batches)] for n in names if whole]
    speeds = [row for row in ratios if set(row[1:]) - {"–"}]
    return [
        *opening(run),
        "## The bar",
        f"As a whole: {says[judged(v.holds for v in bar)]}.",
        table(["", "wanted", "measured", ""], [[v.part, v.claim, v.measured, says[v.holds]] for v in bar], "---"),
        "## All routings",
        table(["routing", "tokens kept", "score", "of the reference's", "KL"], every),
        picture("tradeoff"),
        "## Families and skills",
        parts("family", run.shown(), "families", "score"),
        picture("families"),
        parts("skill", run.shown(), "skills"),
        "## Share of tiles compressed, by what they show",
        parts("tile kind", [n for n in names if n.endswith(run.chosen)], "compressed_by_kind", digits=1),
        picture("kinds"),
        "## Prompts per second up to the first token, as a ratio to every tile whole",
        table(["routing", *(f"batch {b}" for b in batches)], speeds) if speeds else "Throughput was not measured.",
        picture("throughput"),
        "## Paired bootstrap",
        f"{DRAWS:,} draws of whole pages with all their questions, 95% intervals. Pooled: a page comes with the "
        "questions of all seeds, so that interval is over pages, not over seeds.",
        table(["in percent", *next(iter(gaps.values()))], [[n, *(figure(v, unit="") for v in own.values())]
                                                           for n, own in gaps.items()]),
        "## Training",
        picture("losses"),
        "## Samples",
        picture("samples"),
    ]  # fmt: skip


def summary(run: Run, bar: list[Verdict], gaps: Gaps) -> dict[str, Any]:
    """The report's figures for programs; a routing's are named by their paths in results.json."""
    paths: list[tuple[str, ...]] = [("tokens_kept",), ("score",), ("kl",)]
    paths += [("families", family, key) for family in run.keys("families") for key in ("score", "kl")]
    paths += [(part, key) for part in ("skills", "compressed_by_kind", SPEED) for key in run.keys(part)]
    routings = {name: {"/".join(path): run.spread(name, *path) for path in paths} for name in run.names()}
    for name, found in routings.items():
        found["share of the reference's score"] = run.spread(name, "score", of=REFERENCE)
    return {
        "holds": judged(v.holds for v in bar),
        "bar": [asdict(v) for v in bar],
        "seeds": {s.number: {key: s.results.get(key) for key in ("commit", "command", "chosen")} for s in run.seeds},
        "routings": {name: {key: asdict(v) for key, v in found.items() if v} for name, found in routings.items()},
        "bootstrap": {name: {label: v and asdict(v) for label, v in own.items()} for name, own in gaps.items()},
        "notes": run.notes,
    }


def write_report(out: Path) -> Path:
    """Reads the run in ``out`` and writes report.md, summary.json and pictures there.

    Returns:
        Where the report is.
    """
    run = Run.read(out)
    bar, gaps, pictures, report = verdicts(run), run.gaps(), plots.pictures(run), out / "report.md"
    text = "\n\n".join(sections(run, bar, gaps, pictures)) + "\n"
    content = json.dumps(summary(run, bar, gaps), indent=2, allow_nan=False) + "\n"
    with replacing_all(entry_points=[report]) as stage:
        for name, drawn in pictures.items():
            if not isinstance(drawn, str):
                drawn.savefig(stage(out / f"{name}.png"), format="png", metadata={"Software": None})
        stage(out / "summary.json").write_text(content, encoding="utf-8")
        stage(report).write_text(text, encoding="utf-8")
    for name, drawn in pictures.items():
        if isinstance(drawn, str):  # one of an earlier report
            (out / f"{name}.png").unlink(missing_ok=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("out", type=Path, help="a run's folder")
    print(write_report(parser.parse_args().out))


if __name__ == "__main__":
    main()
