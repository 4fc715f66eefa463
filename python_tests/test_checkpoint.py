"""load_flash and save_flash: both key formats, every way a checkpoint can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vico_ext
from vico_ext import FlashCheckpointError, load_flash, save_flash
from vico_ext.checkpoint import files as checkpoint_files
from vico_ext.checkpoint.keys import CONNECTOR, ROUTER

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
V, H = 16, 24


def tiny_weights(dtype=torch.float32, v=V, h=H):
    def draw(table):
        return {key.released: torch.randn(key.sizes({"V": v, "H": h})).to(dtype) for key in table}

    return draw(CONNECTOR), draw(ROUTER)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flash")
    torch.manual_seed(1)
    save_flash(folder, *tiny_weights())
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoint")


def edit(folder, change, name="model.safetensors"):
    """Rewrites a safetensors file with `change` applied to its tensors."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB", 1])
@pytest.mark.parametrize("format", ["released", "hf"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bit_equal(tmp_path, dtype, format, max_shard_size):
    connector, router = tiny_weights(dtype)
    config = {"flash_relative_threshold": 0.3, "flash_absolute_threshold": 0.1, "unrelated": 1}
    save_flash(tmp_path, connector, router, format=format, max_shard_size=max_shard_size, config=config)
    weights = load_flash(tmp_path)
    assert_same(weights.connector, connector)
    assert_same(weights.router, router)
    assert (weights.vit_hidden, weights.llm_hidden) == (V, H)
    assert weights.config == {"flash_relative_threshold": 0.3, "flash_absolute_threshold": 0.1}
    assert (weights.flash_relative_threshold, weights.flash_absolute_threshold) == (0.3, 0.1)


def test_the_table_is_the_released_checkpoint(golden):
    assert {key.released for key in (*CONNECTOR, *ROUTER)} == set(golden.weights)
    for key in (*CONNECTOR, *ROUTER):
        assert key.sizes({"V": 32, "H": 48}) == list(golden.weights[key.released].shape)


def test_hf_names_are_the_open_conversion(tmp_path):
    connector, router = tiny_weights()
    save_flash(tmp_path, connector, router, format="hf")
    tensors = load_file(tmp_path / "model.safetensors")
    pooling = "pooling_before_gating"
    for name, want in {
        "model.multi_modal_projector.linear_1.weight": connector["mlp1.1.weight"],
        "model.multi_modal_projector.layer_norm.bias": connector["mlp1.0.bias"],
        "model.mlp2.norm.weight": connector["mlp2.0.weight"],
        "model.mlp2.dense3.bias": connector["mlp2.7.bias"],
        f"model.{pooling}.query_token": router[f"{pooling}.query_token"],
        f"model.{pooling}.attn2.key.weight": router[f"{pooling}.attn2.in_proj_weight"][V : 2 * V],
        f"model.{pooling}.attn3.value.bias": router[f"{pooling}.attn3.in_proj_bias"][2 * V :],
        f"model.{pooling}.attn4.out_proj.weight": router[f"{pooling}.attn4.out_proj.weight"],
        "model.gating.block3.dense_out.weight": router["gating.block3.3.weight"],
        "model.gating.gate_norm.weight": router["gating.gate.0.weight"],
        "model.gating.gate_proj.bias": router["gating.gate.1.bias"],
    }.items():
        assert torch.equal(tensors[name], want), name
    assert not any("in_proj" in name for name in tensors)


def test_accepts_natural_spellings_mixed_formats_and_wrappers(tmp_path):
    connector, router = tiny_weights()
    save_flash(tmp_path, connector, router, format="hf")
    renamed = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        for old, new in (
            (".query.", ".q_proj."),
            (".key.", ".k_proj."),
            (".value.", ".v_proj."),
            ("out_proj", "o_proj"),
        ):
            name = name.replace(old, new)
        renamed[f"_orig_mod.module.{name}"] = tensor
    for i, dense in enumerate(("norm", "dense1", "dense2", "dense3")):
        for part in ("weight", "bias"):
            tensor = renamed.pop(f"_orig_mod.module.model.mlp2.{dense}.{part}")
            renamed[f"_orig_mod.module.model.mlp2.{(0, 1, 4, 7)[i]}.{part}"] = tensor
    save_file(renamed, tmp_path / "model.safetensors")
    weights = load_flash(tmp_path)
    assert_same(weights.connector, connector)
    assert_same(weights.router, router)


def test_reads_just_the_flash_tensors(tmp_path, monkeypatch):
    connector, router = tiny_weights()
    language = {f"language_model.model.layers.{i}.mlp.gate.weight": torch.randn(64, 64) for i in range(3)}
    save_flash(tmp_path, connector, router, extra=language, max_shard_size="20KB")
    held_elsewhere = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    for shard in list(held_elsewhere):
        with safe_open(tmp_path / shard, "pt") as f:
            if all(name in language for name in f.keys()):  # noqa: SIM118 (not a dict)
                os.unlink(tmp_path / shard)  # a shard that is not needed may be absent
                held_elsewhere.remove(shard)
    read = []
    tensor = checkpoint_files.CheckpointFiles.tensor
    monkeypatch.setattr(
        checkpoint_files.CheckpointFiles, "tensor", lambda self, name: read.append(name) or tensor(self, name)
    )
    assert_same(load_flash(tmp_path).connector, connector)
    assert sorted(read) == sorted([*connector, *router])


def test_tensors_do_not_depend_on_the_file(checkpoint):
    weights = load_flash(checkpoint)
    before = {name: tensor.clone() for name, tensor in weights.connector.items()}
    with open(checkpoint / "model.safetensors", "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\xff" * 1000)
    assert_same(weights.connector, before)


def test_single_file_of_any_name(checkpoint):
    renamed = (checkpoint / "model.safetensors").rename(checkpoint / "flash.safetensors")
    assert load_flash(checkpoint).vit_hidden == V
    assert load_flash(renamed).llm_hidden == H


def test_two_models_in_one_file_need_a_prefix(checkpoint):
    reference = load_flash(checkpoint)

    def wrap(tensors):
        both = [(f"{name}.{key}", t + (name == "policy")) for name in ("policy", "ref") for key, t in tensors.items()]
        tensors.clear()
        tensors.update(both)

    edit(checkpoint, wrap)
    with pytest.raises(FlashCheckpointError, match=r"mlp1.0.weight is held more than once .*pass prefix= to choose"):
        load_flash(checkpoint)
    assert_same(load_flash(checkpoint, prefix="ref.").connector, reference.connector)
    assert_same(load_flash(checkpoint, prefix="policy.").router, {k: v + 1 for k, v in reference.router.items()})


def test_all_problems_in_one_error(checkpoint):
    def damage(tensors):
        del tensors["mlp2.4.weight"], tensors["gating.gate.1.bias"]
        tensors["mlp1.1.weight"] = torch.zeros(H, 5)
        tensors["gating.block2.0.bias"] = torch.zeros(4 * V, dtype=torch.int32)

    edit(checkpoint, damage)
    with pytest.raises(FlashCheckpointError) as caught:
        load_flash(checkpoint)
    assert isinstance(caught.value, ValueError)
    assert len(caught.value.problems) == 4
    message = str(caught.value)
    assert "4 problems" in message
    assert "missing mlp2.4.weight, expected [2H, 2H] = [48, 48]; also looked for mlp2.dense2.weight" in message
    assert "missing gating.gate.1.bias, expected [2] = [2]; also looked for gating.gate_proj.bias" in message
    assert "mlp1.1.weight must have shape [H, 4V] = [24, 64], got [24, 5]" in message
    assert "gating.block2.0.bias must be one of F64, F32, BF16, F16, got I32" in message
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


def test_split_projection_with_a_part_missing_or_odd(tmp_path):
    save_flash(tmp_path, *tiny_weights(), format="hf")

    def damage(tensors):
        del tensors["model.pooling_before_gating.attn1.key.bias"]
        tensors["model.pooling_before_gating.attn2.value.weight"] = torch.zeros(V + 1, V)
        tensors["model.pooling_before_gating.attn3.query.bias"] = torch.zeros(V, dtype=torch.float16)

    edit(tmp_path, damage)
    with pytest.raises(FlashCheckpointError) as caught:
        load_flash(tmp_path)
    assert len(caught.value.problems) == 3
    assert "missing pooling_before_gating.attn1.key.bias, expected [3V] = [48]" in str(caught.value)
    assert "attn2.value.weight must have equal shapes, got [[16, 16], [16, 16], [17, 16]]" in str(caught.value)
    assert "attn3.value.bias must be one of F64, F32, BF16, F16, got F16, F32" in str(caught.value)


def test_config_must_agree_with_the_tensors(checkpoint):
    config = {"vision_config": {"hidden_size": 1024}, "llm_config": {"hidden_size": H}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlashCheckpointError, match=r"config\.json says vision hidden size 1024, the tensors say 16"):
        load_flash(checkpoint)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("mlp1", "this is not a Flash checkpoint: has mlp1 only"),
        ("none", "this is not a Flash checkpoint: has none of mlp1, mlp2, pooling_before_gating and gating"),
    ],
)
def test_not_flash(checkpoint, keep, message):
    kept = {"other.weight": torch.zeros(1)}
    if keep == "mlp1":
        kept |= {k: v for k, v in load_file(checkpoint / "model.safetensors").items() if k.startswith("mlp1")}
    save_file(kept, checkpoint / "model.safetensors")
    with pytest.raises(FlashCheckpointError, match=message):
        load_flash(checkpoint)


