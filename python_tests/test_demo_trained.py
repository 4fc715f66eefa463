"""The trained model that comes with the package, and the part of ``vico demo`` that runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import vico_ext
from vico_ext import cli

transformers = pytest.importorskip("transformers")

from vico_ext.cli import demo_trained  # noqa: E402  (needs transformers)
from vico_ext.cli.route import read_job  # noqa: E402

FOLDER = Path(vico_ext.__file__).parent / "data" / "small"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def trained(out):
    return demo_trained.run_trained(out)


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "small")


def test_the_files_are_small_and_say_where_they_are_from():
    assert demo_trained.FOLDER == FOLDER
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    made = demo_trained.Made.read(FOLDER)
    assert re.match(r"[0-9a-f]{7,40}\b", made.commit)
    assert made.command
    assert 0 < made.threshold < 1
    assert 0.9 < made.kept_score < 1.1
    assert 0.25 <= made.tokens_kept <= 0.6
    # transformers 4.57 does not know TokenizersBackend, which 5.x writes here; both know this one.
    assert json.loads((FOLDER / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_pages_are_of_several_families_and_cut_into_four_tiles():
    pages = demo_trained.read_pages(FOLDER)
    assert len({page.records[0].family for page in pages}) == len(pages) >= 3
    for page in pages:
        job = read_job(page.image, 64, demo_trained.MAX_TILES, thumbnail=False)
        assert (job.image.size, job.tiled.grid, job.tiled.tiles) == ((128, 128), (2, 2), 4)
        assert all(line["tile"] in range(4) for line in page.lines)
    assert {page.image.name for page in pages} == {path.name for path in (FOLDER / "pages").glob("*.png")}


def test_the_table_shows_what_the_report_says(trained, capsys):
    demo_trained.show_trained(trained)
    said = capsys.readouterr().out
    made, sums = trained["made"], trained["totals"]
    assert f"`{made['command']}` (commit {made['commit'][:10]})" in said
    assert f"keeps {made['kept_score']:.1%} of the score" in said
    assert f"with {made['tokens_kept']:.0%} of the visual tokens" in said
    rows = {line.split()[0]: " ".join(line.split()) for line in said.splitlines() if "->" in line}
    assert len(rows) == len(trained["pages"]) + 1
    for page in trained["pages"]:
        whole, routed = (sum(q[way]["right"] for q in page["questions"]) for way in ("whole", "routed"))
        tokens = sum((16, 4)[tile["compressed"]] for tile in page["tiles"])
        asked = len(page["questions"])
        name = Path(page["file"]).name
        assert rows[name] == f"{name} {page['family']} 64 -> {tokens} {whole}/{asked} {routed}/{asked}"
    asked = sums["asked"]
    tokens = f"{64 * len(trained['pages'])} -> {sums['tokens_after']}"
    assert rows["total"] == f"total {tokens} {sums['right_whole']}/{asked} {sums['right_routed']}/{asked}"
    assert asked == sum(len(page["questions"]) for page in trained["pages"])
    assert max(map(len, said.splitlines())) <= 125


def test_examples_are_answers_of_the_report(trained, capsys):
    demo_trained.show_trained(trained)
    lines = re.findall(
        r"^  (.+) \((right|wrong: .+)\), (.+), from a tile of (4|16) tokens$", capsys.readouterr().out, re.M
    )
    assert 2 <= len(lines) <= 3
    pages = {Path(page["file"]).name: page["questions"] for page in trained["pages"]}
    for text, verdict, page, tokens in lines:
        assert any(
            text == f"{q['question']} {q['routed']['said']}"
            and verdict == ("right" if q["routed"]["right"] else f"wrong: {q['answer']}")
            and q["routed"]["right"] == (q["routed"]["said"] == q["answer"])
            and int(tokens) == q["tokens_of_tile"]
            for q in pages[page]
        )


def test_the_model_has_learnt_and_the_router_keeps_what_needs_it(trained):
    sums = trained["totals"]
    assert sums["right_whole"] >= 0.8 * sums["asked"]
    assert sums["right_routed"] >= 0.9 * sums["right_whole"]
    assert sums["tokens_after"] <= 0.7 * sums["tokens_before"]


def test_each_page_has_a_picture(trained, out):
    names = [page["picture"] for page in trained["pages"]]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    with Image.open(out / names[0]) as picture:
        assert picture.width > 800


def test_the_recorded_threshold_is_used(trained, copied, tmp_path):
    threshold = demo_trained.Made.read(FOLDER).threshold
    assert trained["policy"] == f"threshold:{threshold}"
    tiles = [tile for page in trained["pages"] for tile in page["tiles"]]
    assert all(tile["compressed"] == (tile["p"] >= threshold) for tile in tiles)
    assert len({tile["compressed"] for tile in tiles}) == 2
    made = json.loads((copied / "made.json").read_text())
    (copied / "made.json").write_text(json.dumps({**made, "threshold": 0}))
    questions = (copied / "pages" / "questions.jsonl").read_text().splitlines()
    (copied / "pages" / "questions.jsonl").write_text(questions[0])
    other = demo_trained.run_trained(tmp_path, copied)
    assert other["totals"]["tiles_compressed"] == 4


def test_prompts_are_those_of_training(tmp_path):
    for module in ("accelerate", "peft"):
        pytest.importorskip(module)
    from vico_ext.training import EvalOptions
    from vico_ext.training.batches import Draw
    from vico_ext.training.setup import read_data

    reader = demo_trained.Reader(FOLDER)
    data = str(FOLDER / "pages" / "questions.jsonl")
    options = EvalOptions(model=str(FOLDER), data=data, out="-", max_tiles=demo_trained.MAX_TILES, thumbnail=False)
    samples = read_data(options, reader.model.config, measure=False)
    item = 0
    for page in demo_trained.read_pages(FOLDER):
        job = read_job(page.image, reader.tile_size, demo_trained.MAX_TILES, thumbnail=False)
        inputs, answers = reader.inputs(page, job)
        pixel_values = inputs["pixel_values"].split(job.tiled.tiles)
        for row, answer in enumerate(answers):
            batch = samples.collate([samples[Draw(item, 0)]])
            prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
            assert batch.input_ids[0].tolist()[: len(prompt) + len(answer)] == prompt + answer
            assert batch.predict[0].nonzero().flatten().tolist() == list(
                range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            )
            assert torch.equal(batch.pixel_values, pixel_values[row])
            item += 1
    assert item == len(samples.corpus.items)


def test_vico_eval_finds_the_same_answers_right(trained, tmp_path):
    for module in ("accelerate", "peft", "tensorboard"):
        pytest.importorskip(module)
    data = FOLDER / "pages" / "questions.jsonl"
    options = ["--max-tiles", "4", "--thumbnail", "false", "--workers", "0", "--throughput-seconds", "0"]
    command = ["eval", "--model", FOLDER, "--data", data, "--out", tmp_path, "--policies", trained["policy"], *options]
    assert cli.main([*map(str, command)]) == 0
    routings = json.loads((tmp_path / "report.json").read_text())["routings"]
    sums, routed = trained["totals"], routings[trained["policy"]]
    assert round(routings["all-256"]["score"] * sums["asked"]) == sums["right_whole"]
    assert round(routed["score"] * sums["asked"]) == sums["right_routed"]


def test_what_is_missing_or_wrong_is_said_in_a_line(copied, tmp_path, monkeypatch, capsys):
    def demo():
        assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    monkeypatch.setattr(demo_trained, "FOLDER", copied)
    questions = copied / "pages" / "questions.jsonl"
    questions.write_text('{"image": "000000.png"}\n')
    assert f"{questions}, line 1: 'conversations' must be a list" in demo()
    made = json.loads((copied / "made.json").read_text())
    for name, wrong in {"threshold": 1.5, "commit": 7, "figures": {"kept_score": 1}}.items():
        (copied / "made.json").write_text(json.dumps({**made, name: wrong}))
        assert re.search(rf"made.json: {name}[.a-z_]* must be .*, got ", demo())
    (copied / "made.json").write_text("?")
    assert "made.json must be JSON: " in demo()
    (copied / "model.safetensors").unlink()
    assert f"{copied} must hold the trained model and the pages of the demo, it lacks model.safetensors: " in demo()
    monkeypatch.setattr(demo_trained, "FOLDER", tmp_path / "nowhere")
    assert "it lacks config.json, model.safetensors, tokenizer.json, made.json, pages/questions.jsonl: " in demo()


def test_the_demo_extra_is_enough_and_nothing_but_the_demo_speaks(tmp_path):
    """Neither what training needs is imported, nor does transformers say anything while it loads."""
    code = (
        "import sys\n"
        "for name in ('accelerate', 'peft', 'tensorboard', 'matplotlib', 'skimage'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from transformers.utils import logging; logging.set_verbosity_error()\n"
        "from vico_ext.cli.demo_trained import run_trained\n"
        "print(run_trained(Path(sys.argv[1]))['totals']['asked'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 0
