"""The command vico: run in this process on a tiny model and tiny images, and once as a program."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vico_ext import cli
from vico_ext._load import _C
from vico_ext.cli.policies import parse_policy

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A Flash checkpoint whose tiles are 56 pixels wide: 16 patch tokens, 4 or 1 visual tokens."""
    from vico_ext.cli.demo_model import write_checkpoint

    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, 3, vit_hidden=32, vit_layers=1, llm_hidden=48, image_size=56, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """a.png 2x1 tiles and thumbnail, b.jpg one tile, c.png 2x2 and thumbnail."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, (width, height) in {"a.png": (224, 112), "b.jpg": (50, 50), "c.png": (130, 130)}.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)
    return folder


def vico(*args, capsys=None):
    """Exit status, stdout and stderr of the command."""
    try:
        status = cli.main([str(arg) for arg in args])
    except SystemExit as done:
        status = done.code
    out, err = capsys.readouterr() if capsys else ("", "")
    return status, out, err


def route(model, out, *args):
    status = cli.main(["route", *map(str, args), "--model", str(model), "--out", str(out)])
    return status, json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("args", [["--help"], ["info", "--help"], ["route", "--help"], ["demo", "--help"]])
def test_help(args, capsys):
    status, out, err = vico(*args, capsys=capsys)
    assert (status, err) == (0, "")
    assert out.startswith("usage: vico")
    assert re.search(r"^(examples|Start here):\n  +vico ", out, re.M)
    assert max(map(len, out.splitlines())) <= 125


def test_info(capsys):
    status, out, _ = vico("info", "--json", capsys=capsys)
    facts = json.loads(out)
    assert status == 0
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["transformers"] == transformers.__version__
    assert "pixel_shuffle" in facts["ops"]
    assert facts["cpu_threads"] == torch.get_num_threads()
    assert facts["instruction_set"] in ("avx512", "avx2", "baseline")
    assert facts["cuda_kernels"] == _C.cuda.split()
    status, out, _ = vico("info", capsys=capsys)
    assert status == 0
    for word in (torch.__version__, facts["compiler"], facts["instruction_set"], "CUDA kernels", "pixel_shuffle"):
        assert word in out


def test_route_reports_every_tile(model, pictures, tmp_path, capsys):
    status, report = route(model, tmp_path / "out", pictures)
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    assert [Path(image["file"]).name for image in report["images"]] == ["a.png", "b.jpg", "c.png"]
    first, single, square = report["images"]
    assert (first["grid"], first["thumbnail"], len(first["tiles"])) == ({"rows": 2, "columns": 4}, True, 9)
    assert (single["grid"], single["thumbnail"], len(single["tiles"])) == ({"rows": 1, "columns": 1}, False, 1)
    assert (square["grid"], len(square["tiles"])) == ({"rows": 3, "columns": 3}, 10)
    for image in report["images"]:
        assert set(image["ms"]) == {"read", "tile", "vit", "router", "plan", "connector", "picture"}
        with Image.open(tmp_path / "out" / image["picture"]) as picture:
            assert min(picture.size) > 200
        for tile in image["tiles"]:
            assert 0 <= tile["p"] <= 1
            assert tile["compressed"] == (tile["p"] >= 0.5)  # the default policy
            assert tile["tokens"] == (1 if tile["compressed"] else 4)
        assert image["tokens_before"] == 4 * len(image["tiles"])
        assert image["tokens_after"] == sum(tile["tokens"] for tile in image["tiles"])
    assert [(t["row"], t["column"], t["thumbnail"]) for t in first["tiles"][3:5]] == [(0, 3, False), (1, 0, False)]
    assert first["tiles"][8] == {**first["tiles"][8], "row": None, "thumbnail": True, "box": [0, 0, 224, 112]}
    assert report["totals"]["tiles"] == 20
    assert report["totals"]["tokens_after"] == sum(image["tokens_after"] for image in report["images"])
    assert report["policy"] == "threshold:0.5"
    assert report["model"]["vit_hidden"] == 32
    assert report["model"]["untrained"] is True
    assert "The weights are random" in out
    assert "80 -> " in out
    assert str(tmp_path / "out") in out
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("policy", "compressed"),
    [
        ("threshold:0", 9),
        ("threshold:1", 0),
        ("released:0.5,0", 4),
        ("per-image:0.5,0.0", 4),
        ("per-image", 4),
        ("budget:50%", 6),
        ("budget:0.5", 6),
        ("budget:30tok", 2),
    ],
)
def test_policies(model, pictures, tmp_path, policy, compressed):
    _, report = route(model, tmp_path, pictures / "a.png", "--policy", policy)
    assert report["totals"]["tiles_compressed"] == compressed


def test_one_call_routes_all_images_together(model, pictures, tmp_path):
    images = (pictures / "b.jpg", pictures / "a.png")
    _, alone = route(model, tmp_path / "alone", *images, "--policy", "released:0.5,0")
    _, together = route(model, tmp_path / "together", *images, "--policy", "released:0.5,0", "--one-call")
    assert alone["images"][0]["tiles_compressed"] == 0  # one tile in a call is never compressed
    assert together["totals"]["tiles_compressed"] == 5
    p = [tile["p"] for report in (alone, together) for image in report["images"] for tile in image["tiles"]]
    assert np.allclose(p[:10], p[10:], atol=1e-5)


def test_batches_and_max_tiles(model, pictures, tmp_path):
    _, small = route(model, tmp_path / "small", pictures / "c.png", "--batch-tiles", 1, "--max-tiles", 4)
    _, whole = route(model, tmp_path / "whole", pictures / "c.png", "--batch-tiles", 99, "--max-tiles", 4)
    assert len(small["images"][0]["tiles"]) == 5
    p = [[tile["p"] for tile in report["images"][0]["tiles"]] for report in (small, whole)]
    assert np.allclose(*p, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16", "checkpoint"])
def test_dtypes(model, pictures, tmp_path, dtype):
    _, report = route(model, tmp_path / dtype, pictures / "a.png", "--dtype", dtype)
    _, single = route(model, tmp_path / "float32", pictures / "a.png")
    assert report["model"]["dtype"] == ("float32" if dtype == "checkpoint" else dtype)
    p = [[tile["p"] for tile in r["images"][0]["tiles"]] for r in (report, single)]
    assert np.allclose(*p, atol=0.1 if dtype in ("bfloat16", "float16") else 1e-5)


def test_patterns_folders_and_equal_names(model, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "more")
    arguments = (pictures / "*.png", tmp_path / "more" / "a.png", pictures / "a.png")
    _, report = route(model, tmp_path / "out", *arguments)
    assert [image["picture"] for image in report["images"]] == ["a.route.png", "c.route.png", "a-2.route.png"]


def test_unreadable_images_are_reported_and_passed_over(model, pictures, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes((pictures / "a.png").read_bytes()[:500])
    arguments = (tmp_path / "broken.png", pictures / "b.jpg", tmp_path / "missing.png")
    status, report = route(model, tmp_path / "out", *arguments)
    out, err = capsys.readouterr()
    assert status == 1
    assert [Path(image["file"]).name for image in report["images"]] == ["b.jpg"]
    assert [Path(failure["file"]).name for failure in report["failed"]] == ["broken.png", "missing.png"]
    assert "broken.png: " in err
    assert "missing.png: " in err
    assert "2 of 3 images could not be read" in out


def test_nothing_readable(model, tmp_path):
    status, report = route(model, tmp_path / "out", tmp_path / "missing.png")
    assert status == 2
    assert report["totals"] == {**report["totals"], "images": 0, "tokens_saved_share": 0.0}


def _not_flash(model, tmp_path):
    from safetensors.torch import save_file

    save_file({"mlp1.0.weight": torch.zeros(8)}, tmp_path / "model.safetensors")
    return tmp_path


def _without_vision(model, tmp_path):
    from vico_ext import load_flash, save_flash

    weights = load_flash(model)
    shutil.copy(model / "config.json", tmp_path)
    save_flash(tmp_path, weights.connector, weights.router)
    return tmp_path


def _without_config(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "copy")
    (folder / "config.json").unlink()
    return folder


def _without_thresholds(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    del config["flash_absolute_threshold"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "args", "message"),
    [
        (lambda m, t: t / "nowhere", [], "nowhere: no such file or folder"),
        (_not_flash, [], "this is not a Flash checkpoint: has mlp1 only"),
        (_without_vision, [], "problems: - vision tower: missing embeddings.cls_token"),
        (_without_config, [], "config.json with a vision_config is needed"),
        (_without_thresholds, ["--policy", "released"], "needs numbers .*config.json lacks flash_absolute_threshold"),
        (None, ["--policy", "best"], "'best' is no policy: use threshold:T, released:R,A"),
        (None, ["--policy", "budget:8tok"], r"a\.png: .*8"),
        (None, ["--max-tiles", "0"], "argument --max-tiles: expected a whole number from 1 on, got '0'"),
        (None, ["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (None, ["--nonsense"], "unrecognized arguments: --nonsense"),
        (None, ["{tmp}/*.gif"], r"no file matches .*\*\.gif"),
        (None, ["{tmp}"], "no images in the folder"),
        (None, ["--out", "{tmp}/file"], "--out must be a folder, .*file is a file"),
        (None, ["--max-tiles", "1001"], "argument --max-tiles: expected at most 1000 tiles, got '1001'"),
        (None, [""], "IMAGE must be a file, a folder or a pattern, got an empty name"),
    ],
)
def test_errors_are_one_line(model, pictures, tmp_path, capsys, change, args, message):
    (tmp_path / "file").write_text("in the way")
    folder = change(model, tmp_path) if change else model
    args = [arg.format(tmp=tmp_path) for arg in args]
    command = ["route", "--model", folder, "--out", tmp_path / "out", *args, pictures / "a.png"]
    status, out, err = vico(*command, capsys=capsys)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert re.match("vico( route)?: error: ", err)
    assert re.search(message, err)


def test_debug_shows_where(model, tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        cli.main(["route", "x.png", "--model", str(tmp_path / "nowhere"), "--debug"])


def test_unforeseen_errors_and_interrupts(monkeypatch, capsys):
    from vico_ext.cli import versions

    def fail(error):
        def build_facts():
            raise error

        monkeypatch.setattr(versions, "build_facts", build_facts)
        return vico("info", capsys=capsys)

    assert fail(KeyError("x")) == (2, "", "vico info: error: KeyError: 'x' (--debug shows where)\n")
    assert fail(KeyboardInterrupt()) == (130, "", "vico info: interrupted\n")


def test_missing_extras_are_named(model, monkeypatch, capsys):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tqdm" else find_spec(name))
    status, _, err = vico("route", "x.png", "--model", model, capsys=capsys)
    assert status == 2
    assert "this command needs tqdm: pip install 'vico_ext[cli]'" in err


@pytest.mark.parametrize(
    ("text", "kind", "values"),
    [
        ("threshold", "threshold", (0.5,)),
        ("threshold:0.25", "threshold", (0.25,)),
        ("released:0.3,0.0", "released", (0.3, 0.0)),
        ("released", "released", ()),
        ("per-image:1,0", "per-image", (1.0, 0.0)),
        ("budget:0.4", "fraction", (0.4,)),
        ("budget:40%", "fraction", (0.4,)),
        ("budget:2000tok", "tokens", (2000.0,)),
    ],
)
def test_policy_words(text, kind, values):
    spec = parse_policy(text)
    assert (spec.kind, spec.values) == (kind, values)


NO_POLICIES = """
half threshold:2 threshold:x threshold:nan released:0.3 released:0.3,0,1 per-image:-1,0 budget budget: budget:tok
budget:1.5tok budget:-3tok budget:inftok budget:120% budget:%
"""


@pytest.mark.parametrize("text", ["", *NO_POLICIES.split()])
def test_policy_words_that_mean_nothing(text, capsys):
    status, _, err = vico("route", "x.png", "--model", "m", "--policy", text, capsys=capsys)
    assert status == 2
    assert "argument --policy: " in err
    assert err.count("\n") == 1


def test_demo(monkeypatch, pictures, tmp_path, capsys):
    from vico_ext.cli import demo_inputs, demo_model

    write_checkpoint = demo_model.write_checkpoint
    small = {"vit_hidden": 32, "vit_layers": 1, "llm_hidden": 48, "image_size": 56}
    monkeypatch.setattr(demo_model, "write_checkpoint", lambda path, seed: write_checkpoint(path, seed, **small))
    monkeypatch.setattr(demo_inputs, "write_inputs", lambda folder: sorted(pictures.iterdir()))
    status, out, err = vico("demo", "--out", tmp_path, capsys=capsys)
    assert (status, err) == (0, "")
    report = json.loads((tmp_path / "report.json").read_text())
    trained = report["trained"]
    assert trained["totals"]["asked"] > 0
    assert all((tmp_path / page["picture"]).is_file() for page in trained["pages"])
    assert out.startswith("A trained InternVL Flash of ")
    assert report["untrained"] is True
    assert report["totals"]["tiles_compressed"] == 4 + 0 + 5
    assert report["totals"]["max_difference_tokens"] < 1e-4
    assert report["totals"]["max_difference_p"] < 1e-4
    assert all((tmp_path / image["picture"]).is_file() for image in report["images"])
    assert "The weights are random" in out
    assert "Largest difference" in out
    assert f"Pictures (*.route.png) and report.json are in {tmp_path}" in out
    status, report = route(tmp_path / "checkpoint", tmp_path / "routed", pictures / "a.png", "--policy", "released")
    assert report["totals"]["tiles_compressed"] == 4


def test_demo_inputs(tmp_path):
    from vico_ext.cli.demo_inputs import write_inputs

    paths = {path.stem: path for path in write_inputs(tmp_path)}
    assert {"page", "slide"} <= set(paths)
    ink = {name: np.asarray(Image.open(path).convert("L")) < 128 for name, path in paths.items()}
    lines = {name: (np.diff(dark.astype(int), axis=0) != 0).mean() for name, dark in ink.items()}
    assert lines["page"] > 5 * lines["slide"]  # dense print against a few large letters


def test_as_a_program(model, pictures, tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "vico_ext", "route", "a.png", "--model", str(model), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=pictures, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "36 -> " in done.stdout
    assert (tmp_path / "a.route.png").is_file()


def test_names_that_are_long_or_not_of_the_terminal(model, pictures, tmp_path):
    """240 bytes of name leave no room for an ending; ASCII has no e with an accent."""
    letter = "\u00e9"
    shutil.copy(pictures / "b.jpg", tmp_path / f"{letter * 118}.jpg")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "vico_ext", "route", tmp_path, "--model", model, "--out", tmp_path / "out"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\xe9" in done.stdout
    assert (tmp_path / "out" / f"{letter * 100}.route.png").is_file()


@pytest.mark.parametrize("arguments", [["info"], ["--help"]])
def test_a_reader_that_has_enough_is_no_error(arguments):
    """As in ``vico info | head -1``. argparse itself swallows the closed pipe where Python does not buffer."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "vico_ext", *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as output:
        done = subprocess.run(command, env=env, stdout=output, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""
    assert done.returncode in ((141,) if arguments == ["info"] else (0, 141))
