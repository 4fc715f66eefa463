"""The first part of ``vico demo``: a trained model answers questions about pages, with every tile whole and routed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico_ext.cli.errors import CliError
from vico_ext.cli.report import describe_image, table, totals
from vico_ext.cli.route import Job, read_job, save_picture
from vico_ext.integrations import ImageReport, load_internvl
from vico_ext.routing import RoutingPolicy, ThresholdPolicy
from vico_ext.training.chat import END, IMAGE_TAG, ChatEncoder
from vico_ext.training.records import Record, parse_record

__all__ = ["FOLDER", "MAX_TILES", "Made", "Page", "Reader", "read_pages", "run_trained", "show_trained"]

FOLDER = Path(__file__).parent.parent / "data" / "small"
MAX_TILES = 4  # of a page; the model was trained on such, without thumbnails

_MADE, _QUESTIONS = "made.json", "pages/questions.jsonl"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", _MADE, _QUESTIONS)
_ALL_WHOLE = ThresholdPolicy(2.0)  # no probability is as large


@dataclass(frozen=True)
class Made:
    """What ``made.json`` says of the checkpoint beside it.

    Attributes:
        commit: of this project, at which it was made.
        command: that made it.
        threshold: a tile is compressed where its p is at least this.
        kept_score: of all test pages, routed, as a share of the score that the model it was made from has on them.
        tokens_kept: of all test pages, as a share of the visual tokens.
    """

    commit: str
    command: str
    threshold: float
    kept_score: float
    tokens_kept: float

    @classmethod
    def read(cls, folder: Path) -> Made:
        """Reads and checks the file.

        Raises:
            CliError: it is no JSON, or an entry is missing or of another kind.
        """
        path = folder / _MADE
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CliError(f"{path} must be JSON: {error}") from error
        said = said if isinstance(said, dict) else {}
        figures = said["figures"] if isinstance(said.get("figures"), dict) else {}

        def text(name: str) -> str:
            value = said.get(name)
            if not isinstance(value, str):
                raise CliError(f"{path}: {name} must be text, got {value!r}")
            return value

        def number(name: str, value: Any, most: float) -> float:
            if type(value) not in (int, float) or not 0 <= value <= most:
                raise CliError(f"{path}: {name} must be a number from 0 to {most:g}, got {value!r}")
            return float(value)

        return cls(
            commit=text("commit"),
            command=text("command"),
            threshold=number("threshold", said.get("threshold"), 1),
            kept_score=number("figures.kept_score", figures.get("kept_score"), 2),  # a router may help
            tokens_kept=number("figures.tokens_kept", figures.get("tokens_kept"), 1),
        )

    @property
    def policy(self) -> str:
        """As ``vico route --policy`` takes it."""
        return f"threshold:{self.threshold}"


@dataclass(frozen=True)
class Page:
    """A page and what is asked about it.

    Attributes:
        image: its file.
        records: a conversation per question, which ends in the right answer.
        lines: the same as ``questions.jsonl`` has them, with tile and skill.
    """

    image: Path
    records: tuple[Record, ...]
    lines: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Answers:
    """What the model said about a page.

    Attributes:
        said: to each question.
        right: of each question, whether that is the answer, token by token.
        image: what became of the page's tiles.
    """

    said: tuple[str, ...]
    right: tuple[bool, ...]
    image: ImageReport


def read_pages(folder: Path) -> list[Page]:
    """The pages that ``questions.jsonl`` asks about, in its order.

    Raises:
        CliError: a line is no question about an image.
    """
    path = folder / _QUESTIONS
    grouped: dict[str, list[tuple[Record, dict[str, Any]]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = parse_record(line)
        except ValueError as error:
            raise CliError(f"{path}, line {number}: {error}") from error
        grouped.setdefault(record.images[0], []).append((record, json.loads(line)))
    return [
        Page(path.parent / name, tuple(record for record, _ in own), tuple(line for _, line in own))
        for name, own in grouped.items()
    ]


class Reader:
    """The trained model and its tokenizer.

    Args:
        folder: of the checkpoint, in the transformers layout.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        with _no_progress_bar():
            self.model = load_internvl(folder, dtype=torch.float32).eval()
        # By its class: transformers 4.57 does not know the name that 5.x wrote for it.
        self.tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        self.tile_size = int(self.model.config.vision_config.image_size[0])
        self.tokens: tuple[int, int] = self.model.model.vico.tokens
        self.encoder = ChatEncoder(self.tokenizer, self.model.config.image_token_id, self.tokens[0])
        self.end = int(self.tokenizer.convert_tokens_to_ids(END))

    @property
    def parameters(self) -> int:
        """How many numbers its weights are."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def inputs(self, page: Page, job: Job) -> tuple[dict[str, Tensor], list[list[int]]]:
        """A row per question: just what ``vico train`` and ``vico eval`` have in front of its answer.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[B, L]``, padded on the left, and ``pixel_values``; and the ids of
            the right answers, each with its end mark.
        """
        prompts, answers = [], []
        for record in page.records:
            chat = self.encoder.encode(record.turns, [job.tiled.tiles])
            start = chat.answer.index(True)
            prompts.append(chat.input_ids[:start])
            answers.append(chat.input_ids[start : start + sum(chat.answer)])
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        pixel_values = job.tiled.pixel_values.repeat(len(prompts), 1, 1, 1)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixel_values}, answers

    def ask(self, page: Page, job: Job, policy: RoutingPolicy) -> Answers:
        """All questions about a page in one batch, answered by greedy generation."""
        inputs, answers = self.inputs(page, job)
        self.model.model.vico.policy = policy
        most = max(map(len, answers)) + 4  # answers that go on too long show that they do
        made = self.model.generate(**inputs, max_new_tokens=most, do_sample=False)
        rows = [self._until_end(row) for row in made[:, inputs["input_ids"].shape[1] :].tolist()]
        right = tuple(own == answer for own, answer in zip(rows, answers, strict=True))
        return Answers(tuple(map(self._text, rows)), right, self.model.vico_report().images[0])

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.end) + 1] if self.end in ids else ids

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Without transformers' progress bar, for what loads in no time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def run_trained(out: Path, folder: Path | None = None) -> dict[str, Any]:
    """Asks about each page both ways, and draws what became of its tiles.

    Args:
        out: folder of the pictures.
        folder: of checkpoint and pages; by default those of the package.

    Returns:
        The section of the report.

    Raises:
        CliError: the folder lacks something, or a file of it is not as it should be.
    """
    folder = FOLDER if folder is None else folder
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise CliError(
            f"{folder} must hold the trained model and the pages of the demo, it lacks {', '.join(missing)}: install "
            "vico_ext again (pip install . in its repository), where git has all of vico_ext/data"
        )
    start = time.perf_counter()
    made, reader = Made.read(folder), Reader(folder)
    pages = []
    for page in read_pages(folder):
        job = read_job(page.image, reader.tile_size, MAX_TILES, thumbnail=False)
        whole, routed = (reader.ask(page, job, policy) for policy in (_ALL_WHOLE, ThresholdPolicy(made.threshold)))
        entry = _entry(page, job, whole, routed, reader.tokens)
        right = "{right_routed} of {asked} answers are right, {right_whole} with all tiles whole.".format_map(entry)
        save_picture(out / entry["picture"], job, entry, made.policy, right)
        pages.append(entry)
    sums = {name: sum(entry[name] for entry in pages) for name in ("asked", "right_whole", "right_routed")}
    return {
        "checkpoint": str(folder),
        "parameters": reader.parameters,
        "made": asdict(made),
        "policy": made.policy,
        "pages": pages,
        "totals": {**totals(pages), **sums},
        "seconds": round(time.perf_counter() - start, 2),
    }


def _entry(page: Page, job: Job, whole: Answers, routed: Answers, tokens: tuple[int, int]) -> dict[str, Any]:
    """A page in the report."""
    image = routed.image
    questions = [
        {
            "question": record.turns[-2].text.removeprefix(IMAGE_TAG).strip(),
            "tile": line["tile"],
            "skill": line["skill"],
            "answer": record.answer,
            "tokens_of_tile": tokens[image.compressed[line["tile"]]],
            "whole": {"said": whole.said[i], "right": whole.right[i]},
            "routed": {"said": routed.said[i], "right": routed.right[i]},
        }
        for i, (record, line) in enumerate(zip(page.records, page.lines, strict=True))
    ]
    return {
        **describe_image(str(page.image), job.tiled, image.probabilities, image.compressed, tokens),
        "family": page.records[0].family,
        "picture": f"trained-{page.image.stem}.route.png",
        "asked": len(questions),
        "right_whole": sum(whole.right),
        "right_routed": sum(routed.right),
        "questions": questions,
    }


def show_trained(trained: dict[str, Any]) -> None:
    """Prints a section of the report."""
    made, sums = trained["made"], trained["totals"]
    print(
        f"A trained InternVL Flash of {trained['parameters'] / 1e6:.1f} million parameters, made from rendered pages "
        f"by this project's reproduction,\n`{made['command']}` (commit {made['commit'][:10]}).\n"
        f"On its test pages, in fonts that it never saw, it keeps {made['kept_score']:.1%} of the score of the model "
        f"that it was made\nfrom, with {made['tokens_kept']:.0%} of the visual tokens. Some of these pages:\n"
    )
    header = ("page", "family", "visual tokens", "right, all tiles whole", "right, routed")
    rows = [
        (
            Path(page["file"]).name,
            page["family"],
            f"{page['tokens_before']} -> {page['tokens_after']}",
            f"{page['right_whole']}/{page['asked']}",
            f"{page['right_routed']}/{page['asked']}",
        )
        for page in trained["pages"]
    ]
    total = (
        "total",
        "",
        f"{sums['tokens_before']} -> {sums['tokens_after']}",
        f"{sums['right_whole']}/{sums['asked']}",
        f"{sums['right_routed']}/{sums['asked']}",
    )
    print(table(header, rows, total))
    print(
        "\nA page has four tiles, told apart by the colour of a tab at their left edge. Some answers, routed by "
        f"{trained['policy']}:"
    )
    for line in _examples(trained["pages"]):
        print(f"  {line}")
    print()


def _examples(pages: Sequence[dict[str, Any]]) -> list[str]:
    """A number read right from a whole tile, the longest right answer from a compressed one, the first wrong answer."""
    asked = [(Path(page["file"]).name, question) for page in pages for question in page["questions"]]
    right = [one for one in asked if one[1]["routed"]["right"]]
    chosen = []
    for tokens in sorted({question["tokens_of_tile"] for _, question in right}, reverse=True):
        own = [one for one in right if one[1]["tokens_of_tile"] == tokens]
        chosen.append(max(own, key=lambda one: (one[1]["answer"].isdecimal(), len(one[1]["answer"]))))
    chosen += [one for one in asked if not one[1]["routed"]["right"]][:1]
    lines = []
    for page, question in chosen:
        routed = question["routed"]
        verdict = "right" if routed["right"] else f"wrong: {question['answer']}"
        tokens = question["tokens_of_tile"]
        lines.append(f"{question['question']} {routed['said']} ({verdict}), {page}, from a tile of {tokens} tokens")
    return lines
