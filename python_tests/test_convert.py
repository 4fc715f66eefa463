"""Whole checkpoints between the released layout and transformers': names, bits, settings, memory, interruptions."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_internvl import IMAGE, Decide, inputs, tiny_flash, tiny_model
from torch import Tensor

import vico_ext
from vico_ext import cli
from vico_ext.checkpoint import CheckpointFiles, FlashCheckpointError, convert_checkpoint
from vico_ext.checkpoint.convert import STAGE

pytest.importorskip("transformers")

CONFIG = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
    "model_type": "internvl_chat",
    "template": "internvl2_5",
    "force_image_size": 112,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "select_layer": -1,
    "flash_relative_threshold": 0.5,
    "flash_absolute_threshold": 0.1,
    "torch_dtype": "float32",
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "use_flash_attn": True,
    },
}


def released_names(model: Any, flash: vico_ext.FlashWeights) -> dict[str, Tensor]:
    """The tensors of a transformers model and Flash weights under the names of the custom code, spelt out."""
    made: dict[str, Tensor] = {**flash.connector, **flash.router}
    qkv: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.vision_tower."):
            rest = name.removeprefix("model.vision_tower.")
            joint = re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.([qkv])_proj\.(weight|bias)", rest)
            if joint:
                key = f"vision_model.encoder.layers.{joint[1]}.attn.qkv.{joint[3]}"
                qkv.setdefault(key, {})[joint[2]] = tensor
                continue
            for old, new in {
                "encoder.layer.": "encoder.layers.",
                "cls_token": "class_embedding",
                "position_embeddings": "position_embedding",
                "patch_embeddings.projection": "patch_embedding",
                "lambda_": "ls",
                "attention.projection_layer": "attn.proj",
                "layernorm_before": "norm1",
                "layernorm_after": "norm2",
            }.items():
                rest = rest.replace(old, new)
            made[f"vision_model.{rest}"] = tensor
        elif name.startswith("model.language_model."):
            made[f"language_model.model.{name.removeprefix('model.language_model.')}"] = tensor
        elif name == "lm_head.weight":
            made["language_model.lm_head.weight"] = tensor
    made |= {key: torch.cat([parts[p] for p in "qkv"]) for key, parts in qkv.items()}
    return {name: tensor.clone() for name, tensor in made.items()}


def write_sharded(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    where = {}
    for i in range(shards):
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        own = names[i::shards]  # scattered: what belongs together is in different files
        save_file({n: tensors[n] for n in own}, folder / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(own, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": IMAGE}))
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit('custom code was run')")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released checkpoint in three shards, the transformers model it was made from, and its Flash weights."""
    model, flash = tiny_model("qwen3"), tiny_flash()
    language = json.loads(model.config.text_config.to_json_string(use_diff=False))
    folder = tmp_path_factory.mktemp("released")
    write_sharded(folder, released_names(model, flash), {**CONFIG, "llm_config": language}, 3)
    return folder, model, flash


def tensors_of(folder: Path) -> dict[str, Tensor]:
    files = CheckpointFiles(folder)
    return {name: files.tensor(name) for name in files.names}


def equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(
        torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in want.items()
    )


def test_a_released_checkpoint_becomes_a_transformers_model(released, tmp_path):
    source, model, flash = released
    done = convert_checkpoint(source, tmp_path / "hf", max_shard_size="40KB")
    assert (done.to, done.resumed) == ("hf", 0)
    assert done.shards > 3
    assert not (tmp_path / "hf" / STAGE).exists()
    assert not list((tmp_path / "hf").glob("*.py"))
    policy = Decide(True, False, True)
    loaded = vico_ext.load_internvl(tmp_path / "hf", policy)
    assert loaded.config.flash_relative_threshold == 0.5
    assert loaded.config.image_token_id == IMAGE
    given = inputs((2,), (1,))
    with torch.no_grad():
        got = loaded(**given).logits
        want = vico_ext.patch_internvl(model, flash, policy)(**given).logits
    vico_ext.unpatch_internvl(model)
    assert torch.equal(got, want)


def test_there_and_back_changes_nothing(released, tmp_path):
    source, _, _ = released
    convert_checkpoint(source, tmp_path / "hf", max_shard_size="50KB")
    back = convert_checkpoint(tmp_path / "hf", tmp_path / "back", max_shard_size="1GB")
    assert (back.to, back.shards) == ("released", 1)
    assert equal(tensors_of(tmp_path / "back"), tensors_of(source))
    want = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == want
    assert (tmp_path / "back" / "added_tokens.json").read_bytes() == (source / "added_tokens.json").read_bytes()


