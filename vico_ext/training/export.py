"""The trained model as a folder that transformers, load_internvl and load_flash read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from vico_ext.training.models import merge_lora
from vico_ext.training.options import TrainOptions
from vico_ext.training.setup import load_dtype

__all__ = ["export"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".index.json")


def export(accelerator: Any, module: Any, policy: Any, options: TrainOptions) -> Path:
    """Writes ``OUT/model``: adapters merged, in the dtype it was loaded in, tokenizer and processor files beside it.

    All processes call this. The folder appears complete, in place of one that was there.
    """
    path = Path(options.out) / "model"
    unfinished, old = path.with_name(".model.tmp"), path.with_name(".model.old")
    state: dict[str, Any] | None = None
    if accelerator.is_fsdp2:
        if getattr(options, "train", "") == "lora":
            raise ValueError("LoRA cannot be merged into a sharded model: start the last steps again without FSDP")
        gathered = accelerator.get_state_dict(module)
        state = {
            k.removeprefix("policy."): v.to(load_dtype(options)) for k, v in gathered.items() if k.startswith("policy.")
        }
    if accelerator.is_main_process:
        for leftover in (unfinished, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        merge_lora(policy)
        if state is None:
            policy.to(load_dtype(options))
        policy.save_pretrained(unfinished, state_dict=state)
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
