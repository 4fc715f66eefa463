"""model.generate(**processor(...)) with transformers' own InternVL processor, on a tokenizer made here."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from device import DEVICE
from tiny_internvl import EOS, FULL, IMAGE, NONE, PAD, SIDE, tiny_flash, tiny_model

import vico_ext

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
from transformers.models.internvl.processing_internvl import InternVLProcessor  # noqa: E402

GREEDY = {"do_sample": False, "max_new_tokens": 5}
SPECIAL = [
    "<pad>",
    "<eos>",
    "<unk>",
    "<user>",
    "<assistant>",
    "<3>",
    "<4>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
]
TEMPLATE = (
    "{% for m in messages %}<user>{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}<assistant>"
)


class WithoutVideos(InternVLProcessor):
    """The processor without its video part, which needs torchvision; it asks for one of the right class else."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)


@pytest.fixture(scope="module")
def processor() -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *string.ascii_letters, *" .,?\n"])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )  # fmt: skip
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.context_image_token_id) == (PAD, EOS, IMAGE)
    # Through PIL in both versions, with torchvision or without.
    if transformers.__version__.startswith("4."):
        from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor as Tiles
    else:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil as Tiles
    tiles = Tiles(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=6)
    return WithoutVideos(tiles, tokenizer, None, image_seq_length=FULL, chat_template=TEMPLATE)


def picture(width: int, height: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator, device="cpu")
    return Image.fromarray(drawn.numpy())


def test_generate_from_what_the_processor_gives(processor):
    texts = [
        "<IMG_CONTEXT>\nWhat is this?",
        "First <IMG_CONTEXT> then <IMG_CONTEXT> and a longer question.",
        "None at all",
    ]
    images = [picture(300, 100, 0), picture(200, 200, 1), picture(50, 90, 2)]
    given = processor(images=images, text=texts, padding=True, return_tensors="pt").to(DEVICE)
    model = tiny_model()
    want = model.generate(**given, **GREEDY)
    vico_ext.patch_internvl(model, policy=NONE)
    assert torch.equal(model.generate(**given, **GREEDY), want)
    tiles = [image.tiles for image in model.vico_report().images]
    assert tiles[0] == 4  # 3 x 1 and the thumbnail
    assert sum(tiles) == len(given["pixel_values"])
    vico_ext.unpatch_internvl(model)

    vico_ext.patch_internvl(model, tiny_flash())
    got, length = model.generate(**given, **GREEDY), given["input_ids"].shape[1]
    assert torch.equal(got[:, :length], given["input_ids"])
    assert 0 < model.vico_report().compressed_tiles < sum(tiles)
    assert [image.tiles for image in model.vico_report().images] == tiles
    assert len(processor.batch_decode(got[:, length:])) == 3
    alone = processor(images=images[:1], text=texts[:1], return_tensors="pt").to(DEVICE)
    new = model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :]
    assert torch.equal(got[0, length:][: len(new)], new)


def test_generate_from_a_chat(processor):
    content = [{"type": "image", "image": picture(300, 200, 3)}, {"type": "text", "text": "What does it say?"}]
    given = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    ).to(DEVICE)  # fmt: skip
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash(), vico_ext.BudgetPolicy(fraction=0.5))
    got = model.generate(**given, **GREEDY)
    assert torch.equal(got[:, : given["input_ids"].shape[1]], given["input_ids"])
    report = model.vico_report()
    assert report.tiles == len(given["pixel_values"]) == 7  # 3 x 2 and the thumbnail
    assert report.tokens_after <= report.tokens_before / 2
