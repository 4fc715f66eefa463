"""The tokenizer: a token per character, and one for each phrase that every conversation has."""

from __future__ import annotations

import string
from typing import Any

from reproduce.drawing import TABS

__all__ = ["END", "IMAGE", "PAD", "VOCABULARY", "make_tokenizer"]

_MARKS = ("<pad>", "<|im_end|>", "<|im_start|>", "<unk>", "<img>", "</img>", "<IMG_CONTEXT>")
_ASKED = ("title", "label", "kind", "color", "shape", "count")
# Cut out whole, longest first; what is left is cut into characters.
_PHRASES = (
    *(f"{name} tab " for name in TABS),
    *(f"line {n}?" for n in range(1, 6)),
    *(f"{word}?" for word in _ASKED),
    "assistant\n",
    "user\n",
)
_CHARACTERS = "\n ?" + string.ascii_lowercase + string.digits
VOCABULARY = {token: number for number, token in enumerate((*_MARKS, *_PHRASES, *_CHARACTERS))}
PAD, END, IMAGE = VOCABULARY["<pad>"], VOCABULARY["<|im_end|>"], VOCABULARY["<IMG_CONTEXT>"]


def make_tokenizer() -> Any:
    """A tokenizer of transformers with InternVL's special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(dict(VOCABULARY), unk_token="<unk>"))
    pattern = "|".join(phrase.replace("?", r"\?") for phrase in _PHRASES) + r"|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in _MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>"
    )