def _no_files(folder):
    (folder / "model.safetensors").unlink()


def _pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _two_without_index(folder):
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")


def _lone_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00010.safetensors")


def _bad_config(folder):
    (folder / "config.json").write_text("{")


def _index(content):
    def apply(folder):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(content)

    return apply


def _truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "no such file or folder"),
        (_no_files, "no checkpoint: expected model.safetensors"),
        (
            _pickle,
            r"holds pickled weights \(pytorch_model.bin\), which are never loaded .* convert them to safetensors",
        ),
        (_two_without_index, "a.safetensors, b.safetensors without model.safetensors.index.json"),
        (_lone_shard, "model-00001-of-00010.safetensors without model.safetensors.index.json"),
        (_bad_config, "config.json: not readable as JSON"),
        (_truncated, "not a readable safetensors file .*truncated or damaged"),
        (_empty, "not a readable safetensors file"),
        (_index("[]"), "must hold a JSON object, got list"),
        (_index("{}"), "must hold a non-empty object 'weight_map'"),
        (_index('{"weight_map": {"mlp2.0.weight": "../x"}}'), r"must be a file name beside it, got '../x'"),
        (
            _index('{"weight_map": {"mlp2.0.weight": "x.safetensors"}}'),
            "names the shard x.safetensors, which is missing",
        ),
        (_index('{"weight_map": {"mlp2.9.weight": "other.safetensors"}}'), "missing mlp2.0.weight"),
        (
            _index('{"weight_map": {"model.mlp2.0.weight": "other.safetensors"}}'),
            "the index says model.mlp2.0.weight is in other.safetensors, which does not hold it",
        ),
    ],
)
def test_unusable(checkpoint, change, message):
    change(checkpoint)
    with pytest.raises(FlashCheckpointError, match=message):
        load_flash(checkpoint)


