"""The model's parts one by one: vision features once, then any routing of them, then the answers' hidden states."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vico_ext import functional as VF
from vico_ext.routing import RoutingPlan
from vico_ext.tokens import merge_visual_tokens
from vico_ext.training.batches import MicroBatch
from vico_ext.training.models import adapters_off, tokens_per_tile

__all__ = ["Reference", "answer_hidden", "both_rates", "evaluating", "frozen_copy", "vision_features", "visual_tokens"]


def vision_features(tower: nn.Module, pixel_values: Tensor) -> Tensor:
    """The ViT's last hidden state ``[P, 1 + N, V]`` of pixel values ``[P, 3, S, S]``."""
    return tower(pixel_values=pixel_values.to(next(tower.parameters()).dtype))[0]


def visual_tokens(model: Any, vit_tokens: Tensor, plan: RoutingPlan) -> Tensor:
    """``[T, H]`` of a patched model, packed in tile order; the chosen connector alone runs on a tile."""
    return model.model.vico.connect(vit_tokens, plan, model.model.multi_modal_projector)


def both_rates(model: Any, vit_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Each tile's visual tokens at both rates: ``[P, full, H]`` and ``[P, compressed, H]``."""
    inner = model.model
    whole = inner.multi_modal_projector(VF.pixel_shuffle(vit_tokens, 2))
    x = vit_tokens.to(next(inner.vico.mlp2.parameters()).dtype)
    return whole, inner.vico.mlp2(VF.pixel_shuffle(x, 4))


def answer_hidden(
    language_model: nn.Module,
    tokens: Tensor,
    plan: RoutingPlan,
    input_ids: Tensor,
    attention_mask: Tensor,
    predict: Tensor,
    placeholder: int,
) -> Tensor:
    """The language model's last hidden states ``[N, H]`` at the N positions of ``predict``, in reading order.

    Args:
        language_model: without its head.
        tokens: ``[T, H]``, packed in tile order.
        plan: of the rows' tiles in reading order.
        input_ids: ``[B, L]``, padded on the right.
        attention_mask: ``[B, L]``.
        predict: ``[B, L]`` bool, no placeholder among them.
        placeholder: id of a visual token's place.
    """
    model: Any = language_model
    embeds = model.get_input_embeddings()(input_ids)
    sequence = merge_visual_tokens(
        embeds,
        tokens,
        input_ids,
        plan,
        placeholder_id=placeholder,
        attention_mask=attention_mask,
        padding_side="right",
    )
    hidden = model(
        inputs_embeds=sequence.inputs_embeds, attention_mask=sequence.attention_mask, use_cache=False
    ).last_hidden_state
    return hidden[sequence.take(predict)]


def frozen_copy(module: nn.Module, trained: set[int]) -> nn.Module:
    """A copy for evaluation that shares the parameters whose ids are not in ``trained``, and all buffers."""
    shared: list[Tensor] = [p for p in module.parameters() if id(p) not in trained]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*shared, *module.buffers()]}
    return copy.deepcopy(module, memo).requires_grad_(False).eval()


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode, as they were afterwards."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


class Reference(nn.Module):
    """The frozen model that sees every tile whole.

    Args:
        model: the policy before training, patched, without adapters; or another model of this size.
        trained: ids of the parameters of ``model`` that will train: those are copied, the others shared.
        borrow: use the language model and the ViT that ``model`` has at each call, its adapters off, and copy neither.
        share: False copies all (sharded models cannot share).
    """

    def __init__(self, model: Any, trained: set[int], *, borrow: bool = False, share: bool = True) -> None:
        super().__init__()
        if not share:
            trained = {id(p) for p in model.parameters()}
        inner = model.model
        self.config = model.config
        self.projector = frozen_copy(inner.multi_modal_projector, trained)
        self.head: Any = frozen_copy(model.lm_head, trained)
        own_tower = not borrow and any(id(p) in trained for p in inner.vision_tower.parameters())
        self.tower = frozen_copy(inner.vision_tower, trained) if own_tower else None
        self.language_model = None if borrow else frozen_copy(inner.language_model, trained)
        self._borrowed = [model] if borrow else []  # in a list: it is no part of this module

    @torch.no_grad()
    def hidden(self, batch: MicroBatch, vit_tokens: Tensor) -> Tensor:
        """The answers' hidden states ``[N, H]``, all tiles whole.

        The head is :attr:`head`.

        Args:
            batch: B rows.
            vit_tokens: ``[P, 1 + N, V]`` of the policy's ViT; used where this model has none of its own.
        """
        if self.tower is not None:
            vit_tokens = vision_features(self.tower, batch.pixel_values)
        tiles = batch.tiles_of_item
        vit_tokens = vit_tokens.to(next(self.projector.parameters()).dtype)  # a ViT that trains is in float32
        whole = self.projector(VF.pixel_shuffle(vit_tokens, 2))
        order = torch.tensor([tile for item in batch.item_of_row for tile in tiles[item]], device=whole.device)
        none = torch.zeros(len(order), dtype=torch.bool, device=whole.device)
        plan = RoutingPlan.from_compress(none, tokens_per_tile(self.config), compressed_tiles=0)
        tokens = whole[order].flatten(0, 1)
        given = (tokens, plan, batch.input_ids, batch.attention_mask, batch.predict, self.config.image_token_id)
        if self.language_model is not None:
            return answer_hidden(self.language_model, *given)
        policy = self._borrowed[0].model.language_model
        with adapters_off(policy), evaluating(policy):
            return answer_hidden(policy, *given)
