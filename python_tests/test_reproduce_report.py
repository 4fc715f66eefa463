"""The reproduction's report: what is written, verdicts from figures, the paired bootstrap, missing parts."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
pytest.importorskip("matplotlib", reason="the reproduction's pictures: pip install 'vico_ext[demo]'")

from reproduce.report import verdicts, write_report
from reproduce.runs import Range, Run, bootstrap

FAMILIES = ("document", "receipt", "table", "code", "screen", "picture")
KINDS = ("fine", "title", "blank", "switches")
PAGES, QUESTIONS, SEEDS = 12, 8, (0, 1)
PICTURES = ("tradeoff", "families", "kinds", "throughput", "losses", "samples")
CHOSEN = "ViR chosen"

# Group, share of tiles compressed, how many of the 96 questions are wrong.
ROUTINGS: dict[str, tuple[str, float, int]] = {
    "reference": ("all-256", 0.0, 0),
    "every tile whole": ("all-256", 0.0, 0),
    "every tile compressed, before": ("all-64 before", 1.0, 70),
    "every tile compressed": ("all-64", 1.0, 55),
    **{f"ViR {n}%": ("router", 0.01 * n, n // 40) for n in (25, 50, 75)},
    "ViR p>0.5": ("router", 0.5, 1),
    CHOSEN: ("router", 0.75, 0),
    **{
        f"{group} as ViR {n}{'' if n == 'chosen' else '%'}": (group, 0.01 * (75 if n == "chosen" else n), wrong)
        for group, most in {"random": 44, "edges": 24, "oracle": 0}.items()
        for n, wrong in {25: most // 4, 50: most // 2, 75: most, "chosen": most}.items()
    },
}


def write_run(out: Path, seeds: tuple[int, ...] = SEEDS) -> Path:
    """A run of 12 pages of noise."""
    chance = np.random.default_rng(0)
    (out / "test" / "images").mkdir(parents=True)
    (out / "reference").mkdir()
    families = [FAMILIES[page % len(FAMILIES)] for page in range(PAGES)]
    kinds = chance.choice(KINDS, (PAGES, 4)).tolist()
    lines = []
    for page in range(PAGES):
        coarse = chance.integers(120, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(out / "test" / "images" / f"{page:06d}.png")
        for n in range(QUESTIONS):
            human = f"<image>\ntile {n % 4 + 1} line {n // 4 + 1} costs $ or $?"
            turns = [{"from": "human", "value": human}, {"from": "gpt", "value": str(chance.integers(1000, 9999))}]
            lines.append({
                "image": f"images/{page:06d}.png", "family": families[page], "skill": ("fine", "title")[n % 2],
                "tile": n % 4 + 1, "kinds": kinds[page], "conversations": turns,
            })  # fmt: skip
    write_lines(out / "test" / "data.jsonl", lines)
    log: list[dict[str, Any]] = [{"stage": "data", "tiles": 3}]
    log += [{"stage": "0a", "step": n, "loss": 3 * 0.7 ** (n / 100), "digits": 0.4} for n in range(100, 1000, 100)]
    log += [{"stage": "0b", "step": n, "1 tiles": [2 / n, 0.1, 0.5], "4 tiles": [3 / n, 0, 0]} for n in (50, 100, 150)]
    write_lines(out / "reference" / "log.jsonl", [*log, {"stage": "0", "split": "seen", "score": {"all": 0.9}}])
    for seed in seeds:
        write_seed(out / f"seed-{seed}", seed, lines)
    return out


def write_seed(folder: Path, seed: int, lines: list[dict[str, Any]]) -> None:
    chance = np.random.default_rng(1000 + seed)
    page = np.repeat(np.arange(PAGES), QUESTIONS)
    outcomes, decisions, routings = {"page": page}, {}, {}
    kinds = np.array([line["kinds"] for line in lines[::QUESTIONS]]).flatten()
    for name, (group, share, wrong) in ROUTINGS.items():
        right = np.ones(len(page), np.uint8)
        right[chance.permutation(len(page))[: wrong + seed * (wrong > 2)]] = 0
        own = np.zeros(4 * PAGES, bool)
        own[chance.permutation(4 * PAGES)[: round(share * 4 * PAGES)]] = True
        outcomes[name], decisions[name] = right, own
        of = {f: right[[line["family"] == f for line in lines]] for f in FAMILIES}
        skill = {s: right[[line["skill"] == s for line in lines]].mean() for s in ("fine", "title")}
        speed = {"1": 10 + 2 * share + 0.1 * seed, "32": 200 + 150 * share} if name != "reference" else {}
        routings[name] = {
            "group": group, "tokens_kept": float(1 - 0.75 * own.mean()), "score": float(right.mean()),
            "kl": 0.01 * wrong,
            "families": {f: {"score": float(r.mean()), "kl": 0.01, "rows": len(r)} for f, r in of.items()},
            "skills": skill, "compressed_by_kind": {k: float(own[kinds == k].mean()) for k in KINDS},
            "first_token_prompts_per_s": speed if group != "oracle" else {},
        }  # fmt: skip
    for stage in ("stage1", "stage2"):
        (folder / stage).mkdir(parents=True)
        steps = [{"step": n, "loss": float(chance.uniform(0.5, 1) / n), "tau": None} for n in range(1, 200)]
        write_lines(folder / stage / "metrics.jsonl", [*steps, {"step": 200, "loss": None}])
    save_file(outcomes, folder / "outcomes.safetensors")
    save_file(decisions, folder / "decisions.safetensors")
    chosen = {"routing": CHOSEN, "threshold": 0.43, "rule": "the fewest tokens that keep 99.6% on validation"}
    head = {"seed": seed, "commit": "abc", "command": f"run --seed {seed}", "pages": PAGES, "questions": len(page)}
    write_json(folder / "results.json", {**head, "tiles": 4 * PAGES, "chosen": chosen, "routings": routings})


def write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def change(out: Path, seed: int, *path: str, to: Any) -> None:
    """Puts another value at ``path`` of a seed's results; takes it out where it is None."""
    file = out / f"seed-{seed}" / "results.json"
    content = entry = json.loads(file.read_text(encoding="utf-8"))
    for key in path[:-1]:
        entry = entry[key]
    if to is None:
        del entry[path[-1]]
    else:
        entry[path[-1]] = to
    write_json(file, content)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def held(out: Path) -> dict[str, set[bool | None]]:
    """By part of the bar, what its rows say."""
    found: dict[str, set[bool | None]] = {}
    for verdict in verdicts(Run.read(out)):
        found.setdefault(verdict.part, set()).add(verdict.holds)
    return found


