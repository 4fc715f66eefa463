"""Whole runs of both stages: they learn, survive SIGKILL to the bit, agree across processes, and load as Flash."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from device import DEVICE, cpu_only
from tiny_training import TINY, consistency, metrics, router, save_data, save_model, tensors

import vico_ext

for module in ("transformers", "accelerate", "peft"):
    pytest.importorskip(module)

# A server that has imported everything and computed nothing: processes forked from it start at once, and safely.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["vico_ext.training.trainer", "transformers.models.internvl.modeling_internvl", "peft"])


def child(options: Any, environment: dict[str, str]) -> None:
    """A training process."""
    os.environ.update(environment)
    torch.set_num_threads(1)  # the layers are tiny, and processes many
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from vico_ext.training.trainer import train

    if "SHARDED" in environment:  # accelerate chooses FSDP for accelerators alone; what it does runs on a CPU as well
        state = Accelerator().state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
    train(options)


def start(options: Any, **environment: str) -> Any:
    process = CONTEXT.Process(target=child, args=(options, environment))
    process.start()
    return process


def finish(*processes: Any) -> None:
    for process in processes:
        process.join(timeout=120)
        process.kill()  # where it still runs: pytest would wait for it when it exits
    assert [process.exitcode for process in processes] == [0] * len(processes)


def together(options: Any, count: int = 2, **environment: str) -> None:
    """Runs several gloo processes to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    ranks = [{**shared, **environment, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count)]
    finish(*(start(options, **rank) for rank in ranks))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_data(tmp_path_factory.mktemp("data"), images=8, questions=2)


@pytest.fixture(scope="module")
def stage1(model, data, tmp_path_factory):
    """A finished stage-1 run of the connectors."""
    out = tmp_path_factory.mktemp("stage1")
    finish(start(consistency(model, data, out, train="connectors", batch=8, micro_batch=8, steps=30, save_every=100)))
    return out


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in metrics(out)]


def test_consistency_training_lowers_the_divergence(stage1):
    found = losses(stage1)
    assert sum(found[-6:]) < 0.5 * sum(found[:6])


def test_the_result_is_a_flash_checkpoint(stage1, model):
    weights = vico_ext.load_flash(stage1 / "model")
    patched = vico_ext.load_internvl(stage1 / "model").to(DEVICE)
    connector = weights.connector_module().to(DEVICE)
    vit = torch.randn(2, 65, 32)
    plan = vico_ext.RoutingPlan.from_compress(torch.tensor([True, False]), (16, 4))
    want = patched.model.vico.eval().connect(vit, plan, patched.model.multi_modal_projector)
    torch.testing.assert_close(connector(vit, plan), want, rtol=1e-5, atol=1e-6)
    before = tensors(model)
    after = tensors(stage1 / "model")
    frozen = [name for name in before if "multi_modal_projector" not in name]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (stage1 / "model" / "tokenizer.json").is_file()


@pytest.mark.parametrize("stage", ["consistency", "router"])
def test_killed_and_restarted_is_bit_equal_to_never_killed(stage, model, data, stage1, tmp_path):
    make: Any = consistency if stage == "consistency" else router
    start_from = model if stage == "consistency" else stage1 / "model"
    settings: dict[str, Any] = {"steps": 8, "save_every": 2, "keep_checkpoints": 1, "window": 24, "others": "router"}
    if stage == "consistency":
        settings = {"steps": 8, "save_every": 2, "keep_checkpoints": 1}
    finish(start(make(start_from, data, tmp_path / "whole", **settings)))
    out = tmp_path / "killed"
    options = make(start_from, data, out, **settings)
    # The moments: in the middle of writing a checkpoint, between two checkpoints, right after one, during the export.
    moments = [".step-00000002.tmp", 3, "step-00000004", 7, "../.model.tmp"]
    killed = 0
    for moment in moments:
        process = start(options)
        while process.is_alive() and not reached(out, moment):
            time.sleep(0.0005)
        process.kill()
        process.join()
        killed += process.exitcode == -9
    assert killed >= 4  # a save may be over before it is seen
    finish(start(options))
    assert metrics(out) == metrics(tmp_path / "whole")
    for part in ("model", "checkpoints"):
        whole, restarted = tensors(tmp_path / "whole" / part), tensors(out / part)
        assert whole.keys() == restarted.keys()
        assert whole
        for name, tensor in whole.items():
            assert torch.equal(restarted[name], tensor), name
    states = [folder / "checkpoints" / "step-00000008" / "state.json" for folder in (tmp_path / "whole", out)]
    assert states[0].read_text() == states[1].read_text()
    assert not [path.name for path in out.rglob(".*")]


def reached(out: Path, moment: str | int) -> bool:
    if isinstance(moment, str):
        return (out / "checkpoints" / moment).exists()
    log = out / "metrics.jsonl"
    return log.is_file() and len(log.read_bytes().splitlines()) >= moment


