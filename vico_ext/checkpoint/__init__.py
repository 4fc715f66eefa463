"""Flash checkpoints on disk: safetensors in and out, both key formats, never a pickle."""

from vico_ext.checkpoint.files import CheckpointFiles, FlashCheckpointError
from vico_ext.checkpoint.load import FlashWeights, load_flash
from vico_ext.checkpoint.save import save_flash

__all__ = ["CheckpointFiles", "FlashCheckpointError", "FlashWeights", "load_flash", "save_flash"]
