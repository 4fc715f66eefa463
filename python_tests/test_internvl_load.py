"""Loading a Flash checkpoint is quiet: transformers is told of ViCO's tensors, and reports whatever else is odd."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_internvl import tiny_flash, tiny_model

import vico_ext

transformers = pytest.importorskip("transformers")

ATTRIBUTE = "_keys_to_ignore_on_load_unexpected"


@pytest.fixture
def saved(tmp_path):
    vico_ext.patch_internvl(tiny_model(), tiny_flash()).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def reported():
    """What transformers logs, at the verbosity it has of itself."""
    from transformers.utils import logging as own

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    verbosity, bar = own.get_verbosity(), own.is_progress_bar_enabled()
    own.set_verbosity_warning()
    own.disable_progress_bar()
    logging.getLogger("transformers").addHandler(handler)
    yield messages
    logging.getLogger("transformers").removeHandler(handler)
    own.set_verbosity(verbosity)
    if bar:
        own.enable_progress_bar()


def change(folder, change_tensors):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change_tensors(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_nothing_is_said_of_a_whole_checkpoint(saved, reported, capfd):
    vico_ext.load_internvl(saved)
    assert reported == []
    assert capfd.readouterr() == ("", "")


def test_names_of_the_conversion_are_expected_too(saved, reported):
    """`vico convert` and the open conversion do without `vico.` and `router.`."""
    vico_ext.load_internvl(saved)
    reported.clear()

    def rename(tensors):
        flash = [name for name in tensors if ".vico." in name]
        assert flash
        for name in flash:
            tensors[name.replace("vico.router.", "").replace("vico.", "")] = tensors.pop(name)

    change(saved, rename)
    vico_ext.load_internvl(saved)
    assert reported == []


def test_other_tensors_are_reported_as_ever(saved, reported):
    def spoil(tensors):
        tensors["model.stranger.weight"] = torch.zeros(2)
        del tensors[next(name for name in tensors if name.endswith("lm_head.weight"))]

    change(saved, spoil)
    vico_ext.load_internvl(saved)
    said = "\n".join(reported)
    assert "stranger" in said
    assert "lm_head.weight" in said
    assert "mlp2" not in said
    assert "router" not in said


def test_the_class_is_as_it_was(saved, monkeypatch):
    model_class = transformers.InternVLForConditionalGeneration
    assert ATTRIBUTE not in vars(model_class)
    vico_ext.load_internvl(saved)
    assert ATTRIBUTE not in vars(model_class)
    (saved / "empty").mkdir()
    with pytest.raises((OSError, ValueError)):
        vico_ext.load_internvl(saved / "empty")
    assert ATTRIBUTE not in vars(model_class)
    own = [r"^old\."]
    monkeypatch.setattr(model_class, ATTRIBUTE, own, raising=False)
    vico_ext.load_internvl(saved)
    assert vars(model_class)[ATTRIBUTE] is own


def test_loads_may_overlap(saved, reported):
    """The pattern stays until the last of several threads has loaded."""
    from vico_ext.integrations.internvl_load import flash_tensors_expected

    model_class = transformers.InternVLForConditionalGeneration
    inside, leave = threading.Event(), threading.Event()

    def slow_load():
        with flash_tensors_expected(model_class):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=slow_load)
    thread.start()
    assert inside.wait(60)
    with flash_tensors_expected(model_class):
        leave.set()
        thread.join(60)
        assert len(getattr(model_class, ATTRIBUTE)) == 1
        transformers.AutoModelForImageTextToText.from_pretrained(saved)
    assert reported == []
    assert ATTRIBUTE not in vars(model_class)
