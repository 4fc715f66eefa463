"""``config.json`` between the two layouts of an InternVL checkpoint."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from vico_ext.checkpoint.files import FlashCheckpointError, read_json

__all__ = ["hf_config", "hf_vision_config", "image_token_id", "released_config"]

_VISION_RENAMES = {
    "qk_normalization": "use_qk_norm",
    "qkv_bias": "attention_bias",
    "attention_probs_dropout_prob": "attention_dropout",
}
_VISION_DROPPED = ("architectures", "auto_map", "model_type", "torch_dtype", "dtype", "use_flash_attn")
_LANGUAGE_DROPPED = ("auto_map", "torch_dtype", "dtype", "_name_or_path", "transformers_version")
_LANGUAGES = ("llama", "qwen2", "qwen3", "qwen3_moe", "gpt_oss")
_KEPT = "released_config"  # the released config.json as it was, inside the transformers one
_PLACEHOLDER = "<IMG_CONTEXT>"


def hf_config(path: Path, config: dict[str, Any], placeholder_id: int | None) -> dict[str, Any]:
    """The transformers ``config.json`` of a released checkpoint; holds the released one for the way back.

    Args:
        path: of the checkpoint, for messages and its tokenizer files.
        config: its ``config.json``.
        placeholder_id: the id of a visual token's place; by default the tokenizer's ``<IMG_CONTEXT>``.

    Raises:
        FlashCheckpointError: something in the configuration has no counterpart in transformers.
    """
    language, vision = config.get("llm_config"), config.get("vision_config")
    if not isinstance(language, dict) or not isinstance(vision, dict):
        raise FlashCheckpointError(path, "config.json must have llm_config and vision_config, as released models do")
    problems = []
    if language.get("model_type") not in _LANGUAGES:
        problems.append(
            f"its language model is {language.get('model_type')!r}, which transformers' InternVL cannot hold "
            f"(known: {', '.join(_LANGUAGES)})"
        )
    if config.get("ps_version", "v2") != "v2":
        problems.append(f"ps_version is {config['ps_version']!r}; transformers' InternVL shuffles pixels as 'v2'")
    if config.get("select_layer", -1) != -1:
        problems.append(f"select_layer is {config['select_layer']}; ViCO reads the ViT's last layer, -1")
    if problems:
        raise FlashCheckpointError(path, problems)
    placeholder_id = image_token_id(path) if placeholder_id is None else placeholder_id
    new_vision = hf_vision_config(config)
    patches = new_vision["image_size"][0] // new_vision["patch_size"][0]
    ratio = config.get("downsample_ratio", 0.5)
    flash = {name: value for name, value in config.items() if name.startswith("flash_")}
    dtype = config.get("torch_dtype", config.get("dtype", language.get("torch_dtype")))
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": {name: value for name, value in language.items() if name not in _LANGUAGE_DROPPED},
        "vision_config": new_vision,
        "image_token_id": placeholder_id,
        "image_seq_length": int(patches * ratio) ** 2,
        "downsample_ratio": ratio,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": bool(language.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        **flash,
        **({"torch_dtype": dtype} if dtype else {}),
        _KEPT: config,
    }


def hf_vision_config(config: dict[str, Any]) -> dict[str, Any]:
    """transformers' ``vision_config`` of a ``config.json`` in either layout; unchanged where it is that already."""
    vision = {_VISION_RENAMES.get(name, name): value for name, value in config["vision_config"].items()}
    for name in _VISION_DROPPED:
        vision.pop(name, None)
    if config.get("force_image_size"):
        vision["image_size"] = config["force_image_size"]
    for name, default in (("image_size", 448), ("patch_size", 14)):
        size = vision.get(name, default)
        vision[name] = [size, size] if isinstance(size, int) else size
    return vision


def released_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The released ``config.json`` of a transformers checkpoint: what the way there kept, with the sizes of today.

    Raises:
        FlashCheckpointError: there is no ``text_config`` and ``vision_config``.
    """
    language, vision = config.get("text_config"), config.get("vision_config")
    if not isinstance(language, dict) or not isinstance(vision, dict):
        raise FlashCheckpointError(path, "config.json must have text_config and vision_config, as transformers has it")
    made: dict[str, Any] = copy.deepcopy(config.get(_KEPT) or {})
    if not made:
        made = {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "llm_config": _with_rope_theta(language),
            "vision_config": {"model_type": "intern_vit_6b", "architectures": ["InternVisionModel"]},
            "ps_version": "v2",
            "select_layer": -1,
            "downsample_ratio": config.get("downsample_ratio", 0.5),
        }
    names = {new: old for old, new in _VISION_RENAMES.items()}
    for name, value in vision.items():
        if name in _VISION_DROPPED:
            continue
        old = names.get(name, name)
        if name in ("image_size", "patch_size") and isinstance(value, list):
            value = value[0]
        if old in made["vision_config"] or not config.get(_KEPT):
            made["vision_config"][old] = value
    made["llm_config"].update({name: value for name, value in language.items() if name in made["llm_config"]})
    made.update({name: value for name, value in config.items() if name.startswith("flash_")})
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype and ("torch_dtype" in made or not config.get(_KEPT)):
        made["torch_dtype"] = dtype
    if not config.get(_KEPT):
        made["force_image_size"] = made["vision_config"].get("image_size", 448)
    return made


def _with_rope_theta(language: dict[str, Any]) -> dict[str, Any]:
    """The language model's section under the names of transformers 4, for which the custom code is written.

    transformers 5 has ``rope_parameters``, which 4 does not know: it would take its default for ``rope_theta``.
    """
    made = copy.deepcopy(language)
    rope = made.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        del made["rope_parameters"]
        made["rope_theta"] = rope.pop("rope_theta")
        made["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return made


def image_token_id(path: Path) -> int:
    """The id of ``<IMG_CONTEXT>`` by the tokenizer files of a checkpoint.

    Raises:
        FlashCheckpointError: none of them says.
    """
    folder = path if path.is_dir() else path.parent
    for name in ("tokenizer_config.json", "added_tokens.json", "tokenizer.json"):
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name)
        tokens = dict(content) if name == "added_tokens.json" else {}
        decoder = content.get("added_tokens_decoder", {})
        tokens |= {entry.get("content"): int(number) for number, entry in decoder.items()}
        listed = content.get("added_tokens", []) if name == "tokenizer.json" else []
        tokens |= {entry["content"]: int(entry["id"]) for entry in listed}
        if _PLACEHOLDER in tokens:
            return int(tokens[_PLACEHOLDER])
    raise FlashCheckpointError(
        path, f"no tokenizer file says the id of {_PLACEHOLDER}: put them beside config.json, or give --image-token-id"
    )


def json_text(content: dict[str, Any]) -> str:
    """As transformers writes it."""
    return json.dumps(content, indent=2) + "\n"
