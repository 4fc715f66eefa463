"""What every op's door does about devices, as far as no GPU is needed: registration, and errors by their messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from device import cpu_only
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensorMode

from vico_ext import _C

ROOMS = Path(__file__).resolve().parent.parent / "csrc"
op = torch.ops.vico.pixel_shuffle.default


def _cuda_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a door sees as a tensor on cuda:0, without a GPU; no kernel can read it."""
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda:0")


@pytest.mark.skipif(not ROOMS.exists(), reason="the sources are not here")
def test_rooms_with_a_cuda_kernel_register_their_doors_for_both_devices():
    rooms = [kernel.parent for kernel in ROOMS.glob("*/*_cuda.cu") if kernel.stem == f"{kernel.parent.name}_cuda"]
    assert ROOMS / "pixel_shuffle" in rooms
    for room in rooms:
        door = (room / f"{room.name}_op.cpp").read_text()
        names = re.findall(r'm\.impl\("(\w+)"', door)
        assert names
        for name in names:
            for key in ("CPU", "CUDA"):
                assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vico::{name}", key), (name, key)


@cpu_only("the GPU is there")
@pytest.mark.skipif(_C.cuda not in ("", "host"), reason="built with CUDA kernels")
def test_cuda_tensors_without_cuda_kernels():
    message = {
        "": r"^vico::pixel_shuffle: vico_ext was built without CUDA kernels, got a tensor on cuda:0: "
        r"install it again with nvcc \(CUDA 12.5 or newer\) on the PATH or CUDA_HOME set",
        "host": "^vico::pixel_shuffle: this is the test build .* got a tensor on cuda:0",
    }[_C.cuda]
    with pytest.raises(RuntimeError, match=message):
        op.redispatch(DispatchKeySet(DispatchKey.CUDA), _cuda_tensor(1, 17, 4), 4, 4, 2, None, 1)


@cpu_only("fake tensors stand for the GPU's")
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "pixel_shuffle",
            lambda: (torch.zeros(1, 17, 4), 4, 4, 2, _cuda_tensor(1, dtype=torch.long), 1),
            r"tile_index must be on the device of tokens \(cpu\), got cuda:0",
        ),
        (
            "normalized_shuffle",
            lambda: (torch.zeros(1, 16, 2), torch.ones(8), _cuda_tensor(8), 1e-5, 4, 4, 2),
            r"bias must be on the device of tokens \(cpu\), got cuda:0",
        ),
        (
            "bias_gelu_backward",
            lambda: (_cuda_tensor(2, 3), torch.zeros(2, 3), None, None, 0.0),
            r"grad_out must be on the device of x \(cpu\), got cuda:0",
        ),
        (
            "pack_tokens",
            lambda: (
                *(torch.zeros(1, n, 4) for n in (4, 1)),
                None,
                None,
                torch.tensor([0, 4, 5]),
                _cuda_tensor(2, dtype=torch.long),
            ),
            r"order must be on the device of full \(cpu\), got cuda:0",
        ),
    ],
)
def test_tensors_on_two_devices(name, arguments, message):
    door = getattr(torch.ops.vico, name).default
    with pytest.raises(RuntimeError, match=message):
        door.redispatch(DispatchKeySet(DispatchKey.CPU), *arguments())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        # 274177 * 67280421310721 = 2^64 + 1: one token in 64 bits.
        (
            "pixel_shuffle_backward",
            (torch.zeros(1, 1, 4), 1, 274177, 67280421310721, 1),
            "the grid must have at most 2147483647 rows and columns, got 274177 x 67280421310721",
        ),
        (
            "normalized_shuffle",
            (torch.zeros(1, 1, 4), torch.ones(4), torch.ones(4), 1e-5, 274177, 67280421310721, 1),
            "the grid must have at most 2147483647 rows and columns",
        ),
        (
            "pixel_shuffle",
            (torch.zeros(1, 4, 4), 2, 2, 2, None, 2**63 - 1),
            r"skip must lie in \[0, 2147483647\], got 9223372036854775807",
        ),
        ("plan_tokens", (torch.zeros(4) > 0, 2**62, 1), "4 tiles of 4611686018427387904 tokens are more than"),
        (
            "keep_placeholders",
            (torch.zeros(1, 4).long(), None, torch.zeros(4) > 0, 1, 2**62, 1),
            "4 tiles of 4611686018427387904 tokens are more than",
        ),
        (
            "merge_tokens_backward",
            (torch.zeros(1, 4), torch.zeros(1).long(), 2**63 - 1, 2**63 - 1, False, True),
            "embed_rows and token_rows are more rows than can be counted",
        ),
    ],
)
def test_sizes_that_overflow(name, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.vico, name)(*arguments)