def test_the_report_its_figures_and_all_pictures_are_written_and_the_same_again(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    files = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert set(files) == {"report.md", "summary.json", *(f"{name}.png" for name in PICTURES)}
    for name in PICTURES:
        assert f"![{name}]({name}.png)" in text
        with Image.open(run / f"{name}.png") as image:
            assert np.ptp(np.asarray(image.convert("L"))) > 100
    assert "Commit abc; seeds 0, 1; 12 test pages, 96 questions, 48 tiles." in text
    assert "run --seed 0\nrun --seed 1" in text
    assert "As a whole: holds." in text
    assert "Careful" not in text
    assert "| every tile compressed | 25.00% | 42.19% [41.67..42.71] | 42.19% [41.67..42.71] | 0.5500 |" in text
    assert "| every tile compressed | 1.20 | 1.75 |" in text
    summary = json.loads(files["summary.json"])
    assert summary["holds"] is True
    assert summary["routings"]["every tile compressed"]["score"]["low"] == pytest.approx(40 / 96)
    assert summary["bootstrap"]["ViR chosen minus random"]["pooled"]["value"] == pytest.approx(44.5 / 96)
    write_report(run)
    assert files == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("part", "path", "value", "holds"),
    [
        ("a", ("reference", "families", "code", "score"), 0.95, True),
        ("a", ("reference", "families", "code", "score"), 0.94, False),
        ("b", (CHOSEN, "score"), 0.996, True),
        ("b", (CHOSEN, "score"), 0.9959, False),
        ("b", (CHOSEN, "tokens_kept"), 0.5, True),
        ("b", (CHOSEN, "tokens_kept"), 0.501, False),
        ("c", (f"random as {CHOSEN}", "score"), 0.9, True),
        ("c", (f"random as {CHOSEN}", "score"), 0.91, False),
    ],
)
def test_verdicts_follow_from_the_figures_of_every_seed(
    run: Path, part: str, path: tuple[str, ...], value: float, holds: bool
) -> None:
    assert held(run) == {name: {True} for name in "abcd"}
    change(run, 1, "routings", *path, to=value)
    expected = {name: {True} for name in "abcd"}
    if not holds:
        expected[part] = {True, False} if part == "a" else {False}
    assert held(run) == expected


