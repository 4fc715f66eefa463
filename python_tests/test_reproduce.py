"""The reproduction's pages and batches: repeatable, of separate splits, and the same to the model as conversations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
pytest.importorskip("font_lato", reason="the reproduction's fonts: pip install 'vico_ext[reproduce]'")

from reproduce import fonts
from reproduce.bank import FAMILIES, GLYPHS, SPLITS, STYLES, Bank, style_of, words_of
from reproduce.drawing import TABS
from reproduce.evaluate import edge_density, kept_share, threshold_for
from reproduce.export import write_pages
from reproduce.model import SIZES, make_model, normalised
from reproduce.pages import Chats, Pages, answer_logits, right_answers
from reproduce.reader import Lesson, train_reader, visual_tokens
from reproduce.ship import copy_model, copy_pages
from reproduce.stages import call
from reproduce.tokens import IMAGE, make_tokenizer
from vico_ext.integrations import load_internvl
from vico_ext.training.chat import ChatEncoder, Turn
from vico_ext.training.records import Corpus, Tiling

TILES = len(TABS) * len(FAMILIES) * STYLES  # one of each


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank.render("train", TILES)


@pytest.fixture(scope="module")
def chats() -> Chats:
    return Chats(ChatEncoder(make_tokenizer(), IMAGE, 16))


def test_a_bank_is_the_same_again_and_from_its_file(bank: Bank, tmp_path: Path) -> None:
    fresh, stored = (Bank.cached("train", TILES, 0, tmp_path) for _ in range(2))
    for other in (fresh, stored):
        np.testing.assert_array_equal(bank.pixels, other.pixels)
        np.testing.assert_array_equal(bank.glyphs, other.glyphs)
        assert (bank.kinds, bank.styles, bank.questions) == (other.kinds, other.styles, other.questions)
    np.testing.assert_array_equal(bank.first(30).pixels, Bank.render("train", 30).pixels)
    assert not np.array_equal(bank.pixels[:30], Bank.render("train", 30, seed=1).pixels)


def test_splits_share_no_fonts_and_no_title_words() -> None:
    used = {split: {style_of(split, family, n).font for family in FAMILIES for n in range(STYLES)} for split in SPLITS}
    assert used["train"] == used["seen"] == set(fonts.TRAIN)
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not used[one] & used[other]
        assert not set(words_of(one)) & set(words_of(other))


def test_glyphs_name_the_digits_of_the_answers(bank: Bank) -> None:
    for tile, kind in enumerate(bank.kinds):
        named = [GLYPHS[g] for g in bank.glyphs[tile] if 0 <= g < len(GLYPHS)]
        asked = "".join(
            q.answer for q in bank.questions[tile] if q.skill in ("fine", "sparse", "medium", "title", "label")
        )
        each = 1 if kind in ("fine", "sparse", "mixed") else 4  # patches of a character
        assert sorted(named) == sorted(asked * each)


def test_pages_have_a_tile_of_each_tab_and_no_question_twice(bank: Bank) -> None:
    pages = Pages(bank, 0)
    for _ in range(20):
        page = pages.draw()
        assert [int(bank.tabs[tile]) for tile in page.tiles] == [0, 1, 2, 3]
        assert len({one.text for one in page.asked}) == len(page.asked) > 0
        for one in page.asked:
            assert one.question in bank.questions[page.tiles[one.place]]
    assert len(pages.draw(alone=True).tiles) == 1
    with pytest.raises(ValueError, match="render more"):
        Pages(bank.first(42), 0)


def test_batches_are_what_conversations_become(bank: Bank, chats: Chats) -> None:
    model = make_model(SIZES["laptop"], 0).eval()
    drawn = Pages(bank, 0)
    pages = [drawn.draw(questions=5), drawn.draw(questions=3, alone=True)]
    batch = chats.batch(pages)
    pixels = normalised(torch.from_numpy(bank.pixels)[batch.tiles])
    found = []
    with torch.no_grad():
        ours = answer_logits(model, batch, visual_tokens(model, model.model.vision_tower(pixel_values=pixels)[0]))
        for page, own in zip(pages, pixels.split([4, 1]), strict=True):
            turns = []
            for number, one in enumerate(page.asked):
                turns.append(Turn("user", one.text if number else f"<image>\n{one.text}"))
                turns.append(Turn("assistant", one.question.answer))
            chat = chats.encoder.encode(turns, [len(page.tiles)])
            logits = model(input_ids=torch.tensor([chat.input_ids]), pixel_values=own).logits[0]
            found.append(logits[:-1][torch.tensor(chat.answer[1:])])
    torch.testing.assert_close(ours, torch.cat(found), rtol=1e-4, atol=1e-4)


def test_answers_count_as_right_when_all_their_tokens_are(bank: Bank, chats: Chats) -> None:
    batch = chats.batch([Pages(bank, 1).draw(questions=4) for _ in range(3)])
    truth = batch.targets[batch.predict]
    logits = torch.nn.functional.one_hot(truth, 100).float()
    assert all(ok for _, _, ok in right_answers(logits, batch))
    logits[0] = 0  # the first token of the first answer
    logits[0, 99] = 1
    answers = right_answers(logits, batch)
    assert [ok for _, _, ok in answers] == [False] + [True] * (len(answers) - 1)


@pytest.mark.parametrize("together", [False, True])
def test_exported_pages_come_back_as_the_same_tiles_and_questions(
    bank: Bank, chats: Chats, tmp_path: Path, together: bool
) -> None:
    path = write_pages(tmp_path, Pages(bank, 5), 3, together=together)
    tiling = Tiling(64, 1, 4, False)
    corpus = Corpus.scan(path, tmp_path, tiling, questions=8, measure=True, tokens_per_tile=16)
    drawn = Pages(bank, 5)
    assert not corpus.problems
    assert len(corpus.items) == 3
    for item in corpus.items:
        page = drawn.draw()
        records = corpus.read(item)
        turns = [turn.text for record in records for turn in record.turns]
        assert [text.removeprefix("<image>\n") for text in turns[::2]] == [one.text for one in page.asked]
        assert turns[1::2] == [one.question.answer for one in page.asked]
        assert len(records) == (1 if together else len(page.asked))
        cut = tiling.cut(tmp_path / records[0].images[0])
        torch.testing.assert_close(cut, normalised(torch.from_numpy(bank.pixels)[list(page.tiles)]), rtol=0, atol=1e-6)
        for record in records:
            assert chats.encoder.tokenizer.unk_token_id not in chats.encoder.encode(record.turns, [4]).input_ids


@pytest.mark.parametrize(("started", "reached"), [(0.0, False), (1.1, None)])
def test_a_reader_that_does_not_begin_to_read_is_given_up(bank: Bank, chats: Chats, started, reached) -> None:
    model, entries = make_model(SIZES["laptop"], 0), []
    lesson = Lesson(batch=2, alone=1, steps=3, cooldown=1, patience=2, started=started)
    features = torch.zeros(len(bank), 65, 128, dtype=torch.bfloat16)
    found = train_reader(model, Pages(bank, 0), features, chats, lesson, seed=0, log=entries.append, every=1)
    assert found is reached
    assert [entry["step"] for entry in entries] == ([1, 2, 3] if reached is False else [1])


def test_thresholds_keep_their_budget_and_edges_see_print() -> None:
    p = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for budget in (0.3, 0.5, 0.9):
        compress = p >= threshold_for(p, budget, (16, 4))
        assert kept_share(compress, (16, 4)) == pytest.approx(budget, abs=1e-3)
    assert kept_share(torch.ones(8, dtype=torch.bool), (16, 4)) == 0.25
    plain, striped = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    striped[:, :, ::2] = 1
    assert edge_density(torch.stack([plain, striped])).tolist() == [0, 1]


def test_a_failed_stage_says_where_its_words_are(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "log.txt"
    with pytest.raises(RuntimeError, match=r"vico_ext ended with 2: what it said is in .*log\.txt"):
        call(["vico_ext", "train", "consistency", "--model", tmp_path], log, 1)
    assert "data is missing" in log.read_text()


@pytest.mark.slow
def test_the_whole_of_it_runs_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reproduce.run", "--smoke", "--out", str(tmp_path), "--seeds", "3", "--cores", "1"]
    root = Path(__file__).resolve().parents[1] / "examples"
    # conftest keeps the working folder off the path of every child
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}

    def run() -> str:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "stage 0: training the reference" in run()
    results = json.loads((tmp_path / "seed-3" / "results.json").read_text())
    assert results["routings"]["reference"]["tokens_kept"] == 1
    assert results["routings"]["all-64"]["tokens_kept"] == 0.25
    chosen = results["routings"]["ViR chosen"]["tokens_kept"]
    for rival in ("random", "edges", "oracle"):
        assert results["routings"][f"{rival} as ViR chosen"]["tokens_kept"] == chosen
    report = (tmp_path / "report.md").read_text()
    assert "does not hold" in report  # two steps teach nothing
    for picture in ("tradeoff", "families", "kinds", "throughput", "losses", "samples"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5000
    copy_model(tmp_path / "seed-3" / "stage2" / "model", tmp_path / "small")
    assert sum(path.stat().st_size for path in (tmp_path / "small").iterdir()) < 8e6
    assert load_internvl(tmp_path / "small", dtype="auto").dtype == torch.bfloat16
    copy_pages(tmp_path / "test" / "data.jsonl", tmp_path / "pages")
    asked = [json.loads(line) for line in (tmp_path / "pages" / "questions.jsonl").read_text().splitlines()]
    assert {path.name for path in (tmp_path / "pages").glob("*.png")} == {line["image"] for line in asked}
    assert len({line["image"] for line in asked}) == len({line["family"] for line in asked})
    (tmp_path / "seed-3" / "results.json").unlink()  # as if it had been interrupted in the evaluation
    assert "stage 0" not in run()
    assert json.loads((tmp_path / "seed-3" / "results.json").read_text())["chosen"] == results["chosen"]
