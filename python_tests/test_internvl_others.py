"""A patched transformers InternVL beside other libraries that change models: quantisation, Liger."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from tiny_internvl import ALL, NONE, Decide, connectors, inputs, labelled, tiny_flash, tiny_model
from torch import Tensor, nn

import vico_ext

pytest.importorskip("transformers")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported


class Int8Linear(nn.Linear):
    """A stand-in for a quantised layer: int8 weights, a scale per row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.bias = linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), self.bias)


def quantise(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child))


def test_a_quantised_language_model_leaves_the_visual_side_alone():
    model = tiny_model()
    quantise(model.model.language_model)
    given = labelled((2,), (1, 1))
    want = model(**given).logits
    vico_ext.patch_internvl(model, policy=NONE)
    assert torch.equal(model(**given).logits, want)
    vico_ext.unpatch_internvl(model)
    vico_ext.patch_internvl(model, tiny_flash(), Decide(True, False, True, False))
    assert {p.dtype for p in model.model.vico.parameters()} == {torch.float32}
    model(**given).loss.backward()
    assert all(p.grad is not None for connector in connectors(model) for p in connector.parameters())
    assert model.generate(**inputs((2,), (1, 1)), max_new_tokens=2).shape[0] == 2


def test_a_quantised_projector_takes_no_checkpoint():
    model = tiny_model()
    quantise(model.model.multi_modal_projector)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"linear_1.weight is torch.int8 .* keep multi_modal_projector out of"):
        vico_ext.patch_internvl(model, tiny_flash())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert "vico" not in model.config.to_dict()
    vico_ext.patch_internvl(model, policy=ALL)
    model(**inputs((2,)))


@pytest.mark.parametrize("order", ["patch first", "class first"])
def test_a_class_wide_forward_in_either_order(order, monkeypatch):
    """What Liger does: it replaces the forward of the class, and that of layers inside."""
    kind = type(tiny_model())
    stock, calls = kind.forward, []

    def replacement(self: Any, input_ids: Any = None, labels: Any = None, **others: Any) -> Any:
        calls.append(others)
        return stock(self, input_ids=input_ids, labels=labels, **others)

    def replace() -> None:
        monkeypatch.setattr(kind, "forward", replacement)

    model, given = tiny_model(), labelled((2,))
    if order == "class first":
        replace()
    vico_ext.patch_internvl(model, tiny_flash(), Decide(True, False))
    if order == "patch first":
        replace()
    output = model(**given)
    assert len(calls) == 1
    assert calls[0]["inputs_embeds"].shape[1] == output.logits.shape[1] < given["input_ids"].shape[1]
    vico_ext.unpatch_internvl(model)
    model(**given)
    assert len(calls) == 2
    assert "pixel_values" in calls[1]


def test_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    tiny_model("qwen3").save_pretrained(tmp_path / "whole")

    def load(*kept: str) -> Any:
        quantised = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[*kept, "lm_head"])
        return AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", quantization_config=quantised)

    model = load("model.vision_tower", "model.multi_modal_projector")
    precision = {p.dtype for p in model.model.multi_modal_projector.parameters()}
    vico_ext.patch_internvl(model, tiny_flash(), Decide(True, False, True, False))
    linear = {type(m).__name__ for m in model.model.language_model.modules() if isinstance(m, nn.Linear)}
    assert linear == {"Linear8bitLt"}
    assert {p.dtype for p in model.model.vico.parameters()} == precision
    assert not any(type(m).__module__.startswith("bitsandbytes") for m in model.model.vico.modules())
    model(**labelled((2,), (1, 1))).loss.backward()
    assert all(p.grad is not None for connector in connectors(model) for p in connector.parameters())
    given = inputs((2,), (1, 1))
    assert model.generate(**given, max_new_tokens=2).shape == (2, given["input_ids"].shape[1] + 2)
    with pytest.raises(ValueError, match="keep multi_modal_projector out of the quantisation"):
        vico_ext.patch_internvl(load(), tiny_flash())


@pytest.mark.parametrize("order", ["patch first", "Liger first"])
def test_liger(order, monkeypatch):
    """Liger's own patch function and fused loss; without a GPU in triton's interpreter, which runs just that kernel."""
    liger = pytest.importorskip("liger_kernel.transformers", exc_type=ImportError)
    from transformers.models.internvl.modeling_internvl import InternVLForConditionalGeneration as InternVL

    monkeypatch.setattr(InternVL, "forward", InternVL.forward)
    parts = dict.fromkeys(("rms_norm", "layer_norm", "rope", "swiglu"), False)
    given = labelled((2,))
    want = vico_ext.patch_internvl(tiny_model(), tiny_flash(), Decide(True, False))(**given).loss
    stock, model = tiny_model(), tiny_model()
    try:
        liger.apply_liger_kernel_to_internvl(model=stock, **parts)
        stock(**given)
    except (ImportError, TypeError, AttributeError) as error:
        pytest.skip(f"this Liger does not run this transformers' InternVL, patched by us or not: {error}")
    monkeypatch.undo()
    monkeypatch.setattr(InternVL, "forward", InternVL.forward)
    steps = [lambda: vico_ext.patch_internvl(model, tiny_flash(), Decide(True, False))]
    steps.append(lambda: liger.apply_liger_kernel_to_internvl(model=model, **parts))
    for step in steps if order == "patch first" else reversed(steps):
        step()
    output = model(**given)
    torch.testing.assert_close(output.loss, want, rtol=1e-4, atol=1e-5)
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    trained = model.train()(**given)
    assert trained.logits is None  # Liger's fused loss ran
    torch.testing.assert_close(trained.loss, want, rtol=1e-4, atol=1e-5)
    trained.loss.backward()
    assert all(p.grad is not None for connector in connectors(model) for p in connector.parameters())