def test_a_patched_model_that_was_saved_becomes_a_released_checkpoint(released, tmp_path):
    source, model, flash = released
    vico_ext.patch_internvl(model, flash)
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    vico_ext.unpatch_internvl(model)
    assert cli.main(["convert", str(tmp_path / "saved"), str(tmp_path / "back"), "--to", "released"]) == 0
    want = tensors_of(source)
    assert equal(tensors_of(tmp_path / "back"), want)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["model_type"] == "internvl_chat"
    assert config["llm_config"]["hidden_size"] == 48
    assert config["vision_config"]["image_size"] == 112
    convert_checkpoint(tmp_path / "back", tmp_path / "again", image_token_id=IMAGE)
    convert_checkpoint(source, tmp_path / "straight")
    assert equal(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "straight"))
    assert vico_ext.load_internvl(tmp_path / "again").config.image_seq_length == 16


def test_settings_of_a_saved_model_in_the_released_names(tmp_path):
    """rope_theta is what transformers 4 reads, for which the custom code is; 5 saves rope_parameters alone."""
    model = vico_ext.patch_internvl(tiny_model("qwen3", dtype=torch.bfloat16), tiny_flash())
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    language = config["text_config"]
    language.get("rope_parameters", language)["rope_theta"] = 5e6
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "saved", tmp_path / "back")
    released = json.loads((tmp_path / "back" / "config.json").read_text())
    assert released["llm_config"]["rope_theta"] == 5e6
    assert "rope_parameters" not in released["llm_config"]
    assert released["torch_dtype"] == "bfloat16"
    convert_checkpoint(tmp_path / "back", tmp_path / "again", image_token_id=IMAGE)
    loaded = vico_ext.load_internvl(tmp_path / "again", dtype=torch.bfloat16)
    text = loaded.config.text_config
    assert (getattr(text, "rope_parameters", None) or {"rope_theta": text.rope_theta})["rope_theta"] == 5e6


def test_what_the_target_holds(released, tmp_path):
    source, _, _ = released
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"already holds config\.json, which would be replaced"):
        convert_checkpoint(source, tmp_path / "own")
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["config.json"]
    for size in ("60KB", "150KB", "1GB"):
        convert_checkpoint(source, tmp_path / "hf", max_shard_size=size, overwrite=True)
        assert set(CheckpointFiles(tmp_path / "hf").files) == set((tmp_path / "hf").glob("*.safetensors"))


RUN = """
import sys, time
from vico_ext.checkpoint import convert_checkpoint
def progress(line):
    print(line, flush=True)
    time.sleep(0.2)
done = convert_checkpoint(sys.argv[1], sys.argv[2], max_shard_size="40KB", overwrite=True, progress=progress)
print("resumed", done.resumed, flush=True)
"""


