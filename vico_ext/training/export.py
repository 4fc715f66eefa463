"""The trained model as a folder that transformers, load_internvl and load_flash read."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from vico_ext.integrations import patch_internvl
from vico_ext.training.checkpoints import full_tensor
from vico_ext.training.models import merge_lora
from vico_ext.training.options import TrainOptions
from vico_ext.training.setup import load_dtype

__all__ = ["export"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".index.json")


def export(accelerator: Any, policy: Any, options: TrainOptions) -> Path:
    """Writes ``OUT/model``: adapters merged, in the dtype it was loaded in, tokenizer and processor files beside it.

    All processes call this. The folder appears complete, in place of one that was there.
    """
    path = Path(options.out) / "model"
    unfinished, old = path.with_name(".model.tmp"), path.with_name(".model.old")
    state: dict[str, Any] | None = None
    if any(hasattr(parameter, "full_tensor") for parameter in policy.parameters()):
        if getattr(options, "train", "") == "lora":
            raise ValueError(
                "adapters cannot be merged into a sharded model; the last checkpoint is complete: run the same command "
                "again without FSDP, and it will only export"
            )
        state = {}
        for name, tensor in policy.state_dict().items():  # all processes gather, one keeps
            whole = full_tensor(tensor)
            if accelerator.is_main_process:
                state[name] = whole
    if accelerator.is_main_process:
        for leftover in (unfinished, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        merge_lora(policy)
        whole_model = policy if state is None else _unsharded(policy, state)
        whole_model.to(load_dtype(options)).save_pretrained(unfinished)
        for file in sorted(Path(options.model).iterdir()):
            if file.is_file() and not file.name.endswith(_WEIGHTS) and not (unfinished / file.name).exists():
                shutil.copy(file, unfinished / file.name)
        if path.exists():
            os.rename(path, old)
        os.rename(unfinished, path)
        if old.exists():
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return path


def _unsharded(policy: Any, state: dict[str, Any]) -> Any:
    """A model of the policy's kind that holds these tensors themselves."""
    from transformers import InternVLForConditionalGeneration

    with torch.device("meta"):
        model = patch_internvl(InternVLForConditionalGeneration(copy.deepcopy(policy.config)))
    model.load_state_dict(state, assign=True)
    return model