@cpu_only("gloo on the CPU")
@pytest.mark.parametrize("stage", ["consistency", "router"])
def test_two_processes_agree_with_one(stage, model, data, stage1, tmp_path):
    make: Any = consistency if stage == "consistency" else router
    start_from = model if stage == "consistency" else stage1 / "model"
    outs = {name: tmp_path / name for name in ("one", "two", "sharded")}
    finish(start(make(start_from, data, outs["one"], steps=3)))
    together(make(start_from, data, outs["two"], steps=3))
    together(make(start_from, data, outs["sharded"], steps=3), SHARDED="yes")
    one, whole = metrics(outs["one"]), tensors(outs["one"] / "model")
    assert len(one) == 3
    for out in (outs["two"], outs["sharded"]):
        for mine, theirs in zip(one, metrics(out), strict=True):
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                assert theirs[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key
        spread = tensors(out / "model")
        assert spread.keys() == whole.keys()
        for name, tensor in whole.items():
            # Adam divides a gradient by its own size: one that is nothing but rounding moves its weight by up to the
            # learning rate, either way. One element in 49152 was 2.5e-5 off; none may be by more than one step.
            off = ~torch.isclose(spread[name], tensor, rtol=1e-3, atol=1e-5)
            assert off.sum() <= 1 + off.numel() // 10_000, name
            assert (spread[name] - tensor).abs().max() <= TINY["learning_rate"], name


def test_router_learns_which_tiles_lose_little(stage1, data, tmp_path):
    options = router(stage1 / "model", data, tmp_path, batch=8, micro_batch=8, steps=40, dropout=0.0, save_every=100)
    finish(start(options))
    found = metrics(tmp_path)
    assert sum(losses(tmp_path)[-5:]) < 0.7 * sum(losses(tmp_path)[:5])
    assert found[-1]["window"] > 200
    before, after = tensors(stage1 / "model"), tensors(tmp_path / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".vico.router." in name for name in changed)
    assert vico_ext.load_flash(tmp_path / "model").vit_hidden == 32


def test_bad_lines_are_skipped_and_counted_or_stop_the_run(model, tmp_path):
    from vico_ext.training.trainer import TrainingStoppedError, train

    path = save_data(tmp_path / "data", images=6)
    lines = path.read_text().splitlines()
    (tmp_path / "data" / "broken.png").write_bytes((tmp_path / "data" / "0.png").read_bytes()[:200])
    bad = {
        2: "{not json",
        4: json.dumps({**json.loads(lines[1]), "image": "missing.png"}),
        5: json.dumps({**json.loads(lines[0]), "image": "broken.png"}),
        7: json.dumps({"image": "0.png", "conversations": [{"from": "human", "value": "only a question"}]}),
        8: json.dumps({**json.loads(lines[0]), "conversations": [
            {"from": "human", "value": "<image>" + "long " * 99}, {"from": "gpt", "value": "1"}]}),
    }  # fmt: skip
    for number, line in sorted(bad.items()):
        lines.insert(number - 1, line)
    path.write_text("\n".join(lines) + "\n")
    skip = {"on_bad_record": "skip", "on_unreadable_image": "skip", "max_length": 200}
    kept = tmp_path / "kept"
    train(consistency(model, path, kept, steps=4, micro_batch=1, **skip))  # some micro-batches are left with nothing
    noted = [json.loads(line) for line in (kept / "problems-0.jsonl").read_text().splitlines()]
    assert {(p["line"], p["kind"]) for p in noted} == {
        (2, "record"), (4, "image"), (5, "image"), (7, "record"), (8, "record")}  # fmt: skip
    for line, words in {2: "not JSON", 4: "missing.png", 5: "broken.png", 7: "alternate", 8: "max_length"}.items():
        assert words in next(p["message"] for p in noted if p["line"] == line)
    last = metrics(kept)[-1]
    assert last["skipped"] == {"record": sum(p["kind"] == "record" for p in noted), "steps": 0, "loss": 0,
                               "image": sum(p["kind"] == "image" for p in noted)}  # fmt: skip
    assert all(entry["loss"] is not None for entry in metrics(kept))
    for option, line in (("on_bad_record", "line 2"), ("on_unreadable_image", "line 4")):
        with pytest.raises(TrainingStoppedError, match=rf"{line}: .*{option}: skip"):
            train(consistency(model, path, tmp_path / option, **{**skip, option: "stop"}))


def test_losses_that_are_not_finite_are_left_out_or_stop_the_run(model, data, tmp_path):
    from safetensors.torch import load_file, save_file

    from vico_ext.training.trainer import TrainingStoppedError, train

    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    next(tensor for name, tensor in weights.items() if name.endswith("lm_head.weight"))[:] = 1e38  # logits overflow
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingStoppedError, match=r"line \d+: the loss is not finite; step 1 .*: skip"):
        train(consistency(broken, data, tmp_path / "stop"))
    out = tmp_path / "skip"
    train(consistency(broken, data, out, steps=2, on_nonfinite_loss="skip"))
    assert losses(out) == [None, None]
    assert metrics(out)[-1]["skipped"] == {"record": 0, "image": 0, "loss": 8, "steps": 2}
    noted = [json.loads(line) for line in (out / "problems-0.jsonl").read_text().splitlines()]
    assert len({p["line"] for p in noted if p["step"] == 1}) == 4
    after = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], after[name]) for name in weights)  # not one step was taken
