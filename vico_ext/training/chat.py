"""Conversations as token ids: InternVL's ChatML, with a run of placeholders for each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ChatEncoder", "EncodedChat", "Turn"]

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
SYSTEM = "<|im_start|>system\n"
IMAGE_TAG, IMAGE_START, IMAGE_END = "<image>", "<img>", "</img>"


@dataclass(frozen=True)
class Turn:
    """One message: ``role`` is system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True)
class EncodedChat:
    """Token ids of a conversation.

    Attributes:
        input_ids: all of it, every tile with the placeholders of a whole one.
        answer: of each position, whether its token belongs to an answer (the end mark included), so is learned.
    """

    input_ids: list[int]
    answer: list[bool]


class ChatEncoder:
    """Tokenizes conversations.

    Args:
        tokenizer: of the model.
        image_token_id: the placeholder.
        tokens_per_tile: of a whole tile.
        system: message of conversations without one; none where empty.

    Raises:
        ValueError: the tokenizer lacks InternVL's special tokens.
    """

    def __init__(self, tokenizer: Any, image_token_id: int, tokens_per_tile: int, system: str = "") -> None:
        self.tokenizer, self.image_token_id, self.tokens_per_tile = tokenizer, image_token_id, tokens_per_tile
        self.system = system
        missing = [mark for mark in ("<|im_start|>", END, IMAGE_START, IMAGE_END) if len(self._ids(mark)) != 1]
        if missing:
            raise ValueError(
                f"the tokenizer has no single token for {', '.join(missing)}: it is not that of an InternVL checkpoint"
            )
        self.placeholder = tokenizer.convert_ids_to_tokens(image_token_id)

    def encode(self, turns: Sequence[Turn], tiles_per_image: Sequence[int]) -> EncodedChat:
        """The conversation, its n-th ``<image>`` with the placeholders of ``tiles_per_image[n]`` tiles.

        Raises:
            ValueError: the tags are not as many as the images, or a text holds the placeholder itself.
        """
        ids: list[int] = []
        answer: list[bool] = []
        images = list(tiles_per_image)

        def add(tokens: list[int], learned: bool = False) -> None:
            ids.extend(tokens)
            answer.extend([learned] * len(tokens))

        if self.system and (not turns or turns[0].role != "system"):
            turns = [Turn("system", self.system), *turns]
        for turn in turns:
            if self.placeholder in turn.text:
                raise ValueError(f"a message holds {self.placeholder}, which stands for visual tokens only")
            if turn.role == "assistant":
                add(self._ids(ASSISTANT))
                add(self._ids(turn.text + END), learned=True)
            else:
                head = SYSTEM if turn.role == "system" else USER
                for number, piece in enumerate((head + turn.text).split(IMAGE_TAG)):
                    if number:
                        if not images:
                            raise ValueError(f"there are more {IMAGE_TAG} tags than images ({len(tiles_per_image)})")
                        count = images.pop(0) * self.tokens_per_tile
                        add([*self._ids(IMAGE_START), *([self.image_token_id] * count), *self._ids(IMAGE_END)])
                    add(self._ids(piece))
                add(self._ids(END))
            add(self._ids("\n"))
        if images:
            raise ValueError(f"there are fewer {IMAGE_TAG} tags than images ({len(tiles_per_image)})")
        return EncodedChat(ids, answer)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