@pytest.mark.parametrize("gain", [0, 1])
def test_edges_are_beaten_only_where_the_interval_is_above_zero_in_every_seed(run: Path, gain: int) -> None:
    path = run / "seed-1" / "outcomes.safetensors"
    outcomes = load_file(path)
    outcomes[f"edges as {CHOSEN}"] = outcomes[CHOSEN].copy()
    outcomes[f"edges as {CHOSEN}"][:gain] = 0  # one question of one page: many draws lack it
    save_file(outcomes, path)
    assert held(run)["d"] == {False}


def test_what_does_not_hold_is_said_and_so_are_contradictions(run: Path) -> None:
    change(run, 1, "routings", "reference", "families", "code", "score", to=0.94)
    change(run, 0, "routings", f"random as {CHOSEN}", "score", to=0.6)
    change(run, 0, "routings", f"random as {CHOSEN}", "tokens_kept", to=0.3)
    text = write_report(run).read_text(encoding="utf-8")
    assert "| reference, code: at least 95% | 97.00% [94.00..100.00] | **does not hold** |" in text
    assert "As a whole: **does not hold**." in text
    assert "Seed 0: **contradiction** for random as ViR chosen: results.json 60.00%, outcomes 54.17%." in text
    assert "Seed 0: **not the same budget**: random as ViR chosen keeps 30.00% of tokens, not 43.75%." in text


def test_equal_outcomes_have_no_difference_at_all() -> None:
    right, page = np.random.default_rng(3).integers(0, 2, (2, 400)), np.arange(400) // 8
    assert bootstrap(right, right, page) == Range(0, 0, 0)
    assert bootstrap(right, right, page, ratio=True) == Range(1, 1, 1)


def test_a_shift_lies_in_its_interval() -> None:
    page = np.arange(4096) // 8
    always = np.tile([1, 1, 1, 1, 1, 1, 1, 0], 512)
    assert bootstrap(always, always * (np.arange(4096) % 8 != 0), page) == Range(1 / 8, 1 / 8, 1 / 8)
    chance = np.random.default_rng(0)
    better, worse = (chance.random((3, 4096)) < share for share in (0.9, 0.7))
    gap, share = bootstrap(better, worse, page), bootstrap(worse, better, page, ratio=True)
    assert gap is not None
    assert share is not None
    assert 0.17 < gap.low < 0.2 < gap.high < 0.23
    assert gap.value == pytest.approx(better.mean() - worse.mean())
    assert share.low < 7 / 9 < share.high
    assert share.value == pytest.approx(worse.mean() / better.mean())


def test_whole_pages_are_drawn() -> None:
    chance = np.random.default_rng(1)
    a, b = chance.integers(0, 2, (2, 100), dtype=np.uint8)
    once = bootstrap(a, b, np.arange(100))
    # Eight questions that are right or wrong together tell no more than one; taken apart they seem to.
    together = bootstrap(a.repeat(8), b.repeat(8), np.arange(100).repeat(8))
    apart = bootstrap(a.repeat(8), b.repeat(8), np.arange(800))
    assert once is not None
    assert apart is not None
    assert together == once
    assert (once.high - once.low) / (apart.high - apart.low) == pytest.approx(8**0.5, rel=0.15)
    # Pages count by their questions.
    uneven = bootstrap(np.array([1, 1, 1, 0]), np.zeros(4), np.array([7, 7, 7, 9]))
    assert uneven == Range(0.75, 0, 1)


def test_no_ratio_where_nothing_is_right() -> None:
    assert bootstrap(np.ones(8), np.zeros(8), np.arange(8), ratio=True) is None


