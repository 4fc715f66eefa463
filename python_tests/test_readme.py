"""The README's Python blocks run as they stand, one after the other; its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vico_ext import cli

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), flags=re.M | re.S)
    return [body for name, body in fenced if name == language]


def test_python_blocks_run():
    namespace: dict[str, object] = {}
    found = blocks("python")
    assert found
    for block in found:
        exec(compile(block, str(README), "exec"), namespace)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"\bmake ([a-z-]+)", README.read_text())) - {"it"}
    assert named
    assert named <= targets


def test_commands_exist(capsys):
    named = set(re.findall(r"^vico ([a-z]+)", "\n".join(blocks("")), flags=re.M))
    assert named
    for command in named:
        with pytest.raises(SystemExit) as done:
            cli.main([command, "--help"])
        assert done.value.code == 0
        assert "usage: vico" in capsys.readouterr().out
