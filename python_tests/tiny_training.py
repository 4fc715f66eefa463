"""A tiny InternVL with a tokenizer in a folder, and a few conversations about drawn images."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_internvl import END, IMAGE, PAD, SIDE, START, tiny_model

from vico_ext.training import ConsistencyOptions, RouterOptions

MARKS = {"<pad>": PAD, "<|im_end|>": 1, "<|im_start|>": 2, "<unk>": 4}
MARKS |= {"<img>": START, "</img>": END, "<IMG_CONTEXT>": IMAGE}
CHARACTERS = "\n " + string.ascii_lowercase + string.digits + "?.<>|_"


def save_tokenizer(folder: Path) -> None:
    """One token per character."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {**MARKS, **{c: 10 + i for i, c in enumerate(CHARACTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)


def save_model(folder: Path, seed: int = 0) -> Path:
    """A random model whose answers depend on its images, in the transformers layout."""
    tiny_model(seed=seed).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_data(folder: Path, images: int = 12, questions: int = 1, seed: int = 0) -> Path:
    """Images of one to three tiles with a question or more each, as JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(images):
        columns = 1 + number % 2
        coarse = rng.integers(0, 255, (4, 4 * columns, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((SIDE * columns, SIDE)))
        if number % 3 == 0:  # fine print
            picture = np.where(rng.random((*picture.shape[:2], 1)) < 0.5, 255 - picture, picture)
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number}.png")
        for question in range(questions):
            answer = "".join(rng.choice(list(string.digits), 3 + number % 3))
            asked = {"from": "human", "value": f"<image>\nread {question}?"}
            said = {"from": "gpt", "value": answer}
            family = "fine" if number % 3 == 0 else "coarse"
            lines.append({"image": f"{number}.png", "family": family, "conversations": [asked, said]})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


TINY: dict[str, Any] = {
    "steps": 4, "batch": 4, "micro_batch": 2, "workers": 0, "tensorboard": False, "save_every": 2, "learning_rate": 3e-3
}  # fmt: skip


def consistency(model: Path, data: Path, out: Path, **changes: Any) -> ConsistencyOptions:
    return ConsistencyOptions(**{**TINY, "model": str(model), "data": str(data), "out": str(out), **changes})


def router(model: Path, data: Path, out: Path, **changes: Any) -> RouterOptions:
    return RouterOptions(**{**TINY, "model": str(model), "data": str(data), "out": str(out), **changes})


def metrics(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is a matter of time."""
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "samples_per_s", "tokens_per_s")
    return [{k: v for k, v in entry.items() if k not in timed} for entry in entries]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a folder's safetensors, and below it."""
    from safetensors.torch import load_file

    found = sorted(folder.rglob("*.safetensors"))
    return {f"{f.relative_to(folder)}:{k}": v for f in found for k, v in load_file(f).items()}
