"""Small random InternVL models of transformers, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
from device import DEVICE
from torch import Tensor, nn

import vico_ext

IMAGE = 9  # the id of a visual token's place
START, END, PAD, EOS = 7, 8, 0, 1
VOCABULARY = 96
FULL, COMPRESSED = 16, 4  # visual tokens of a tile: 112 / 14 = 8 patches in each direction
SIDE = 112


def tiny_config(text: str = "qwen2", **overrides: Any) -> Any:
    from transformers import AutoConfig, InternVLConfig, InternVLVisionConfig

    vision = InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=[SIDE, SIDE],
        patch_size=[14, 14],
    )
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    if text == "qwen3":
        heads["head_dim"] = 16
    language = AutoConfig.for_model(text, **sizes, **heads, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None)
    return InternVLConfig(
        vision_config=vision,
        text_config=language,
        image_token_id=IMAGE,
        image_seq_length=FULL,
        tie_word_embeddings=False,
        **overrides,
    )


def tiny_model(text: str = "qwen2", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose answers depend on its images, in evaluation mode."""
    from transformers import InternVLForConditionalGeneration

    torch.manual_seed(seed)
    with torch.device("cpu"):  # the same numbers wherever it goes
        model = InternVLForConditionalGeneration(tiny_config(text))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model.to(DEVICE, dtype).eval()


def tiny_flash(seed: int = 1) -> vico_ext.FlashWeights:
    """Random Flash weights of that size; the router is unsure enough to compress some tiles at 0.5 and not others."""
    torch.manual_seed(seed)
    with torch.device("cpu"):
        connector, router = vico_ext.FusedConnector(32, 48), vico_ext.VisualResolutionRouter(32)
    with torch.no_grad():
        router.gating.gate[1].weight.mul_(8)
    connector, router = connector.to(DEVICE), router.to(DEVICE)
    return vico_ext.FlashWeights(dict(connector.state_dict()), dict(router.state_dict()), 32, 48)


class Decide(vico_ext.RoutingPolicy):
    """Compresses just the tiles it is told to."""

    def __init__(self, *compress: bool) -> None:
        self.decision = compress

    def compress(self, p: Tensor, tiles_per_image: Tensor | None, tokens: tuple[int, int]) -> Tensor:
        return torch.tensor(self.decision, device=p.device)


NONE, ALL = vico_ext.ThresholdPolicy(1.0), vico_ext.ThresholdPolicy(0.0)


def row(*images: int, seed: int = 0, text: int = 5) -> list[int]:
    """Ids of a prompt with so many tiles in each image, text around each."""
    words = torch.Generator().manual_seed(seed)

    def some() -> list[int]:
        return torch.randint(10, VOCABULARY, (text,), generator=words, device="cpu").tolist()

    ids = some()
    for tiles in images:
        ids += [START, *([IMAGE] * (tiles * FULL)), END, *some()]
    return ids


def batch(*rows: list[int], side: str = "left") -> dict[str, Tensor]:
    """input_ids and attention_mask, padded."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.int64)
    for b, own in enumerate(rows):
        place = slice(longest - len(own), None) if side == "left" else slice(len(own))
        ids[b, place], mask[b, place] = torch.tensor(own), 1
    return {"input_ids": ids, "attention_mask": mask}


def pixels(tiles: int, seed: int = 0) -> Tensor:
    """Pixel values of so many tiles, each unlike the others."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(tiles, 3, 1, 1, generator=generator, device="cpu") * 3
    return (torch.randn(tiles, 3, SIDE, SIDE, generator=generator, device="cpu") * scale).to(DEVICE)


def inputs(*images: tuple[int, ...], side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """A batch with these tiles per image per row, and its pixel values."""
    rows = [row(*tiles, seed=seed + b, text=3 + b) for b, tiles in enumerate(images)]
    made = batch(*rows, side=side)
    return {**made, "pixel_values": pixels(sum(map(sum, images)), seed)}


def naive(model: Any, given: dict[str, Tensor], compress: list[bool]) -> list[tuple[Tensor, Tensor]]:
    """Each row's compressed ids ``[l]`` and embeddings ``[l, H]``, by hand, token by token, without padding.

    ``model`` is a patched model; its parts are used one tile at a time.
    """
    inner = model.model
    ids, mask = given["input_ids"], given["attention_mask"]
    vit = inner.vision_tower(pixel_values=given["pixel_values"])[0]
    tokens = []
    for t, small in enumerate(compress):
        rate, connector = (4, inner.vico.mlp2) if small else (2, inner.multi_modal_projector)
        tokens.append(connector(vico_ext.reference.pixel_shuffle(vit[t : t + 1], rate))[0])
    rows, tile = [], 0
    for own_ids, own_mask in zip(ids, mask, strict=True):
        own = own_ids[own_mask.bool()].tolist()
        kept, embeds, place = [], [], 0
        while place < len(own):
            if own[place] == IMAGE:
                kept += [IMAGE] * len(tokens[tile])
                embeds.append(tokens[tile])
                place, tile = place + FULL, tile + 1
            else:
                kept.append(own[place])
                embeds.append(model.get_input_embeddings()(torch.tensor([own[place]])))
                place += 1
        rows.append((torch.tensor(kept), torch.cat(embeds)))
    assert tile == len(compress)
    return rows


def labelled(*images: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    given = inputs(*images, side="right", seed=seed)
    hidden = (given["attention_mask"] == 0) | (given["input_ids"] == IMAGE)
    return {**given, "labels": given["input_ids"].masked_fill(hidden, -100)}


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def connectors(model: Any) -> list[nn.Module]:
    return [model.model.multi_modal_projector, model.model.vico.mlp2]