def test_never_unpickles(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(FlashCheckpointError):
            load_flash(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.fixture(scope="module")
def original(saved):
    return (saved / "model.safetensors").read_bytes()


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_load_or_raise_one_error(original, tmp_path, data):
    header = 8 + int.from_bytes(original[:8], "little")
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(0, 6))):
        end = data.draw(st.sampled_from([8, header, len(original)]))
        damaged[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))]
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(damaged)
    try:
        weights = load_flash(file)
    except FlashCheckpointError:
        return
    for table, tensors in ((CONNECTOR, weights.connector), (ROUTER, weights.router)):
        for key in table:
            assert list(tensors[key.released].shape) == key.sizes({"V": weights.vit_hidden, "H": weights.llm_hidden})


def test_save_refuses_to_replace_unless_told(checkpoint):
    connector, router = tiny_weights()
    with pytest.raises(FileExistsError, match=r"already holds a checkpoint \(model.safetensors\).*overwrite=True"):
        save_flash(checkpoint, connector, router)
    save_flash(checkpoint, connector, router, overwrite=True, max_shard_size="20KB")
    assert not (checkpoint / "model.safetensors").exists()
    assert_same(load_flash(checkpoint).router, router)
    connector, router = tiny_weights()
    save_flash(checkpoint, connector, router, overwrite=True)
    assert not (checkpoint / "model.safetensors.index.json").exists()
    assert [path.name for path in checkpoint.glob("*.safetensors")] == ["model.safetensors"]  # no shard is left
    assert_same(load_flash(checkpoint).router, router)