@pytest.mark.parametrize("existing", [False, True], ids=["empty folder", "a checkpoint there"])
def test_killed_in_the_middle(released, tmp_path, existing):
    source, _, flash = released
    target = tmp_path / "hf"
    if existing:
        vico_ext.save_flash(target, flash.connector, flash.router)
    running = subprocess.Popen([sys.executable, "-c", RUN, source, target], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        running.stdout.readline()
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert list((target / STAGE).glob("model-*.safetensors"))
    if existing:
        assert vico_ext.load_flash(target).vit_hidden == 32  # the old one, whole
        assert {path.name for path in target.iterdir()} == {STAGE, "model.safetensors"}
    else:
        with pytest.raises(FlashCheckpointError, match="no checkpoint"):
            vico_ext.load_flash(target)
    written = sorted((target / STAGE).glob("model-*.safetensors"))
    damaged = written[0].read_bytes()
    written[0].write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    done = subprocess.run([sys.executable, "-c", RUN, source, target], capture_output=True, text=True, check=True)
    assert f"resumed {len(written) - 1}" in done.stdout  # the damaged one was written again
    convert_checkpoint(source, tmp_path / "fresh", max_shard_size="40KB")
    assert equal(tensors_of(target), tensors_of(tmp_path / "fresh"))
    assert {p.name for p in target.iterdir()} - {"model.safetensors"} == {
        p.name for p in (tmp_path / "fresh").iterdir()
    }


@pytest.mark.parametrize("step", range(6))
def test_stopped_while_files_take_their_places(released, tmp_path, monkeypatch, step):
    """Whatever was the last rename, what is there loads whole or not at all, and a second run completes it."""
    import vico_ext.checkpoint.convert as module

    source, _, flash = released
    target, calls = tmp_path / "hf", []
    vico_ext.save_flash(target, flash.connector, flash.router)
    replace = module.os.replace

    def stopping(old: Path, new: Path) -> None:
        if Path(new).parent == target:
            if len(calls) == step:
                raise KeyboardInterrupt
            calls.append(new)
        replace(old, new)

    monkeypatch.setattr(module.os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, target, max_shard_size="150KB", overwrite=True)
    monkeypatch.undo()
    with pytest.raises(FlashCheckpointError):
        vico_ext.load_flash(target)
    assert convert_checkpoint(source, target, max_shard_size="150KB").resumed > 1
    assert vico_ext.load_flash(target).llm_hidden == 48
    assert not (target / STAGE).exists()


PEAK = """
import resource, sys
from vico_ext.checkpoint import convert_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_checkpoint(sys.argv[1], sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_bounded_by_one_shard(released, tmp_path):
    source, model, flash = released
    tensors = released_names(model, flash)
    shard, shards = 16 << 20, 12
    extra = {f"language_model.model.layers.{i + 2}.mlp.weight": torch.zeros(shard // 4) for i in range(shards)}
    folder = tmp_path / "large"
    folder.mkdir()
    for i, (name, tensor) in enumerate(extra.items()):
        save_file({name: tensor}, folder / f"extra-{i}.safetensors")
    save_file(tensors, folder / "rest.safetensors")
    where = {name: f"extra-{i}.safetensors" for i, name in enumerate(extra)} | dict.fromkeys(
        tensors, "rest.safetensors"
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for name in ("config.json", "added_tokens.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", PEAK, folder, tmp_path / "hf"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 5 * shard < shards * shard / 2  # a shard as read, as mapped, and as compared with


def test_errors(released, tmp_path):
    source, model, _ = released
    with pytest.raises(ValueError, match="in the released layout already"):
        convert_checkpoint(source, tmp_path / "a", "released")
    with pytest.raises(ValueError, match="needs a folder of its own"):
        convert_checkpoint(source, source)
    vico_ext.save_flash(tmp_path / "held", *tiny_parts())
    with pytest.raises(FileExistsError, match="already holds a checkpoint"):
        convert_checkpoint(source, tmp_path / "held")
    with pytest.raises(FlashCheckpointError, match="neither layout"):
        convert_checkpoint(tmp_path / "held", tmp_path / "a")
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(FlashCheckpointError, match="no second connector and no router"):
        convert_checkpoint(tmp_path / "plain", tmp_path / "a")

    tensors = {n: t.clone() for n, t in tensors_of(source).items()}
    config = json.loads((source / "config.json").read_text())
    write_sharded(tmp_path / "odd", {**tensors, "audio.weight": torch.zeros(1)}, config, 1)
    with pytest.raises(FlashCheckpointError, match=r"audio\.weight: the other layout has no place for it"):
        convert_checkpoint(tmp_path / "odd", tmp_path / "a")
    part = {n: t for n, t in tensors.items() if n != "mlp2.4.weight" and "attn2.in_proj_bias" not in n}
    write_sharded(tmp_path / "part", part, config, 1)
    with pytest.raises(FlashCheckpointError, match=r"4 problems:(.|\n)*nothing to make model\.mlp2\.dense2\.weight of"):
        convert_checkpoint(tmp_path / "part", tmp_path / "a")
    for change, text in (
        ({"llm_config": {"model_type": "internlm2"}}, "language model is 'internlm2'"),
        ({"ps_version": "v1"}, "ps_version is 'v1'"),
        ({"select_layer": -4}, "select_layer is -4"),
    ):
        write_sharded(tmp_path / "changed", tensors, {**config, **change}, 1)
        with pytest.raises(FlashCheckpointError, match=text):
            convert_checkpoint(tmp_path / "changed", tmp_path / "a")
    write_sharded(tmp_path / "no tokenizer", tensors, config, 1)
    (tmp_path / "no tokenizer" / "added_tokens.json").unlink()
    with pytest.raises(FlashCheckpointError, match="--image-token-id"):
        convert_checkpoint(tmp_path / "no tokenizer", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def tiny_parts() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    flash = tiny_flash()
    return flash.connector, flash.router


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"77": {"content": "<IMG_CONTEXT>"}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 77, "content": "<IMG_CONTEXT>"}]}),
    ],
)
def test_the_placeholder_is_found_in_tokenizer_files(tmp_path, name, content):
    from vico_ext.checkpoint.configs import image_token_id

    (tmp_path / name).write_text(json.dumps(content))
    assert image_token_id(tmp_path) == 77
