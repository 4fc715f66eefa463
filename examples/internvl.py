"""A transformers InternVL with fewer visual tokens: patched, asked about two prompts at once, compared, and put back.

    python examples/internvl.py                    a small random model: nothing is downloaded, answers mean nothing
    python examples/internvl.py --model DIR --image page.png --prompt "What does it say?"

DIR holds a Flash checkpoint in the transformers layout (`vico convert` makes one) and the processor's files.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import vico_ext


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Flash checkpoint in the transformers layout")
    parser.add_argument("--image", help="an image file, with --model")
    parser.add_argument("--prompt", default="Describe the image.")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the visual tokens to keep (0.5)")
    args = parser.parse_args()
    torch.manual_seed(0)
    policy = vico_ext.BudgetPolicy(fraction=args.keep)
    if args.model is None:
        model, inputs, processor = small_model(), small_inputs(), None
        vico_ext.patch_internvl(model, policy=policy)
    else:
        model, inputs, processor = (*real(args, policy),)
    length = inputs["input_ids"].shape[1]

    routed = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(routed[:, :length].cpu(), inputs["input_ids"].cpu())  # the prompt comes back as it was given
    print(model.vico_report())
    for number, image in enumerate(model.vico_report().images):
        tiles = zip(image.probabilities, image.compressed, strict=True)
        share = ", ".join(f"{p:.2f}{' *' if compressed else ''}" for p, compressed in tiles)
        print(f"  image {number}: {image.tokens_before} -> {image.tokens_after} tokens; p of its tiles: {share}")

    vico_ext.unpatch_internvl(model)
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    for name, sequences in (("routed", routed), ("plain", plain)):
        new = sequences[:, length:]
        print(f"{name}:", processor.batch_decode(new, skip_special_tokens=True) if processor else new.tolist())


def real(args: argparse.Namespace, policy: vico_ext.RoutingPolicy) -> tuple[Any, Any, Any]:
    """The model, the inputs of its processor, and the processor."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(args.model)
    model = vico_ext.load_internvl(args.model, policy, dtype=torch.bfloat16)
    content = [{"type": "image", "url": args.image}, {"type": "text", "text": args.prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return model, inputs.to(model.device, dtype=model.dtype), processor


def small_model() -> Any:
    """transformers' own InternVL with random weights: tiles of 112 pixels, 16 or 4 visual tokens each."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen3Config

    vision = InternVLVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=[112, 112]
    )
    text = Qwen3Config(
        vocab_size=128,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        pad_token_id=0,
        eos_token_id=1,
    )
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=9, image_seq_length=16)
    return InternVLForConditionalGeneration(config).eval()


def small_inputs() -> dict[str, torch.Tensor]:
    """What a processor gives for two prompts, padded on the left: two images of 3 and 1 tiles, and one of 2."""
    rows = [[20, 21, 7, *[9] * 48, 8, 22, 7, *[9] * 16, 8, 23], [30, 7, *[9] * 32, 8, 31, 32]]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.randn(6, 3, 112, 112)}


if __name__ == "__main__":
    main()