def test_saving_again_takes_away_the_shards_that_it_replaces_and_nothing_else(checkpoint):
    save_flash(checkpoint, *tiny_weights(), overwrite=True, max_shard_size="20KB")
    many = {path.name for path in checkpoint.glob("model-*.safetensors")}
    (checkpoint / "mine.safetensors").write_bytes(b"")
    save_flash(checkpoint, *tiny_weights(), overwrite=True, max_shard_size="100KB")
    left = {path.name for path in checkpoint.glob("model-*.safetensors")}
    assert 1 < len(left) < len(many)
    assert not left & many
    assert (checkpoint / "mine.safetensors").exists()
    load_flash(checkpoint)


@pytest.mark.parametrize("max_shard_size", ["20KB", "5GB"])
@pytest.mark.parametrize("step", range(1, 12))
def test_interrupted_save_leaves_no_half_checkpoint(checkpoint, monkeypatch, step, max_shard_size):
    """The process dies at the n-th file operation: the folder holds the old checkpoint, none, or the whole new one."""
    old, new = load_flash(checkpoint), tiny_weights()
    calls = []

    def dying(operation):
        def call(*args, **kwargs):
            calls.append(operation)
            if len(calls) >= step:
                raise KeyboardInterrupt
            return operation(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(os, "replace", dying(os.replace))
    try:
        save_flash(checkpoint, *new, overwrite=True, max_shard_size=max_shard_size)
        finished = True
    except KeyboardInterrupt:
        finished = False
    monkeypatch.undo()
    assert not list(checkpoint.glob(".*.tmp"))
    try:
        weights = load_flash(checkpoint)
    except FlashCheckpointError as error:
        message = str(error)
        weights = None
    if weights is None:
        assert not finished
        assert "no checkpoint" in message or "without model.safetensors.index.json" in message
    else:
        whole = [(old.connector, old.router)] * (not finished) + [new]
        assert any(
            all(torch.equal(weights.connector[k], v) for k, v in connector.items())
            and all(torch.equal(weights.router[k], v) for k, v in router.items())
            for connector, router in whole
        )


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda c, r: c.pop("mlp2.1.bias"), {}, r"connector lacks mlp2.1.bias, expected \[2H\] = \[48\]"),
        (lambda c, r: r.update(x=torch.zeros(1)), {}, "router has x, which is no tensor of a Flash router"),
        (
            lambda c, r: r.update({"gating.gate.1.bias": torch.zeros(3)}),
            {},
            r"router: gating.gate.1.bias must have shape \[2\] = \[2\], got \[3\]",
        ),
        (lambda c, r: c.update({"mlp1.3.bias": c["mlp1.3.bias"].int()}), {}, "mlp1.3.bias must be floating point"),
        (None, {"format": "onnx"}, "format must be 'released' or 'hf', got 'onnx'"),
        (None, {"max_shard_size": "5 parsecs"}, "max_shard_size must be bytes or a size such as '500MB' or '2GiB'"),
        (None, {"extra": {"mlp1.0.bias": torch.zeros(1)}}, r"extra must not hold Flash tensors, got mlp1.0.bias"),
    ],
)
def test_save_checks_before_writing(tmp_path, change, options, message):
    connector, router = tiny_weights()
    if change:
        change(connector, router)
    with pytest.raises(ValueError, match=message):
        save_flash(tmp_path / "new", connector, router, **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("format", ["released", "hf"])
def test_modules_from_and_to_disk(golden, tmp_path, format):
    connector = vico_ext.FusedConnector(32, 48, dtype=torch.float64)
    router = vico_ext.VisualResolutionRouter(32, dtype=torch.float64)
    connector.load_state_dict({k: v for k, v in golden.weights.items() if k.startswith("mlp")})
    router.load_state_dict({k: v for k, v in golden.weights.items() if not k.startswith("mlp")})
    save_flash(tmp_path, connector, router, format=format)
    weights = load_flash(tmp_path)
    tokens = golden["vit_tokens"].double()
    with torch.no_grad():
        p = weights.router_module()(tokens)
        full = weights.connector_module()(tokens)
    for module in (weights.router_module(torch.bfloat16), weights.connector_module(torch.bfloat16)):
        assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.bfloat16}
        assert not module.training
    torch.testing.assert_close(p, golden["gate"][:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(full, golden["connector_256"].view_as(full), rtol=0, atol=1e-10)
