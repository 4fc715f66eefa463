"""The vision tower: custom-code and HF-native checkpoints give the same transformers model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from vico_ext import FlashCheckpointError
from vico_ext.checkpoint.vision import load_vision_tower

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["layer_norm", "rms_norm with qk norm"])
def tower(request):
    norm, qk_norm = request.param.split()[0], "qk" in request.param
    config = transformers.InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[28, 28],
        patch_size=[14, 14],
        attention_bias=not qk_norm,
        use_qk_norm=qk_norm,
        norm_type=norm,
    )
    model = transformers.InternVLVisionModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def custom_code(tower):
    """config.json and tensors as the released custom-code checkpoints have them."""
    renames = (
        ("encoder.layer.", "encoder.layers."),
        ("cls_token", "class_embedding"),
        ("position_embeddings", "position_embedding"),
        ("patch_embeddings.projection", "patch_embedding"),
        ("lambda_", "ls"),
        ("attention.projection_layer", "attn.proj"),
        ("attention.", "attn."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
    )
    tensors = {}
    for name, tensor in tower.state_dict().items():
        for new, old in renames:
            name = name.replace(new, old)
        tensors[f"vision_model.{name}"] = tensor
    for name in [name for name in tensors if ".q_proj." in name]:
        parts = [tensors.pop(name.replace(".q_proj.", f".{p}_proj.")) for p in "qkv"]
        tensors[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    vision = {
        "architectures": ["InternVisionModel"],
        "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"},
        "model_type": "intern_vit_6b",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 448,
        "patch_size": 14,
        "qkv_bias": tower.config.attention_bias,
        "qk_normalization": tower.config.use_qk_norm,
        "norm_type": tower.config.norm_type,
        "drop_path_rate": 0.1,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "bfloat16",
        "use_flash_attn": True,
    }
    return {"force_image_size": 28, "select_layer": -1, "vision_config": vision}, tensors


def hf_native(tower):
    config = {"vision_config": json.loads(tower.config.to_json_string()), "vision_feature_layer": -1}
    return config, {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}


def write(folder, config, tensors):
    other = {"language_model.model.layers.0.mlp.gate.weight": torch.zeros(3)}
    save_file(
        {name: tensor.contiguous() for name, tensor in {**tensors, **other}.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("format", [custom_code, hf_native])
def test_same_features(tower, tmp_path, format):
    write(tmp_path, *format(tower))
    loaded = load_vision_tower(tmp_path)
    assert type(loaded) is transformers.InternVLVisionModel
    assert not loaded.training
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    half = load_vision_tower(tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_all_problems_in_one_error(tower, tmp_path):
    config, tensors = hf_native(tower)
    prefix = "model.vision_tower."
    del tensors[f"{prefix}embeddings.cls_token"]
    tensors[f"{prefix}encoder.layer.1.mlp.fc1.bias"] = torch.zeros(7)
    tensors[f"{prefix}encoder.layer.0.lambda_1"] = torch.zeros(32, dtype=torch.int8)
    tensors[f"{prefix}encoder.layer.9.lambda_1"] = torch.zeros(32)
    write(tmp_path, config, tensors)
    with pytest.raises(FlashCheckpointError) as caught:
        load_vision_tower(tmp_path)
    assert caught.value.problems == (
        "vision tower: missing embeddings.cls_token, expected [1, 1, 32]",
        "vision tower: encoder.layer.9.lambda_1 is unknown to InternVLVisionModel",
        "vision tower: encoder.layer.1.mlp.fc1.bias must have shape [48], got [7]",
        "vision tower: encoder.layer.0.lambda_1 must be floating point, got torch.int8",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("vision_config"), "config.json with a vision_config is needed to build the vision tower"),
        (lambda c: c.update(select_layer=-4), "features of ViT layer -4 are asked for; only the last (-1) is served"),
        (lambda c: c["vision_config"].update(num_attention_heads=5), "vision_config in config.json is not usable"),
        (lambda c: c["vision_config"].update(hidden_size="wide"), "vision_config in config.json is not usable"),
    ],
)
def test_unusable_configurations(tower, tmp_path, change, message):
    config, tensors = custom_code(tower)
    change(config)
    write(tmp_path, config, tensors)
    with pytest.raises(FlashCheckpointError, match=re.escape(message)):
        load_vision_tower(tmp_path)
