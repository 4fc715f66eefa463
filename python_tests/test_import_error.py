"""A failed import says what is wrong and how to cure it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vico_ext

PACKAGE = Path(vico_ext.__file__).parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package that a subprocess can break."""
    shutil.copytree(PACKAGE, tmp_path / "vico_ext", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def _import(folder: Path, before: str = "") -> str:
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{before}\nimport vico_ext"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert result.returncode == 1, result.stderr
    return result.stderr


def _compiled(folder: Path) -> Path:
    (library,) = (folder / "vico_ext").glob("_C*.so")
    return library


def test_without_compiled_ops(copy):
    _compiled(copy).unlink()
    message = _import(copy)
    assert "its compiled ops (vico_ext._C) are not" in message
    assert "pip install -e ." in message


def test_with_damaged_compiled_ops(copy):
    _compiled(copy).write_bytes(b"not a shared object" * 100)
    message = _import(copy)
    assert "The compiled ops of vico_ext do not load with torch" in message
    assert "pip install --force-reinstall --no-deps ." in message


def test_without_torch(copy):
    message = _import(copy, "sys.modules['torch'] = None")
    assert "vico_ext needs PyTorch" in message
    assert "pip install 'torch>=2.11'" in message


def test_with_an_old_torch(copy):
    (copy / "torch").mkdir()
    (copy / "torch" / "__init__.py").write_text("__version__ = '2.9.1+cpu'\n")
    message = _import(copy)
    assert "vico_ext needs torch 2.11 or newer, found 2.9.1+cpu" in message
