"""Flash checkpoints on disk: safetensors in and out, both key formats, never a pickle."""

from vico_ext.checkpoint.convert import Conversion, convert_checkpoint
from vico_ext.checkpoint.files import CheckpointFiles, FlashCheckpointError
from vico_ext.checkpoint.load import FlashWeights, load_flash
from vico_ext.checkpoint.save import save_flash

__all__ = [
    "CheckpointFiles",
    "Conversion",
    "FlashCheckpointError",
    "FlashWeights",
    "convert_checkpoint",
    "load_flash",
    "save_flash",
]
