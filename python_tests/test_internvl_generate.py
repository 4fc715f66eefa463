"""generate() of a patched transformers InternVL: prompts that come back, lengths, decoding modes, caches, streamers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_internvl import ALL, EOS, NONE, PAD, Decide, batch, inputs, naive, pixels, row, tiny_flash, tiny_model
from torch import Tensor

import vico_ext

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
)

MIXED = [True, False, False, True, True, False, True, False]
BATCH = ((2, 1), (3,), (), (1, 1))
GREEDY = {"do_sample": False, "max_new_tokens": 6}
SAMPLING = {"do_sample": True, "max_new_tokens": 6, "top_k": 20, "temperature": 0.9}
BEAMS = {"do_sample": False, "num_beams": 3, "max_new_tokens": 6}
MODES = pytest.mark.parametrize(
    "how",
    [
        GREEDY,
        SAMPLING,
        BEAMS,
        {**SAMPLING, "num_return_sequences": 3},
        {**BEAMS, "num_return_sequences": 2},
        {**GREEDY, "cache_implementation": "static"},
        {**GREEDY, "repetition_penalty": 1.3},
        {**GREEDY, "no_repeat_ngram_size": 2},
        {**GREEDY, "min_new_tokens": 5},
    ],
    ids=["greedy", "sampling", "beams", "samples", "beam samples", "static", "repetition", "ngrams", "least"],
)


def run(model: Any, given: dict[str, Any], **how: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(**given, **how)


@MODES
def test_all_whole_is_the_unpatched_model(how):
    model, given = tiny_model(), inputs(*BATCH)
    by_tile = not hasattr(transformers.GenerationMixin, "_expand_multimodal_outputs")
    if by_tile and how.keys() & {"num_beams", "num_return_sequences"}:
        # 4.57 to 5.17 copy tile by tile where they copy rows, which is right with one tile in each row alone.
        given = inputs((1,), (1,), (1,))
    want = run(model, given, **how)
    vico_ext.patch_internvl(model, policy=NONE)
    assert torch.equal(run(model, given, **how), want)


@MODES
def test_mixed_routing_is_generation_from_hand_made_embeddings(how):
    if "repetition_penalty" in how or "no_repeat_ngram_size" in how:
        pytest.skip("these read the prompt's ids, of which the unpatched model with embeddings alone has none")
    model, given = tiny_model(), inputs(*BATCH)
    vico_ext.patch_internvl(model, tiny_flash(), Decide(*MIXED))
    got = run(model, given, **how)
    copies, length = how.get("num_return_sequences", 1), given["input_ids"].shape[1]
    assert torch.equal(got[:, :length], given["input_ids"].repeat_interleave(copies, 0))
    rows = naive(model, given, MIXED)
    longest = max(len(ids) for ids, _ in rows)
    embeds, mask = torch.zeros(len(rows), longest, 48), torch.zeros(len(rows), longest, dtype=torch.int64)
    for b, (ids, own) in enumerate(rows):
        embeds[b, longest - len(ids) :], mask[b, longest - len(ids) :] = own.detach(), 1
    vico_ext.unpatch_internvl(model)
    want = run(model, {"inputs_embeds": embeds, "attention_mask": mask}, **how)
    assert torch.equal(got[:, length:], want)


def test_rows_do_not_depend_on_their_batch():
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash())
    given = inputs(*BATCH)
    together, tile = run(model, given, **GREEDY), 0
    assert 0 < model.vico_report().compressed_tiles < 8
    for b, images in enumerate(BATCH):
        ids = given["input_ids"][b, given["attention_mask"][b].bool()][None]
        own: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            own["pixel_values"] = given["pixel_values"][tile : tile + sum(images)]
        tile += sum(images)
        got = run(model, own, **GREEDY)[0, ids.shape[1] :]
        assert torch.equal(got, together[b, -6:][: len(got)])


@pytest.mark.parametrize("how", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_return_dict(how):
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash(), Decide(*MIXED))
    given = inputs(*BATCH)
    output = run(model, given, **how, return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert torch.equal(output.sequences, run(model, given, **how))
    assert torch.equal(output["sequences"], output.sequences)
    scores = model.compute_transition_scores(
        output.sequences, output.scores, getattr(output, "beam_indices", None), normalize_logits=True
    )
    assert scores.shape[1] <= 6
    assert torch.isfinite(scores).any()
    if how is GREEDY:
        assert torch.equal(output.logits[0].argmax(-1), output.sequences[:, -len(output.logits)])


def test_a_prompt_without_mask_and_a_positional_one():
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash(), Decide(*MIXED))
    given = inputs(*BATCH)
    want = run(model, given, **GREEDY)
    assert torch.equal(model.generate(given["input_ids"], pixel_values=given["pixel_values"], **GREEDY), want)


def test_embeddings_give_new_tokens_only():
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash(), Decide(*MIXED))
    given = inputs(*BATCH)
    want = run(model, given, **GREEDY)
    embeds = model.get_input_embeddings()(given.pop("input_ids")).detach()
    assert torch.equal(run(model, {**given, "inputs_embeds": embeds}, **GREEDY), want[:, -6:])


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_lengths_count_the_users_prompt(where):
    model, given = tiny_model(), inputs((2,))
    length = given["input_ids"].shape[1]
    model.generation_config.eos_token_id = None

    def new(**total: int) -> int:
        if where == "argument":
            how: dict[str, Any] = total
        elif where == "config":
            how = {"generation_config": GenerationConfig(**total, pad_token_id=PAD)}
        else:
            how = {}
            for name, value in total.items():
                setattr(model.generation_config, name, value)
        return model.generate(**given, **how, **({} if where == "config" else {"do_sample": False})).shape[1] - length

    plain = new(max_length=length + 5)
    vico_ext.patch_internvl(model, policy=ALL)
    assert new(max_length=length + 5) == plain == 5
    assert new(max_length=length + 20) == 20
    assert new(max_length=length + 4, max_new_tokens=3) == 3
    model.generation_config.max_new_tokens = None
    with pytest.raises(ValueError, match=f"max_length is {length - 1}, but the prompt has {length} tokens"):
        new(max_length=length - 1, max_new_tokens=None)


def test_least_lengths_count_the_users_prompt():
    model, given = vico_ext.patch_internvl(tiny_model(), policy=ALL), inputs((2,))
    length = given["input_ids"].shape[1]
    with torch.no_grad():  # a model that always wants to end
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = 0
    assert run(model, given, do_sample=False, max_new_tokens=9).shape[1] == length + 1
    assert run(model, given, do_sample=False, max_new_tokens=9, min_length=length + 4).shape[1] == length + 5
    assert run(model, given, do_sample=False, max_new_tokens=9, min_new_tokens=4).shape[1] == length + 5
    assert run(model, given, do_sample=False, max_new_tokens=9, min_length=length - 4).shape[1] == length + 1
    model.generation_config.min_length = length - 4  # more than the compressed prompt has
    assert run(model, given, do_sample=False, max_new_tokens=9).shape[1] == length + 1
    own = GenerationConfig(do_sample=False, max_new_tokens=9, eos_token_id=0, pad_token_id=PAD)
    assert run(model, given, generation_config=own).shape[1] == length + 1


def test_default_length_is_new_tokens():
    model, given = tiny_model(), inputs((2,))
    model.generation_config.eos_token_id = None
    want = run(model, given, do_sample=False).shape
    vico_ext.patch_internvl(model, policy=ALL)
    assert run(model, given, do_sample=False).shape == want


@pytest.mark.parametrize(
    "how", [GREEDY, {**SAMPLING, "num_return_sequences": 2}, BEAMS], ids=["greedy", "two", "beams"]
)
def test_code_of_the_callers_sees_the_prompt_that_was_passed(how):
    """Stopping criteria and the like count and cut by its length."""
    model, given = vico_ext.patch_internvl(tiny_model(), tiny_flash(), Decide(*MIXED)), inputs(*BATCH)
    model.generation_config.eos_token_id = None
    length, seen = given["input_ids"].shape[1], []
    rows = 4 * how.get("num_return_sequences", 1)  # that prefix_allowed_tokens_fn has numbers of

    def begins(ids: Tensor) -> bool:
        return torch.equal(ids[:, :length], given["input_ids"].repeat_interleave(len(ids) // 4, 0))

    def looks(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append("processor")
        assert begins(ids)
        return scores

    def stops(ids: Tensor, scores: Any, **more: Any) -> Tensor:
        seen.append("criterion")
        assert begins(ids)
        return torch.full((len(ids),), ids.shape[1] >= length + 4)

    def allows(row: int, ids: Tensor) -> list[int]:
        seen.append("allowed")
        assert torch.equal(ids[:length], given["input_ids"][row * 4 // rows])
        return list(range(20, 40))

    got = run(
        model, given, **how, logits_processor=LogitsProcessorList([looks]), prefix_allowed_tokens_fn=allows,
        stopping_criteria=StoppingCriteriaList([stops]),
    )  # fmt: skip
    assert set(seen) == {"processor", "criterion", "allowed"}
    assert got.shape[1] == length + 4
    assert ((got[:, length:] >= 20) & (got[:, length:] < 40)).all()


class Heard:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.put_tokens: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.put_tokens.append(value)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_the_users_prompt_first():
    model, given, heard = vico_ext.patch_internvl(tiny_model(), policy=ALL), inputs((2,)), Heard()
    got = run(model, given, **GREEDY, streamer=heard)
    assert torch.equal(heard.put_tokens[0].cpu(), given["input_ids"].cpu())  # generate hands over CPU tensors
    assert torch.cat([t.flatten() for t in heard.put_tokens]).tolist() == got[0].tolist()
    assert heard.ended


def turn(model: Any, ids: Tensor, tiles: Tensor | None, cache: Any) -> Any:
    extra = {} if tiles is None else {"pixel_values": tiles}
    if cache is not None:
        extra["past_key_values"] = cache
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **extra, **GREEDY, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip


def same(got: Any, want: Any) -> None:
    """Equal sequences and logits: of sequences alone a random model makes too few to tell."""
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own_cache", [False, True], ids=["returned", "passed"])
def test_several_turns_with_one_cache(own_cache):
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash(), ALL)
    model.generation_config.eos_token_id = None
    tiles, more = pixels(2, seed=3), pixels(1, seed=4)
    first = torch.tensor([row(2)])
    cache = DynamicCache() if own_cache else None
    one = turn(model, first, tiles, cache)
    cache = cache if own_cache else one.past_key_values

    second = torch.cat([one.sequences, torch.tensor([row(seed=8)])], 1)
    two = turn(model, second, None, cache)
    same(two, turn(model, second, tiles, None))

    third = torch.cat([two.sequences, torch.tensor([row(1, seed=9)])], 1)
    three = turn(model, third, more, cache)
    same(three, turn(model, third, torch.cat([tiles, more]), None))
    assert torch.equal(three.sequences[:, : third.shape[1]], third)

    with pytest.raises(ValueError, match=r"must begin with the \d+ ids of the call that filled"):
        turn(model, third[:, 1:], None, cache)


def test_a_cache_that_the_model_itself_filled():
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash(), ALL)
    model.generation_config.eos_token_id = None
    given = inputs((2,))
    filled = model(**given, use_cache=True).past_key_values
    longer = torch.cat([given["input_ids"], torch.tensor([row(seed=8)])], 1)
    same(turn(model, longer, None, filled), turn(model, longer, given["pixel_values"], None))
    filled = model(**given, use_cache=True).past_key_values
    again = {k: v for k, v in given.items() if k != "attention_mask"}
    filled = model(**again, past_key_values=filled).past_key_values
    with pytest.raises(ValueError, match="by several calls of the model itself"):
        turn(model, longer, None, filled)


def test_images_after_a_turn_without():
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash(), ALL)
    model.generation_config.eos_token_id = None
    one = turn(model, torch.tensor([row()]), None, None)
    second = torch.cat([one.sequences, torch.tensor([row(2, seed=8)])], 1)
    same(turn(model, second, pixels(2), one.past_key_values), turn(model, second, pixels(2), None))


def test_a_batch_goes_on_without_new_images_and_is_refused_with():
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash(), Decide(*MIXED))
    model.generation_config.eos_token_id = None
    given = inputs(*BATCH)
    one = run(model, given, **GREEDY, return_dict_in_generate=True)
    words = torch.tensor([row(seed=s) for s in range(4)])
    ids = torch.cat([one.sequences, words], 1)
    mask = torch.cat([given["attention_mask"], torch.ones(4, ids.shape[1] - given["input_ids"].shape[1]).long()], 1)
    whole = {"input_ids": ids, "attention_mask": mask}
    want = run(model, {**whole, "pixel_values": given["pixel_values"]}, **GREEDY)
    got = run(model, whole, **GREEDY, past_key_values=one.past_key_values)
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"new images with a filled cache .* work for one row only"):
        run(model, {**whole, "pixel_values": pixels(1)}, **GREEDY, past_key_values=one.past_key_values)


def test_a_cache_of_several_sequences_goes_on_and_one_of_beams_is_refused():
    model, given = vico_ext.patch_internvl(tiny_model(), tiny_flash(), Decide(True, False)), inputs((2,))
    model.generation_config.eos_token_id = None
    dictionary = {"return_dict_in_generate": True}
    one = run(model, given, **SAMPLING, num_return_sequences=2, **dictionary)
    longer = torch.cat([one.sequences, torch.tensor([row(seed=8)] * 2)], 1)
    whole = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    got = run(model, whole, **GREEDY, past_key_values=one.past_key_values, **dictionary, output_logits=True)
    model.model.vico.policy = Decide(True, False, True, False)
    twice = {**whole, "pixel_values": given["pixel_values"].repeat(2, 1, 1, 1)}
    same(got, run(model, twice, **GREEDY, **dictionary, output_logits=True))
    model.model.vico.policy = Decide(True, False)
    beams = run(model, given, **BEAMS, **dictionary)
    longer = torch.cat([beams.sequences, torch.tensor([row(seed=8)])], 1)
    with pytest.raises(ValueError, match="beam search, whose beams are not the sequences returned"):
        model.generate(longer, past_key_values=beams.past_key_values, **GREEDY)


def test_a_static_cache_of_ones_own():
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash(), ALL)
    given = inputs((2,))
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    assert torch.equal(run(model, given, **GREEDY, past_key_values=cache), run(model, given, **GREEDY))


def test_text_only_is_untouched():
    model = tiny_model()
    given = batch(row(seed=1), row(seed=2, text=9))
    want = run(model, given, **GREEDY)
    vico_ext.patch_internvl(model, policy=ALL)
    assert torch.equal(run(model, given, **GREEDY), want)


@pytest.mark.parametrize(
    "how",
    [{"prompt_lookup_num_tokens": 2}, {"assistant_model": "any"}, {"token_healing": True}, {"prefill_chunk_size": 4}],
    ids=lambda how: next(iter(how)),
)
def test_modes_that_are_refused(how):
    model = vico_ext.patch_internvl(tiny_model(), policy=ALL)
    with pytest.raises(ValueError, match=f"{next(iter(how))}=...\\) is not supported with images on a patched model"):
        run(model, inputs((1,)), **GREEDY, **how)


def test_other_errors():
    model = vico_ext.patch_internvl(tiny_model(), policy=ALL)
    given = inputs((1,))
    with pytest.raises(ValueError, match="pass input_ids, got none"):
        model.generate(pixel_values=given["pixel_values"])
    embeds = model.get_input_embeddings()(given["input_ids"])
    with pytest.raises(ValueError, match="not both"):
        model.generate(**given, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="not used by the model: \\['nonsense'\\]"):
        model.generate(**given, nonsense=1)
    with pytest.raises(ValueError, match="hold 0 tiles and the prompt has placeholders"):
        model.generate(**{**given, "pixel_values": given["pixel_values"][:0]})
    assert EOS != PAD