def test_one_seed_without_throughput_logs_and_test_data_is_reported_in_words(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", seeds=(3,))
    write_report(run)
    results = json.loads((run / "seed-3" / "results.json").read_text(encoding="utf-8"))
    for entry in results["routings"].values():
        entry["first_token_prompts_per_s"] = {}
        for part in ("families", "skills", "compressed_by_kind", "kl"):
            del entry[part]
    del results["routings"][f"random as {CHOSEN}"]
    results["routings"]["reference"]["score"] = 0
    write_json(run / "seed-3" / "results.json", results)
    outcomes = load_file(run / "seed-3" / "outcomes.safetensors")
    outcomes["reference"][:] = 0
    save_file(outcomes, run / "seed-3" / "outcomes.safetensors")
    for path in (
        "test/data.jsonl",
        "reference/log.jsonl",
        "seed-3/stage1/metrics.jsonl",
        "seed-3/stage2/metrics.jsonl",
    ):
        (run / path).unlink()
    (run / "seed-4").mkdir()
    text = write_report(run).read_text(encoding="utf-8")
    assert sorted(path.name for path in run.glob("*.png")) == ["tradeoff.png"]  # none of the report before
    for words in (
        "One seed only", "seed-4 has no results.json and is left out", "Throughput was not measured",
        "| a | reference, every family: at least 95% | – | **not measured** |", "random was not measured",
        "seed 3: – of the score with 43.75% of the tokens", "Nothing was measured per family",
        "No picture: no stage has a log", "No picture: test/data.jsonl, decisions or outcomes",
    ):  # fmt: skip
        assert words in text
    assert "As a whole: **not measured**." in text
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["holds"] is None


def test_a_log_that_was_killed_and_begun_anew_is_drawn(run: Path) -> None:
    with (run / "reference" / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"stage": "0a", "step": 1, "loss": 2.0}\n{"stage": "0a", "st')
    assert Run.read(run).reference_log[-1] == {"stage": "0a", "step": 1, "loss": 2.0}
    write_report(run)


def test_bad_runs_are_refused_and_an_older_report_stays(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"out: wanted .*seed-<n>/results.json, which an evaluation writes, found none"
    ):
        write_report(tmp_path)
    report = write_report(run).read_bytes()
    change(run, 1, "routings", CHOSEN, "group", to="best")
    with pytest.raises(ValueError, match=r"results.json, 'ViR chosen': wanted .* a group of .*, got .*'best'"):
        write_report(run)
    change(run, 1, "routings", CHOSEN, "group", to="router")
    change(run, 1, "routings", CHOSEN, "score", to=float("nan"))
    with pytest.raises(ValueError, match=r"wanted figures .*'score': nan"):
        write_report(run)
    change(run, 1, "routings", CHOSEN, to=None)
    with pytest.raises(ValueError, match=r"wanted routings with 'reference' and the chosen one, got \["):
        write_report(run)
    assert (run / "report.md").read_bytes() == report


def test_outcomes_of_other_questions_are_refused(run: Path) -> None:
    path = run / "test" / "data.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[1:]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"data.jsonl: wanted 96 lines on 12 pages, those of the outcomes, got 95"):
        Run.read(run)
    outcomes = load_file(run / "seed-1" / "outcomes.safetensors")
    save_file({**outcomes, "page": outcomes["page"] // 2}, run / "seed-1" / "outcomes.safetensors")
    with pytest.raises(ValueError, match="wanted the same questions"):
        Run.read(run)
    save_file({**outcomes, CHOSEN: outcomes[CHOSEN][1:]}, run / "seed-1" / "outcomes.safetensors")
    with pytest.raises(ValueError, match=r"wanted 'page' and all \[questions\]"):
        Run.read(run)


def test_the_docs_say_what_the_record_says() -> None:
    docs = Path(__file__).resolve().parents[1] / "docs"
    if not (docs / "reproduction" / "summary.json").exists():
        pytest.skip("an sdist has no record")
    record = json.loads((docs / "reproduction" / "summary.json").read_text(encoding="utf-8"))["routings"]
    whole = record["reference"]["score"]["value"]
    text = (docs / "reproduction.md").read_text(encoding="utf-8")
    rows = {
        "reference": "reference",
        "all compressed, before": "all-64 before",
        "all compressed, after": "all-64",
        "**ViR, threshold chosen": "ViR chosen",
        "ViR, p > 0.5": "ViR p>0.5",
        "random": "random as ViR chosen",
        "fewest edges first": "edges as ViR chosen",
        "oracle": "oracle as ViR chosen",
    }
    for start, name in rows.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
        cells = [float(re.search(r"[\d.]+", cell).group()) for cell in line.split("|")[2:6]]
        tokens, score, kl = (record[name][key]["value"] for key in ("tokens_kept", "score", "kl"))
        assert cells[:3] == pytest.approx([100 * tokens, 100 * score, 100 * score / whole], abs=0.051)
        assert cells[3] == pytest.approx(kl, abs=0.006)
    chosen = record["ViR chosen"]
    readme = " ".join((docs.parent / "README.md").read_text(encoding="utf-8").split())
    kept, tokens = chosen["score"]["value"] / whole, chosen["tokens_kept"]["value"]
    assert f"keeps {kept:.1%} of its score with {tokens:.1%} of the visual tokens" in readme
