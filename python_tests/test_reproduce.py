"""The reproduction's pages and batches: repeatable, of separate splits, and the same to the model as conversations."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
pytest.importorskip("font_lato", reason="the reproduction's fonts: pip install 'vico_ext[reproduce]'")

from reproduce import fonts
from reproduce.bank import FAMILIES, GLYPHS, SPLITS, Bank, style_of, words_of
from reproduce.export import write_pages
from reproduce.model import SIZES, make_model, normalised
from reproduce.pages import Pages, Shared, answer_logits
from reproduce.reader import right_answers, visual_tokens
from reproduce.tokens import IMAGE, make_tokenizer
from vico_ext.training.chat import ChatEncoder, Turn
from vico_ext.training.records import Corpus, Tiling


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank.render("train", 384)


@pytest.fixture(scope="module")
def shared() -> Shared:
    return Shared(ChatEncoder(make_tokenizer(), IMAGE, 16))


def test_a_bank_is_the_same_again_and_from_its_file(bank: Bank, tmp_path: Path) -> None:
    fresh, stored = Bank.cached("train", 384, 0, tmp_path), Bank.cached("train", 384, 0, tmp_path)
    for other in (fresh, stored):
        np.testing.assert_array_equal(bank.pixels, other.pixels)
        np.testing.assert_array_equal(bank.glyphs, other.glyphs)
        assert (bank.kinds, bank.styles, bank.questions) == (other.kinds, other.styles, other.questions)
    np.testing.assert_array_equal(bank.first(30).pixels, Bank.render("train", 30).pixels)
    assert not np.array_equal(bank.pixels[:30], Bank.render("train", 30, seed=1).pixels)


def test_splits_share_no_fonts_and_no_title_words() -> None:
    used = {split: {style_of(split, family, n).font for family in FAMILIES for n in range(16)} for split in SPLITS}
    assert used["train"] == used["seen"] == set(fonts.TRAIN)
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not used[one] & used[other]
        assert not set(words_of(one)) & set(words_of(other))


def test_glyphs_name_the_digits_of_the_answers(bank: Bank) -> None:
    for tile, kind in enumerate(bank.kinds):
        named = [GLYPHS[g] for g in bank.glyphs[tile].flatten() if 0 <= g < len(GLYPHS)]
        asked = "".join(
            q.answer for q in bank.questions[tile] if q.skill in ("fine", "sparse", "medium", "title", "label")
        )
        if kind in ("fine", "sparse", "mixed"):  # rows of patches: a line may lie across two of them
            assert len(named) >= 0.8 * len(asked)
        assert set(named) <= set(asked)


def test_questions_that_share_their_page_get_what_each_gets_alone(bank: Bank, shared: Shared) -> None:
    model = make_model(SIZES["laptop"], 0).eval()
    drawn = Pages(bank, 0)
    pages = [drawn.draw(questions=5) for _ in range(2)]
    batch = shared.batch(pages)
    pixels = normalised(torch.from_numpy(bank.pixels)[batch.tiles.flatten()])
    with torch.no_grad():
        features = model.model.vision_tower(pixel_values=pixels)[0]
        ours = answer_logits(model, batch, visual_tokens(model, features))
        alone = []
        for row, page in enumerate(pages):
            for one in page.asked:
                turns = [Turn("user", f"<image>\n{one.text}"), Turn("assistant", one.question.answer)]
                chat = shared.encoder.encode(turns, [4])
                logits = model(
                    input_ids=torch.tensor([chat.input_ids]), pixel_values=pixels[4 * row : 4 * row + 4]
                ).logits[0]
                alone.append(logits[:-1][torch.tensor(chat.answer[1:])])
    torch.testing.assert_close(ours, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_answers_count_as_right_when_all_their_tokens_are(bank: Bank, shared: Shared) -> None:
    batch = shared.batch([Pages(bank, 1).draw(questions=4) for _ in range(3)])
    truth = batch.targets[batch.predict]
    logits = torch.nn.functional.one_hot(truth, 100).float()
    assert all(ok for _, _, ok in right_answers(logits, batch))
    logits[0] = 0  # the first token of the first answer
    logits[0, 99] = 1
    answers = right_answers(logits, batch)
    assert [ok for _, _, ok in answers] == [False] + [True] * (len(answers) - 1)


def test_exported_pages_come_back_as_the_same_tiles_and_questions(bank: Bank, shared: Shared, tmp_path: Path) -> None:
    path = write_pages(tmp_path, bank, 3, seed=5)
    tiling = Tiling(64, 1, 4, False)
    corpus = Corpus.scan(path, tmp_path, tiling, questions=8, measure=True, tokens_per_tile=16)
    drawn = Pages(bank, 5)
    assert not corpus.problems
    assert len(corpus.items) == 3
    for item in corpus.items:
        page = drawn.draw()
        records = corpus.read(item)
        assert [(r.turns[0].text, r.answer) for r in records] == [
            (f"<image>\n{one.text}", one.question.answer) for one in page.asked
        ]
        cut = tiling.cut(tmp_path / records[0].images[0])
        torch.testing.assert_close(cut, normalised(torch.from_numpy(bank.pixels)[list(page.tiles)]), rtol=0, atol=1e-6)
        for record in records:
            assert shared.encoder.tokenizer.unk_token_id not in shared.encoder.encode(record.turns, [4]).input_ids
