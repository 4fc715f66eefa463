"""Training a patched transformers InternVL: gradients, checkpointing, autocast, Trainer, LoRA."""

from __future__ import annotations

import pytest
import torch
from device import DEVICE
from tiny_internvl import ALL, NONE, Decide, connectors, gradients, inputs, labelled, tiny_flash, tiny_model
from torch import Tensor, nn

import vico_ext

pytest.importorskip("transformers")


@pytest.mark.parametrize("policy", [Decide(True, False, True, False), ALL, NONE], ids=["mixed", "all", "none"])
def test_loss_gives_gradients_to_both_connectors_and_none_to_the_router(policy):
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash(), policy).train()
    model(**labelled((2,), (1, 1))).loss.backward()
    for connector in connectors(model):
        assert all(p.grad is not None for p in connector.parameters())
    used = [any(p.grad.any() for p in connector.parameters()) for connector in connectors(model)]
    assert used == [policy is not ALL, policy is not NONE]
    assert all(p.grad is None and not p.requires_grad for p in model.model.vico.router.parameters())
    assert all(p.grad is not None for p in model.model.vision_tower.encoder.parameters())


def test_gradients_of_all_whole_are_those_of_the_unpatched_model():
    model, given = tiny_model(), labelled((2,), (1, 1))
    model(**given).loss.backward()
    want = gradients(model)
    model.zero_grad()
    vico_ext.patch_internvl(model, policy=NONE)
    model(**given).loss.backward()
    got = gradients(model)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_routing_in_training_is_routing_in_evaluation():
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash())
    given = inputs((2, 1), (3,))
    model(**given)
    want = model.vico_report()
    model.train()
    for _ in range(3):
        model(**given)
        assert model.vico_report() == want


def test_gradient_checkpointing_gives_the_same_gradients():
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash(), Decide(True, False, True, False)).train()
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    given = labelled((2,), (1, 1))
    model(**given).loss.backward()
    want = gradients(model)
    for reentrant in (False, True):
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(**given).loss.backward()
        got = gradients(model)
        assert got.keys() == want.keys()
        for name, grad in want.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_autocast():
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash(), Decide(True, False, True, False)).train()
    given = labelled((2,), (1, 1))
    exact = model.eval()(**given).loss
    model.train()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = model(**given).loss
    loss.backward()
    assert abs(loss.item() - exact.item()) < 0.1 * exact.item()
    for connector in connectors(model):
        assert all(p.grad.dtype == torch.float32 for p in connector.parameters())


def test_bfloat16_model():
    model = vico_ext.patch_internvl(tiny_model(dtype=torch.bfloat16), tiny_flash())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(**labelled((2,), (1, 1))).loss.backward()
    assert model.generate(**inputs((2,)), max_new_tokens=2).shape[0] == 1


class Examples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        made = labelled((2,), seed=index)
        return {k: v if k == "pixel_values" else v[0] for k, v in made.items()} | {"unused": torch.zeros(1)}


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    made = {k: torch.stack([e[k] for e in examples]) for k in examples[0] if k != "pixel_values"}
    return {**made, "pixel_values": torch.cat([e["pixel_values"] for e in examples])}


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer(tmp_path, bf16):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = vico_ext.patch_internvl(tiny_model(), tiny_flash())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, bf16=bf16, report_to=[],
        use_cpu=DEVICE == "cpu", save_strategy="no", disable_tqdm=True, gradient_checkpointing=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Examples(), data_collator=collate)
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    assert model.vico_report().tiles == 4
    for connector in connectors(model):
        names = [n for n, p in model.named_parameters() if any(p is q for q in connector.parameters())]
        assert any(not torch.equal(before[n], dict(model.named_parameters())[n]) for n in names)
    trainer.save_model(tmp_path / "saved")
    loaded = vico_ext.load_internvl(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    vico_ext.unpatch_internvl(model)  # accelerate's wrapper may be around our forward still
    given, stock = inputs((2,)), tiny_model()
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(**given).logits.argmax(-1), stock(**given).logits.argmax(-1)) or bf16


def test_accelerates_unwrapping_keeps_the_patch():
    accelerate = pytest.importorskip("accelerate")
    model = vico_ext.patch_internvl(tiny_model(), policy=ALL)
    given = inputs((2,))
    want = model(**given).logits
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=DEVICE == "cpu")
    bare = accelerator.unwrap_model(accelerator.prepare_model(model), keep_fp32_wrapper=False)
    assert torch.equal(bare(**given).logits, want)


def test_hooks_of_device_maps_stay_in_between():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    given = inputs((2,))
    accelerate.dispatch_model(model, {"": str(given["pixel_values"].device)}, force_hooks=True)
    wrapped = model.__dict__["forward"]
    want = model(**given).logits
    vico_ext.patch_internvl(model, policy=NONE)
    assert torch.equal(model(**given).logits, want)
    vico_ext.unpatch_internvl(model)
    assert model.__dict__["forward"] is wrapped


@pytest.mark.parametrize("order", ["patch first", "LoRA first"])
def test_lora_on_the_language_model(order):
    peft = pytest.importorskip("peft")
    model, given = tiny_model(), labelled((2,), (1, 1))
    policy = Decide(True, False, True, False)
    modules = r".*language_model.*\.(q_proj|v_proj)"
    config = peft.LoraConfig(r=2, target_modules=modules, modules_to_save=None, task_type="CAUSAL_LM")
    if order == "patch first":
        vico_ext.patch_internvl(model, tiny_flash(), policy)
        want = model(**given).loss
        tuned = peft.get_peft_model(model, config)
    else:
        tuned = peft.get_peft_model(model, config)
        with pytest.raises(TypeError, match=r"pass model.get_base_model\(\)"):
            vico_ext.patch_internvl(tuned)
        vico_ext.patch_internvl(tuned.get_base_model(), tiny_flash(), policy)
        want = tuned(**given).loss
    loss = tuned(**given).loss
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    loss.backward()
    adapters = [p for n, p in tuned.named_parameters() if "lora_B" in n]
    assert adapters
    assert all(p.grad is not None and p.grad.any() for p in adapters)
    tuned.eval()
    prompt = inputs((2,), (1, 1))
    got = tuned.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert torch.equal(got[:, : prompt["input_ids"].shape[1]], prompt["input_ids"])
    assert model.vico_report().compressed_tiles == 2


def test_lora_on_connectors_too():
    peft = pytest.importorskip("peft")
    model = vico_ext.patch_internvl(tiny_model(), tiny_flash(), Decide(True, False))
    modules = [*(f"mlp2.{i}" for i in (1, 4, 7)), "linear_1", "linear_2"]
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=modules))
    tuned(**labelled((2,))).loss.backward()
    trained = [n for n, p in tuned.named_parameters() if p.grad is not None and "lora_B" in n]
    assert len(trained) == 5
