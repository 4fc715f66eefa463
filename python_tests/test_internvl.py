"""patch_internvl on transformers' own InternVL: forward, equality with the unpatched model, reversibility, errors."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from device import DEVICE, cpu_only, value_case
from tiny_internvl import (
    ALL,
    COMPRESSED,
    FULL,
    IMAGE,
    NONE,
    Decide,
    batch,
    inputs,
    naive,
    pixels,
    row,
    tiny_flash,
    tiny_model,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vico_ext

pytest.importorskip("transformers")

MIXED = [True, False, False, True, True, False, True, False]
BATCH = ((2, 1), (3,), (), (1, 1))  # tiles of each image of each row: 8 in all


@pytest.fixture
def model() -> Any:
    return tiny_model()


languages = pytest.mark.parametrize("text", ["qwen2", "qwen3"])


def logits(model: Any, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


@languages
@pytest.mark.parametrize("side", ["left", "right"])
def test_all_whole_is_the_unpatched_model_bit_for_bit(text, side):
    model = tiny_model(text)
    given = inputs(*BATCH, side=side)
    want = logits(model, given)
    vico_ext.patch_internvl(model, policy=NONE)
    assert torch.equal(logits(model, given), want)
    assert model.vico_report().tokens_saved == 0


@languages
@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_routing_is_the_language_model_on_hand_made_embeddings(text, side):
    model = tiny_model(text)
    given = inputs(*BATCH, side=side)
    vico_ext.patch_internvl(model, tiny_flash(), Decide(*MIXED))
    with torch.no_grad():
        output = model(**given, output_hidden_states=True)
        rows = naive(model, given, MIXED)
        assert output.logits.shape[1] == max(len(ids) for ids, _ in rows)
        assert output.image_hidden_states.shape == (sum(COMPRESSED if c else FULL for c in MIXED), 48)
        for b, (ids, embeds) in enumerate(rows):
            want = model.lm_head(model.model.language_model(inputs_embeds=embeds[None]).last_hidden_state)[0]
            own = slice(-len(ids), None) if side == "left" else slice(len(ids))
            torch.testing.assert_close(output.logits[b, own], want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("policy", [None, vico_ext.PerImagePolicy(0.4, 0.0)], ids=["default", "per image"])
def test_rows_do_not_depend_on_their_batch(model, policy):
    vico_ext.patch_internvl(model, tiny_flash(), policy)
    given = inputs(*BATCH)
    together = logits(model, given)[:, -1]
    decided = [image.compressed for image in model.vico_report().images]
    assert 0 < model.vico_report().compressed_tiles < 8
    tile, alone = 0, []
    for b, images in enumerate(BATCH):
        own = slice(tile, tile + sum(images))
        tile = own.stop
        single = {k: v[b : b + 1] for k, v in given.items() if k != "pixel_values"}
        if images:
            single["pixel_values"] = given["pixel_values"][own]
        torch.testing.assert_close(logits(model, single)[0, -1], together[b], rtol=1e-5, atol=2e-6)
        alone += [image.compressed for image in model.vico_report().images] if images else []
    assert alone == decided


def test_labels_and_position_ids_go_with_their_tokens(model):
    given = inputs((2,), (1, 1), side="right")
    labels = given["input_ids"].masked_fill((given["attention_mask"] == 0) | (given["input_ids"] == IMAGE), -100)
    positions = (given["attention_mask"].cumsum(1) - 1).clamp_min(0)
    compress = [True, False, False, True]
    vico_ext.patch_internvl(model, tiny_flash(), Decide(*compress))
    with torch.no_grad():
        output = model(**given, labels=labels, position_ids=positions)
        losses = []
        for ids, embeds in naive(model, given, compress):
            states = model.model.language_model(inputs_embeds=embeds[None]).last_hidden_state
            target = ids.masked_fill(ids == IMAGE, -100)[1:]
            losses.append(nn.functional.cross_entropy(model.lm_head(states)[0, :-1], target, reduction="none"))
    counted = torch.cat(losses)
    want = counted.sum() / (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(output.loss, want, rtol=1e-5, atol=1e-6)


def test_embeddings_instead_of_ids(model):
    vico_ext.patch_internvl(model, tiny_flash(), Decide(*MIXED))
    given = inputs(*BATCH)
    want = logits(model, given)
    embeds = model.get_input_embeddings()(given["input_ids"]).detach()
    beside = {k: given[k] for k in ("attention_mask", "pixel_values")}
    got = logits(model, {**beside, "inputs_embeds": embeds})
    for b in range(len(BATCH)):
        torch.testing.assert_close(got[b, -1], want[b, -1], rtol=1e-5, atol=2e-6)


def test_other_dtypes_of_ids_and_masks(model):
    vico_ext.patch_internvl(model, tiny_flash(), Decide(*MIXED))
    given = inputs(*BATCH)
    want = logits(model, given)
    assert torch.equal(logits(model, {**given, "input_ids": given["input_ids"].int()}), want)
    for dtype in (torch.bool, torch.int32, torch.float32):
        assert torch.equal(logits(model, {**given, "attention_mask": given["attention_mask"].to(dtype)}), want)


def test_text_only_calls_and_image_features_are_untouched(model):
    given = batch(row(seed=1), row(seed=2, text=9))
    tiles = pixels(2)
    want, features = logits(model, given), model.get_image_features(tiles)
    vico_ext.patch_internvl(model, policy=ALL)
    assert torch.equal(logits(model, given), want)
    again = model.get_image_features(tiles)
    pooled = (getattr(x, "pooler_output", x) for x in (features, again))
    assert torch.equal(*pooled)
    with pytest.raises(ValueError, match="no call with images yet"):
        model.vico_report()


def test_tensors_of_the_prompts_shape_go_along(model):
    vico_ext.patch_internvl(model, policy=ALL)
    seen: dict[str, Any] = {}
    model.__dict__["forward"].previous = lambda **kw: seen.update(kw) or {}
    given = inputs((1,))
    shifted = torch.arange(given["input_ids"].numel())[None]
    model(**given, shift_labels=shifted, weights=shifted + 1)
    kept = shifted[:, [i for i in range(shifted.shape[1]) if not 4 + COMPRESSED <= i < 4 + FULL]]
    assert torch.equal(seen["shift_labels"], kept)
    assert torch.equal(seen["weights"], kept + 1)


def test_a_second_image_in_a_manual_loop_with_a_cache(model):
    vico_ext.patch_internvl(model, tiny_flash(), ALL)
    given, second = inputs((1,)), inputs((2,), seed=5)
    with torch.no_grad():
        first = model(**given, use_cache=True)
        mask = torch.ones(1, first.logits.shape[1] + second["input_ids"].shape[1], dtype=torch.int64)
        got = model(**{**second, "attention_mask": mask}, past_key_values=first.past_key_values).logits
    both = {k: torch.cat([given[k], second[k]], 1) for k in ("input_ids", "attention_mask")}
    whole = logits(model, {**both, "pixel_values": torch.cat([given["pixel_values"], second["pixel_values"]])})
    torch.testing.assert_close(got, whole[:, -got.shape[1] :], rtol=1e-5, atol=2e-6)


def snapshot(model: Any) -> dict[str, Any]:
    hidden = {k: v for k, v in model.__dict__.items() if not k.startswith("_")}
    return {"attributes": hidden, "config": model.config.to_dict(), "state": copy.deepcopy(model.state_dict())}


@pytest.mark.parametrize("flash", [None, "weights"])
def test_unpatching_restores_the_model(model, flash):
    given = inputs(*BATCH)
    before, want = snapshot(model), logits(model, given)
    classes = {n: (type(m), type(m).forward) for n, m in model.named_modules()}
    assert vico_ext.patch_internvl(model, flash and tiny_flash()) is model
    assert {n: (type(m), type(m).forward) for n, m in model.named_modules() if ".vico" not in n} == classes
    assert "vico" in model.config.to_dict()
    model(**given)
    assert vico_ext.unpatch_internvl(model) is model
    after = snapshot(model)
    assert after["attributes"].keys() == before["attributes"].keys()
    assert after["config"] == before["config"]
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())
    assert torch.equal(logits(model, given), want)
    with pytest.raises(ValueError, match="not patched"):
        vico_ext.unpatch_internvl(model)


def test_the_parts_are_submodules_under_their_released_names(model):
    weights = tiny_flash()
    vico_ext.patch_internvl(model, weights)
    state = model.state_dict()
    for name, tensor in {**weights.connector, **weights.router}.items():
        if name.startswith("mlp2"):
            assert torch.equal(state[f"model.vico.{name}"], tensor)
        elif not name.startswith("mlp1"):
            assert torch.equal(state[f"model.vico.router.{name}"], tensor)
    assert torch.equal(state["model.multi_modal_projector.linear_2.bias"], weights.connector["mlp1.3.bias"])
    model.to(torch.float64)
    assert {p.dtype for p in model.model.vico.parameters()} == {torch.float64}


def test_weights_from_a_state_dict(model):
    weights = tiny_flash()
    vico_ext.patch_internvl(model, {**weights.connector, **weights.router})
    assert torch.equal(model.model.vico.mlp2[7].bias, weights.connector["mlp2.7.bias"])
    other = vico_ext.patch_internvl(tiny_model(), model.state_dict())
    assert torch.equal(other.model.vico.mlp2[7].bias, weights.connector["mlp2.7.bias"])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_patched_models_of_their_own(clone):
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash())
    given = inputs(*BATCH)
    want = logits(model, given)
    other = clone(model)
    assert torch.equal(logits(other, given), want)
    assert other.vico_report() == model.vico_report()
    vico_ext.unpatch_internvl(model)
    other.model.vico.policy = ALL
    logits(other, given)
    assert other.vico_report().compressed_tiles == 8
    assert other.config.vico["policy"] == {"type": "ThresholdPolicy", "threshold": 0.0}


@pytest.mark.parametrize(
    "policy", [None, vico_ext.BudgetPolicy(fraction=0.5), vico_ext.ReleasedPolicy(0.3, 0.1)], ids=repr
)
def test_saved_and_loaded(tmp_path, model, policy):
    from transformers import AutoModelForImageTextToText

    vico_ext.patch_internvl(model, tiny_flash(), policy)
    given = inputs(*BATCH)
    want = logits(model, given)
    model.save_pretrained(tmp_path)
    with torch.device("cpu"):  # where the model was made: a GPU computes other frequencies for the rotary embedding
        loaded = vico_ext.load_internvl(tmp_path).to(DEVICE)
    assert loaded.config.vico == model.config.vico
    assert loaded.model.vico.policy == model.model.vico.policy
    assert torch.equal(logits(loaded, given), want)
    model.model.vico.policy = NONE
    with torch.device("cpu"):
        stock = AutoModelForImageTextToText.from_pretrained(tmp_path).to(DEVICE)
    assert torch.equal(logits(stock, given), logits(model, given))


def test_a_policy_of_ones_own_must_be_given_again(tmp_path):
    model = vico_ext.patch_internvl(tiny_model(), policy=Decide(True))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"routing policy Decide, .* pass policy="):
        vico_ext.load_internvl(tmp_path)
    assert vico_ext.load_internvl(tmp_path, NONE).model.vico.policy == NONE


def test_the_report():
    model = vico_ext.patch_internvl(tiny_model(), policy=Decide(*MIXED))
    model(**inputs(*BATCH))
    report = model.vico_report()
    assert [image.compressed for image in report.images] == [
        (True, False), (False,), (True, True, False), (True,), (False,)
    ]  # fmt: skip
    assert all(0 < p < 1 for image in report.images for p in image.probabilities)
    assert (report.tiles, report.compressed_tiles, report.compressed_share) == (8, 4, 0.5)
    assert (report.tokens_before, report.tokens_after, report.tokens_saved) == (128, 80, 48)
    assert str(report) == "5 images, 8 tiles, 4 compressed (50%); visual tokens 128 -> 80"


class CountOps(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@cpu_only("counts what Python asks of the dispatcher; the device's own waits are in test_cuda.py")
@pytest.mark.parametrize(
    ("policy", "rows", "syncs"),
    [
        (vico_ext.BudgetPolicy(fraction=0.5), 1, 0),
        (vico_ext.ThresholdPolicy(0.5), 1, 1),
        (vico_ext.ThresholdPolicy(0.5), 2, 1),
        (vico_ext.PerImagePolicy(0.5, 0.0), 2, 1),
        (vico_ext.BudgetPolicy(fraction=0.5), 2, 1),
    ],
)
def test_host_syncs_and_no_loop_over_tiles(policy, rows, syncs, monkeypatch):
    from vico_ext.integrations.internvl_visual import encode

    model = vico_ext.patch_internvl(tiny_model(), tiny_flash(), policy)
    lists: list[int] = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: lists.append(1) or to_list(t))
    counts = []
    for tiles in (2, 7):
        given = inputs(*(((tiles,),) * rows))
        lists.clear()
        with CountOps() as mode:  # with gradients, so that both connectors run whatever is decided
            encode(model, given["pixel_values"], given["input_ids"], None, given["attention_mask"])
        items = [
            op for op in mode.ops if op.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.masked_sel"))
        ]
        assert len(items) + len(lists) == syncs
        counts.append(len(mode.ops))
    assert counts[0] == counts[1]


# Both compress all tiles. Where a policy fixes their number beforehand, the device compares ids and tiles.
@pytest.mark.parametrize("policy", [vico_ext.ThresholdPolicy(1e-6), value_case(ALL)])
def test_errors_of_inputs(model, policy):
    vico_ext.patch_internvl(model, policy=policy)
    given = inputs((2,))
    short = {**given, "pixel_values": given["pixel_values"][:1]}
    with pytest.raises(
        ValueError, match=r"hold 1 tiles, each of which needs 16 consecutive placeholders .* have 32 placeholders"
    ):
        model(**short)
    with pytest.raises(ValueError, match="images and prompt do not match"):
        model.generate(**short, max_new_tokens=1)
    with pytest.raises(ValueError, match="attention_mask must have the shape of the prompt"):
        model(**{**given, "attention_mask": given["attention_mask"][:, :-1]})
    with pytest.raises(ValueError, match=r"must have shape \[tiles, channels, height, width\]"):
        model(**{**given, "pixel_values": given["pixel_values"][None]})
    with pytest.raises(ValueError, match=r"must hold tiles of 112 x 112 pixels, .* got 56 x 56"):
        model(**{**given, "pixel_values": given["pixel_values"][:, :, :56, :56]})
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(pixel_values=given["pixel_values"])
    with pytest.raises(ValueError, match="vision_feature_layer must be -1"):
        model(**given, vision_feature_layer=-2)
    with pytest.raises(ValueError, match="logits_to_keep counts positions"):
        model(**given, logits_to_keep=torch.tensor([3]))
    with pytest.raises(ValueError, match="hold 0 tiles and the prompt has placeholders"):
        model(**{**given, "pixel_values": given["pixel_values"][:0]})
    filled = model(**given, use_cache=True).past_key_values
    two = inputs((1,), (1,))
    with pytest.raises(ValueError, match="for one row only"):
        model(**two, past_key_values=filled)


def test_errors_of_patching(tmp_path):
    model = tiny_model()
    vico_ext.patch_internvl(model)
    with pytest.raises(ValueError, match=r"patched already: vico_ext.unpatch_internvl\(model\) first"):
        vico_ext.patch_internvl(model)
    vico_ext.unpatch_internvl(model)
    with pytest.raises(TypeError, match="InternVLForConditionalGeneration of transformers, got Linear"):
        vico_ext.patch_internvl(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"got DataParallel: .*pass model.module"):
        vico_ext.patch_internvl(nn.DataParallel(model))
    with pytest.raises(TypeError, match="got InternVLModel"):
        vico_ext.patch_internvl(model.model)
    with pytest.raises(TypeError, match="policy must be a RoutingPolicy"):
        vico_ext.patch_internvl(model, policy=0.5)
    other = vico_ext.FlashWeights({}, {}, 64, 96)
    with pytest.raises(ValueError, match="ViT of width 64 and a language model of width 96, this model has 32 and 48"):
        vico_ext.patch_internvl(model, other)
    with pytest.raises(vico_ext.FlashCheckpointError, match="not a Flash checkpoint"):
        vico_ext.patch_internvl(model, model.state_dict())
    with pytest.raises(vico_ext.FlashCheckpointError):
        vico_ext.patch_internvl(model, tmp_path / "nothing")
    for flash in (None, tiny_flash()):
        with pytest.raises(
            ValueError, match=r"no weights in memory .* keep model.multi_modal_projector out of what is off"
        ):
            vico_ext.patch_internvl(copy.deepcopy(model).to("meta"), flash)
    assert not hasattr(model.model, "vico")
    assert "forward" not in model.__dict__
    with pytest.raises(RuntimeError, match=r"nn.DataParallel cannot copy a patched InternVL.* one process per GPU"):
        vico_ext.patch_internvl(tiny_model()).model.vico._replicate_for_data_parallel()
    for change, text in (
        ({"vision_feature_layer": -2}, "last layer"),
        ({"downsample_ratio": 1.0}, "2 x 2"),
    ):
        changed = tiny_model()
        for name, value in change.items():
            setattr(changed.config, name, value)
        with pytest.raises(ValueError, match=text):
            vico_ext.patch_internvl(changed)
    odd = tiny_model()
    odd.config.vision_config.image_size = [84, 84]
    with pytest.raises(ValueError, match="6 x 6"):
        vico_ext.patch_internvl(odd)


def test_without_a_transformers_that_will_do():
    code = (
        "import sys, types, vico_ext; assert 'transformers' not in sys.modules\n"
        "fake = types.ModuleType('transformers'); fake.__version__ = '4.52.1'\n"
        "for module, text in ((None, 'pip install'), (fake, 'needs transformers 4.57')):\n"
        "    sys.modules['transformers'] = module\n"
        "    try: vico_ext.patch_internvl(object())\n"
        "    except ImportError as error: assert text in str(error), error\n"
        "    else: raise SystemExit('no error')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
