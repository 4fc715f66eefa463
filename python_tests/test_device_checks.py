"""Values that only kernels look at, because the host would have to wait for them: bad ones end in a message.

On CUDA a process cannot use the device afterwards, so there each has one of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from device import DEVICE

SETUP = """
import torch
from torch import tensor, zeros
import vico_ext
from vico_ext import functional as VF
ops = torch.ops.vico
"""

# What runs on the default device, and what is said: one for each check of the kernels.
CASES = {
    "pixel_shuffle": (
        "VF.pixel_shuffle(zeros(2, 17, 4), 2, tile_index=tensor([2]))",
        r"tile_index must lie in \[0, 2\), got 2 at position 0",
    ),
    "normalized_shuffle": (
        "VF.normalized_shuffle(zeros(2, 17, 4), zeros(16), zeros(16), 2, tile_index=tensor([0, -1]))",
        r"tile_index must lie in \[0, 2\), got -1 at position 1",
    ),
    "merge_tokens": (
        "ops.merge_tokens(zeros(2, 3), zeros(4, 3), tensor([0, 6]))",
        r"source must lie in \[-1, 6\), got 6 at position 1",
    ),
    "scatter_tokens": (
        "VF.scatter_tokens(zeros(4, 3), tensor([1, -1]), zeros(2, 3))",
        r"index must lie in \[0, 4\), got -1 at position 1",
    ),
    "scatter_tokens, twice": (
        "VF.scatter_tokens_(zeros(4, 3), tensor([1, 2, 1]), zeros(3, 3))",
        "must not name a row twice, got 1 again at position 2",
    ),
    "keep_placeholders": (
        "ops.keep_placeholders(tensor([[7, 7, 7, 1]]), None, tensor([True, True]), 7, 3, 1)",
        r"must hold 6 placeholders \(id 7\) in the whole batch.* 2 tiles .* times 3, got 3",
    ),
    "keep_placeholders, runs": (
        "ops.keep_placeholders(tensor([[7, 7, 1, 7]]), None, tensor([True]), 7, 3, 1)",
        "3 consecutive placeholders .* of one row, got only 2 at row 0, position 0",
    ),
    "compress_positions": (
        "VF.compress_positions(tensor([[1, 2], [3, 4]]), tensor([[True, False], [True, True]]), 1, placeholder_id=7)",
        "length must be at least the 2 positions that row 1 keeps, got 1",
    ),
    "renumber_positions": (
        "VF.renumber_positions(tensor([[1, 2], [3, 4]]), tensor([[1, 0], [2, 3]]))",
        "position must hold flat positions of its own row, ascending, or -1",
    ),
    "pack_tokens, offsets": (
        "ops.pack_tokens(zeros(1, 4, 3), zeros(1, 2, 3), None, None, tensor([1, 5, 7]), tensor([0, 1]))",
        "cu_tokens must begin with 0, got 1",
    ),
    "pack_tokens, order": (
        "ops.pack_tokens(zeros(1, 4, 3), zeros(1, 2, 3), None, None, tensor([0, 4, 6]), tensor([0, 2]))",
        r"order must hold each tile of \[0, 2\) once, got 2 at position 1",
    ),
    "pack_tokens, sizes": (
        "ops.pack_tokens(zeros(1, 4, 3), zeros(1, 2, 3), None, None, tensor([0, 4, 6]), tensor([1, 0]))",
        "cu_tokens gives tile .* is the plan of another batch",
    ),
    "pack_tokens_, places": (
        "ops.pack_tokens_(zeros(7, 3), zeros(1, 4, 3), zeros(1, 2, 3), None, None, tensor([4, 0]), tensor([0, 1]))",
        "first_row gives tile 0 rows from 4 on, but it has 4 tokens, and out 7 rows",
    ),
    "pack_tokens_, one place": (
        "ops.pack_tokens_(zeros(7, 3), zeros(1, 4, 3), zeros(1, 2, 3), None, None, tensor([1, 4]), tensor([0, 1]))",
        "first_row gives tile . rows . to ., and some of them to another tile too",
    ),
    "text_rows": (
        "ops.text_rows(zeros(2, 3), tensor([0, 6]), 4)",
        r"source must lie in \[-1, 6\), got 6 at position 1",
    ),
    "tile_rows": (
        "ops.tile_rows(tensor([0, 2, 1, 3]), tensor([0, 2]), 2)",
        "source must hold the tokens of tile 0, 0 to 2 of cu_tokens behind 2 rows of embeddings, one after another",
    ),
    "FusedConnector": (
        "plan = vico_ext.RoutingPlan.from_compress(tensor([False, True]), (16, 4)); "
        "plan = vico_ext.RoutingPlan(plan.compress, plan.cu_tokens, plan.order.flip(0), 1, (16, 4)); "
        "vico_ext.FusedConnector(6, 10)(zeros(2, 65, 6), plan)",
        "is the plan of another batch",
    ),
    "packed_projection": (
        "x, w, b = zeros(1, 4, 8).bfloat16(), zeros(6, 8).bfloat16(), zeros(6).bfloat16(); "
        "ops.packed_projection(x, w, b, x[:, :2], w, b, tensor([0, 4, 6]) + 5, tensor([0, 1]))",
        r"cu_tokens must begin with 0, got 5|rows must go to places in \[0, 6\), row . would go to ",
    ),
    "shuffle_statistics": (
        "ops.shuffle_statistics(zeros(2, 17, 4), 1e-5, 4, 4, 2, tensor([0, 2]), 1)",
        r"tile_index must lie in \[0, 2\), got 2 at position 1",
    ),
    "shuffled_projection": (
        "w, s, n = zeros(6, 16).bfloat16(), zeros(1, 4), zeros(6); "
        "ops.shuffled_projection(zeros(2, 17, 4).bfloat16(), s, s, w, n, n, 4, 4, 2, tensor([2]), 1, False, True)",
        r"tile_index must lie in \[0, 2\), got 2 at position 0",
    ),
    "route": ("VF.budget_route(tensor([0.5, torch.nan]), 1)", "p must hold probabilities, got NaN for tile 1"),
    "plan_routing": (
        "vico_ext.plan_routing(tensor([0.5, 1.5]), vico_ext.ThresholdPolicy())",
        r"probabilities in \[0, 1\], got 1.5 for tile 1",
    ),
    "quantile_route": (
        "ops.quantile_route(zeros(3), tensor([0, 2, 1, 3]), 0.5, 0.0)",
        "cu_tiles must not decrease, got 2 then 1 at position 1",
    ),
    "quantile_route, end": (
        "ops.quantile_route(zeros(3), tensor([0, 2]), 0.5, 0.0)",
        r"end with the number of tiles \(3\), got 0 and 2",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_values_are_named(name, tmp_path):
    code, message = CASES[name]
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match=message):
            exec(SETUP + code, {})
        return
    program = f'{SETUP}torch.set_default_device("cuda")\n{code}\ntorch.cuda.synchronize()'
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    output = done.stdout + done.stderr
    assert done.returncode != 0, output
    assert re.search(message, output), output
    assert "device-side assert" in output
