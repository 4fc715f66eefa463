"""The parts of training: options, data, loss ratios, references, the start of connector 64, evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from tiny_internvl import COMPRESSED, FULL, IMAGE, NONE, Decide
from tiny_training import consistency, metrics, router, save_data, save_model, tensors

import vico_ext
from vico_ext import cli
from vico_ext.training import ConsistencyOptions, build_options, read_yaml
from vico_ext.training.batches import BatchOrder, Draw, MicroBatch
from vico_ext.training.chat import Turn
from vico_ext.training.consistency import draw_rates
from vico_ext.training.evaluation import Evaluation, random_like
from vico_ext.training.losses import answer_divergence, row_means
from vico_ext.training.models import connector_64_from_256, load_model
from vico_ext.training.options import EvalOptions
from vico_ext.training.records import BadRecordError, parse_record
from vico_ext.training.router import RatioWindow
from vico_ext.training.setup import load_reference, read_data, set_up
from vico_ext.training.trainer import learning_rate, train

for module in ("transformers", "accelerate", "peft"):
    pytest.importorskip(module)

PATHS = {"model": "m", "data": "d", "out": "o"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the layers are tiny
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def flash(model, tmp_path_factory):
    """The same with a second connector and a router."""
    folder = tmp_path_factory.mktemp("flash")
    save_model(folder)
    patched, _ = load_model(model, torch.float32, 5)
    with torch.no_grad():
        patched.model.vico.router.gating.gate[1].weight.mul_(8)
    patched.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_data(tmp_path_factory.mktemp("data"), images=6, questions=2)


def test_options_come_from_defaults_then_yaml_then_flags(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\nout: o\nprecision: no\nbatch: 8\nlearning_rate: 1e-3\n")
    flags = {"batch": "16", "tensorboard": "false"}
    options = build_options(ConsistencyOptions, read_yaml(tmp_path / "run.yaml"), flags)
    assert (options.batch, options.learning_rate, options.precision) == (16, 1e-3, "no")
    assert (options.tensorboard, options.train) == (False, "llm")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "model is missing: give it in the YAML file or as --model"),
        ({**PATHS, "bach": 3}, "there is no option bach: did you mean batch?"),
        ({**PATHS, "batch": "2.5"}, "batch must be a whole number, got '2.5'"),
        ({**PATHS, "batch": 0}, "batch must be at least 1, got 0"),
        ({**PATHS, "train": "more"}, "train must be one of connector64, connectors, llm, all, lora, got 'more'"),
        ({**PATHS, "compress_share": 2}, "compress_share must be from 0 to 1, got 2"),
        ({**PATHS, "thumbnail": "maybe"}, "thumbnail must be true or false, got 'maybe'"),
        ({**PATHS, "batch": 6, "micro_batch": 4}, "batch must be a multiple of micro_batch, got 6 and 4"),
        ({**PATHS, "reference": "adapters_off"}, "reference: adapters_off needs train: lora, got llm"),
    ],
)
def test_options_that_cannot_be(given, message):
    with pytest.raises(ValueError) as error:
        build_options(ConsistencyOptions, given)
    assert str(error.value).startswith(message)


def line(**changes: Any) -> str:
    said = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "7"}]
    return json.dumps({"image": "a.png", "conversations": said, **changes})


def test_records_of_both_forms_are_the_same():
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "7"}]
    other = json.dumps({"images": ["a.png"], "messages": messages})
    assert parse_record(line()) == parse_record(other)
    assert parse_record(line()).turns == (Turn("user", "<image>\nwhat?"), Turn("assistant", "7"))
    assert parse_record(line(width=30, height=20)).sizes == ((30, 20),)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("[1]", "must be a JSON object, got list"),
        ("{", "not JSON: "),
        (line(image=3), "'image' must be a path or a list of paths, got 3"),
        (line(image=[]), "'image' must be a path or a list of paths, got []"),
        (line(conversations=[]), "'conversations' must be a list of messages, got []"),
        (line(conversations=[{"from": "bot", "value": "x"}]), "message 1 is from 'bot', expected one of human"),
        (line(conversations=[{"from": "human", "value": " "}]), "message 1 must have text, got ' '"),
        (line(conversations=[{"from": "gpt", "value": "x"}]), "messages must alternate between user and assistant"),
        (line(image=["a", "b"], conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]),
         "there are 1 <image> tags and 2 images"),
    ],
)  # fmt: skip
def test_malformed_records(bad, message):
    with pytest.raises(BadRecordError) as error:
        parse_record(bad)
    assert str(error.value).startswith(message)


def test_conversations_as_tokens(model, data):
    config = load_model(model, torch.float32, 0)[0].config
    samples = read_data(consistency(model, data, Path("o"), system="be brief"), config, measure=False)
    said = [("user", "<image>\nwhat?"), ("assistant", "seven"), ("user", "sure?"), ("assistant", "yes")]
    turns = [Turn(*turn) for turn in said]
    chat = samples.encoder.encode(turns, [2])
    assert chat.input_ids.count(IMAGE) == 2 * FULL
    learned = [token for token, answer in zip(chat.input_ids, chat.answer, strict=True) if answer]
    decode = samples.encoder.tokenizer.decode
    assert decode(learned).replace(" ", "") == "seven<|im_end|>yes<|im_end|>"
    text = decode([token for token in chat.input_ids if token != IMAGE]).replace(" ", "")
    assert text.startswith("<|im_start|>system\nbebrief<|im_end|>\n<|im_start|>user\n<img></img>\nwhat?<|im_end|>\n")
    with pytest.raises(ValueError, match="more <image> tags than images"):
        samples.encoder.encode(turns, [])


def test_an_epoch_has_each_item_once_and_any_step_can_be_made_alone():
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 1000, 103)]
    order = BatchOrder(lengths, 10, 5, 0, by_length=True)
    assert order.steps_per_epoch == 10
    epochs = [[[d for micro in order.step(10 * e + s) for d in micro] for s in range(10)] for e in range(2)]
    for epoch in epochs:
        items = [draw.item for step in epoch for draw in step]
        assert len(set(items)) == 100
    assert epochs[0] != epochs[1]
    assert [d for micro in BatchOrder(lengths, 10, 5, 0, by_length=True).step(13) for d in micro] == epochs[1][3]
    spread = np.mean([np.ptp([lengths[d.item] for d in step]) for step in epochs[0]])
    assert spread < 0.3 * np.ptp(lengths)
    assert len({draw.seed for epoch in epochs for step in epoch for draw in step}) == 200
    with pytest.raises(ValueError, match="3 usable items, fewer than one batch of 10: lower batch"):
        BatchOrder([1, 2, 3], 10, 5, 0, by_length=False)


def fake_batch(images: tuple[tuple[int, ...], ...], seeds: tuple[int, ...]) -> MicroBatch:
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    tiles = tuple(map(sum, images))
    flat = tuple(n for own in images for n in own)
    pixels = torch.zeros(sum(tiles), 3, 1, 1)
    return MicroBatch(nothing, nothing, nothing.bool(), nothing, pixels, tiles, flat, (0,), (1,), seeds)


def test_rates_are_drawn_per_tile_or_per_image_whatever_else_is_in_the_batch():
    images = ((3, 2), (4,), (5,))
    together = draw_rates(fake_batch(images, (1, 2, 3)), 0.5, "tile")
    alone = [draw_rates(fake_batch((own,), (seed,)), 0.5, "tile") for own, seed in zip(images, (1, 2, 3), strict=True)]
    assert torch.equal(together, torch.cat(alone))
    many = draw_rates(fake_batch(((8,) * 100,), (4,)), 0.25, "image").view(100, 8)
    assert (many == many[:, :1]).all()
    assert 0.1 < many.float().mean() < 0.4
    assert not (draw_rates(fake_batch(((8,) * 100,), (4,)), 0.25, "tile").view(100, 8) == many).all()


def test_the_default_device_changes_no_draw_and_no_batch(flash, data):
    """meta stands for any device but the CPU: a tensor that lands there has lost its values."""
    batch, compress = fake_batch(((3, 2), (4,)), (1, 2)), torch.rand(50) < 0.3
    options = EvalOptions(model=str(flash), data=str(data), out="-", workers=0)
    samples = read_data(options, load_model(flash, torch.float32, 0)[0].config, measure=False)
    want = (draw_rates(batch, 0.5, "tile"), draw_rates(batch, 0.5, "image"), random_like(compress, 0))
    tensors = vars(samples.collate([samples[Draw(0, 1)], samples[Draw(3, 2)]]))
    with torch.device("meta"):
        got = (draw_rates(batch, 0.5, "tile"), draw_rates(batch, 0.5, "image"), random_like(compress, 0))
        again = vars(samples.collate([samples[Draw(0, 1)], samples[Draw(3, 2)]]))
        nothing = samples.collate([[]])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for name, value in tensors.items():
        assert torch.equal(again[name], value) if isinstance(value, torch.Tensor) else again[name] == value
        assert getattr(getattr(nothing, name), "device", torch.device("cpu")).type == "cpu"


def test_connector_64_starts_as_average_pooling_of_connector_256():
    connector = vico_ext.FusedConnector(8, 12).double().eval()
    for p in connector.parameters():
        torch.nn.init.normal_(p)
    norm, first, _, second = connector.mlp1
    connector_64_from_256(connector.mlp2, tuple((layer.weight, layer.bias) for layer in (norm, first, second)))
    vit = torch.randn(3, 65, 8, dtype=torch.float64)
    blocks = vico_ext.reference.pixel_shuffle(vit, 2).view(3, 2, 2, 2, 2, 32)  # row, in row, column, in column
    jointly = blocks.permute(0, 1, 3, 2, 4, 5).reshape(3, 4, 4 * 32)  # what the 16V norm sees, in another order
    scaled = F.layer_norm(jointly, (128,)).view(3, 4, 4, 32) * norm.weight + norm.bias
    want = second(F.gelu(first(scaled).mean(2)))
    got = connector.mlp2(vico_ext.reference.pixel_shuffle(vit, 4))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_divergence_is_its_definition(kind):
    heads = [torch.nn.Linear(width, 11, bias=width == 6).double() for width in (6, 5)]
    r, p = torch.randn(7, 6).double(), torch.randn(7, 5).double().requires_grad_()
    weights = torch.rand(7).double()
    total, parts = answer_divergence(r, heads[0], p, heads[1], weights=weights, divergence=kind, temperature=1.7)
    x, y = ((head(h) / 1.7).softmax(-1) for head, h in zip(heads, (r, p), strict=True))
    m = (x + y) / 2
    kl = {
        "forward_kl": x * (x / y).log(),
        "reverse_kl": y * (y / x).log(),
        "jsd": (x * (x / m).log() + y * (y / m).log()) / 2,
    }[kind].sum(-1)
    torch.testing.assert_close(parts, (weights * kl).detach())
    torch.testing.assert_close(total, (weights * kl).sum())
    (got,), (want,) = torch.autograd.grad(total, p), torch.autograd.grad((weights * kl).sum(), p)
    torch.testing.assert_close(got, want)


def test_row_means_and_window():
    means = row_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 0, 1]))
    assert means.tolist() == [2.0, 0.0, 5.0]
    window = RatioWindow(50, 65.0)
    assert np.isnan(window.tau)
    values = torch.rand(80)
    window.add(torch.cat([values[:40], torch.tensor([float("nan"), float("inf")])]))
    window.add(values[40:])
    assert window.tau == pytest.approx(np.percentile(values[30:].double().cpu().numpy(), 65.0))
    compress = torch.rand(100) < 0.3
    assert random_like(compress, 0).sum() == compress.sum()
    assert not torch.equal(random_like(compress, 0), compress)


def test_learning_rate_warms_up_and_follows_a_cosine():
    options = ConsistencyOptions(**PATHS, learning_rate=2.0, warmup_steps=4, final_share=0.1)
    rates = [learning_rate(options, step, 24) for step in range(25)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[14] == pytest.approx(0.5 * (2.0 + 0.2))
    assert rates[24] == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["connector64", "connectors", "llm", "all", "lora"])
def test_what_trains_is_what_was_asked_for_whatever_the_reference(kind, model, data, tmp_path):
    references = {"connector64": ["copy"], "lora": ["copy", "adapters_off", "cache"]}.get(kind, ["copy", "cache"])
    found = []
    for reference in references:
        options = consistency(model, data, tmp_path / reference, train=kind, reference=reference, steps=2)
        train(options)
        found.append([entry[name] for entry in metrics(tmp_path / reference) for name in ("loss", "grad_norm")])
    assert all(other == pytest.approx(found[0], rel=1e-4) for other in found)
    assert len(found[0]) == 4
    before, after = tensors(model), tensors(tmp_path / references[0] / "model")
    assert not [name for name in after if "lora" in name or "base_layer" in name]
    changed = {name.split(":")[1] for name in before if not torch.equal(before[name], after[name])}
    known = ("lm_head", "language_model", "multi_modal_projector", "vision_tower")
    parts = {next(part for part in known if part in name) for name in changed}
    wanted = {"connector64": set(), "connectors": {"multi_modal_projector"}}
    wanted["lora"] = {"multi_modal_projector", "language_model"}
    wanted["llm"] = {*wanted["lora"], "lm_head"}
    wanted["all"] = {*wanted["llm"], "vision_tower"}
    assert parts == wanted[kind]
    if kind == "lora":
        assert all("proj" in name for name in changed if "language_model" in name)


@pytest.mark.parametrize("kind", ["all", "lora", "router"])
def test_bf16_trains_in_float32_and_writes_what_it_read(kind, flash, model, data, tmp_path):
    half = {"precision": "bf16", "steps": 1}
    if kind == "router":
        options: Any = router(flash, data, tmp_path, reference=str(model), others="router", **half)
    else:
        options = consistency(model, data, tmp_path, train=kind, reference="cache", gradient_checkpointing=True, **half)
    train(options)
    assert metrics(tmp_path)[0]["loss"] > 0
    assert {t.dtype for n, t in tensors(tmp_path / "checkpoints").items() if "weights" in n} == {torch.float32}
    assert {t.dtype for t in tensors(tmp_path / "model").values()} == {torch.bfloat16}


def test_a_cache_of_something_else_is_refused(model, data, tmp_path):
    train(consistency(model, data, tmp_path, train="connectors", reference="cache", steps=1))
    cached = {"reference": "cache", "reference_cache": str(tmp_path / "reference"), "max_tiles": 3}
    other = consistency(model, data, tmp_path / "other", train="connectors", **cached)
    with pytest.raises(ValueError, match="was made with another max_tiles: choose another reference_cache"):
        train(other)


def test_a_run_goes_on_only_with_its_own_settings(model, data, tmp_path):
    train(consistency(model, data, tmp_path, steps=2))
    with pytest.raises(ValueError, match=r"other settings: learning_rate was 0.003 and is 0.1. Take those back"):
        train(consistency(model, data, tmp_path, steps=2, learning_rate=0.1))
    with pytest.raises(ValueError, match="holds a run and resume is false"):
        train(consistency(model, data, tmp_path, steps=2, resume=False))


@pytest.mark.parametrize("others", ["full", "random"])
def test_loss_ratios_are_those_of_whole_forward_passes(others, flash, model, data):
    options = router(flash, data, Path("o"), reference=str(model), questions=2, others=others, flip_batch=3)
    run = set_up(options, sharded=False)
    samples = run.samples
    items = range(len(samples.corpus.items))
    assert [len(samples.corpus.items[i].lines) for i in items] == [2] * 6
    batch = samples.collate([samples[Draw(i, 10 + i)] for i in items[:3]]).to(torch.device(DEVICE))
    with torch.no_grad():
        got = run.stage.module(batch, phase="ratios")["ratios"]
    others_drawn = torch.zeros(sum(batch.tiles), dtype=torch.bool)
    if others == "random":
        others_drawn = draw_rates(batch, 0.5, "tile")
    reference, _ = load_model(model, torch.float32, 0)
    reference.to(DEVICE).model.vico.policy = NONE
    run.policy.eval()

    def loss(item: int, compress: list[bool]) -> float:
        tiles = batch.tiles_of_item[item]
        run.policy.model.vico.policy = Decide(*compress)
        total = 0.0
        for row in (r for r, of in enumerate(batch.item_of_row) if of == item):
            length = int(batch.attention_mask[row].sum())
            given = {"input_ids": batch.input_ids[row : row + 1, :length]}
            given["pixel_values"] = batch.pixel_values[tiles.start : tiles.stop]
            answers = int(batch.predict[row].sum())
            with torch.no_grad():  # what follows the answer is the end mark's newline
                r, p = (m(**given).logits[0, -answers - 2 : -2].log_softmax(-1) for m in (reference, run.policy))
            total += float((r.exp() * (r - p)).sum(-1).mean())
        return total / 2

    want = []
    for item, tiles in enumerate(batch.tiles_of_item):
        base = others_drawn[tiles.start : tiles.stop].tolist()
        for t in range(len(tiles)):
            small, whole = (loss(item, [*base[:t], flag, *base[t + 1 :]]) for flag in (True, False))
            want.append((small + 1e-4) / (whole + 1e-4))
    torch.testing.assert_close(got, torch.tensor(want), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("command", [["train"], ["train", "consistency"], ["train", "router"], ["eval"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([*command, "--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert "examples:\n  vico " in out
    assert max(map(len, out.splitlines())) <= 125


def test_the_cli_trains_and_evaluates(flash, model, data, tmp_path, capsys):
    config = tmp_path / "stage2.yaml"
    config.write_text(f"model: {flash}\ndata: {data}\nsteps: 2\nbatch: 4\nworkers: 1\nlog_every: 1\n")
    out = tmp_path / "stage2"
    assert cli.main(["train", "router", "--config", str(config), "--out", str(out), "--reference", str(model)]) == 0
    assert f"Trained model: {out / 'model'}" in capsys.readouterr().out
    assert list((out / "tensorboard").glob("events*"))
    report = tmp_path / "report"
    arguments = ["--model", out / "model", "--reference", model, "--data", data, "--out", report, "--workers", 0,
                 "--policies", "budget:0.6", "--throughput-batches", 1, 2, "--throughput-seconds", 0.01]  # fmt: skip
    assert cli.main(["eval", *map(str, arguments)]) == 0
    found = json.loads((report / "report.json").read_text())["routings"]
    assert list(found) == ["all-256", "all-64", "budget:0.6", "random as budget:0.6"]
    whole, small, budget, by_chance = found.values()
    assert (whole["tokens_kept"], small["tokens_kept"]) == (1.0, COMPRESSED / FULL)
    assert whole["kl"] == pytest.approx(0, abs=1e-6)  # only the router differs from the reference
    assert small["kl"] > whole["kl"]
    assert budget["visual_tokens"] == by_chance["visual_tokens"] <= 0.6 * whole["visual_tokens"] + 1e-9
    assert whole["rows"] == 12
    assert {name: family["rows"] for name, family in whole["families"].items()} == {"coarse": 8, "fine": 4}
    assert set(whole["first_token_prompts_per_s"]) == {"1", "2"}
    assert "tiles compressed" in capsys.readouterr().out
    assert cli.main(["train", "router", "--config", str(config), "--out", "x", "--model", str(model)]) == 2
    assert "has no 64-token connector: run stage 1" in capsys.readouterr().err


def test_evaluation_leaves_out_bad_lines_or_stops(flash, data, tmp_path, capsys):
    bad = data.parent / "bad.jsonl"
    bad.write_text(data.read_text() + '{"image": "none.png", "conversations": [{"from": "human", "value": "a"}, '
                   '{"from": "gpt", "value": "b"}]}\n')  # fmt: skip
    arguments = ["eval", "--model", str(flash), "--data", str(bad), "--out", str(tmp_path), "--workers", "0",
                 "--throughput-seconds", "0"]  # fmt: skip
    assert cli.main(arguments) == 2
    assert "line 13: cannot read" in capsys.readouterr().err
    assert cli.main([*arguments, "--on-unreadable-image", "skip"]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(p["line"], p["kind"]) for p in report["left_out"]] == [(13, "image")]
    assert report["routings"]["all-256"]["rows"] == 12


def _evaluation(flash, data, routings):
    options = EvalOptions(model=str(flash), data=str(data), out="-", throughput_seconds=0, workers=0)
    model, _ = load_model(flash, torch.float32, 0)
    samples = read_data(options, model.config, measure=False)
    policy = {"half": vico_ext.ThresholdPolicy(0.5)}
    return Evaluation(
        model.eval(), load_reference(model, "self", torch.float32), samples, policy, options, routings=routings
    )


def test_evaluation_takes_further_routings_and_keeps_outcomes(flash, data):
    first = _evaluation(flash, data, {})
    found = first.run()
    again = _evaluation(flash, data, {"the same": first.decisions["half"], "others": ~first.decisions["half"]})
    routed = again.run()
    assert routed["the same"] == routed["half"] == found["half"]
    assert routed["others"]["visual_tokens"] != routed["half"]["visual_tokens"]
    for name, entry in routed.items():
        assert again.outcomes[name].shape == (12,)
        assert again.outcomes[name].float().mean() == pytest.approx(entry["score"])
        assert again.decisions[name].float().mean() == pytest.approx(entry["tiles_compressed"])


def test_evaluation_refuses_routings_of_other_data(flash, data):
    decisions = _evaluation(flash, data, {})._decisions()["half"]
    for given, message in (
        ({"half": decisions}, "names of their own, got 'half'"),
        (
            {"mine": decisions[1:]},
            rf"routing 'mine' must be \[{len(decisions)}\] bool, .* got \[{len(decisions) - 1}\] bool",
        ),
        ({"mine": decisions.float()}, "got .* float32"),
    ):
        with pytest.raises(ValueError, match=message):
            _evaluation(flash, data, given).run()


def test_attention_is_transformers_to_choose_or_ours(flash, model):
    assert load_model(flash, torch.float32, 0)[0].config.text_config._attn_implementation == "sdpa"
    for path in (flash, model):
        chosen, _ = load_model(path, torch.float32, 0, "eager")
        assert chosen.config.text_config._attn_implementation == "eager"
        assert chosen.config.vision_config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="attention must be one of auto, eager"):
        EvalOptions(**PATHS, attention="fast")
