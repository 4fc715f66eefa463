"""Every example runs, offline, as a user runs it; so do the blocks of the pages in docs/ that are marked as Python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
RUNS = {
    "demo.py": (["--out", "{out}"], "Both chose the same tiles"),
    "internvl.py": (["--keep", "0.25"], "3 images, 6 tiles, 6 compressed (100%); visual tokens 96 -> 24"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    if name == "demo.py":
        pytest.importorskip("matplotlib")
        pytest.importorskip("skimage")
    arguments, said = RUNS[name]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *(argument.format(out=tmp_path / "out") for argument in arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


@pytest.mark.parametrize("page", ["internvl.md"])
def test_python_blocks_of_a_page_run(page):
    found = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text(), flags=re.M | re.S)
    assert found
    namespace: dict[str, object] = {}
    for block in found:
        exec(compile(block, page, "exec"), namespace)
