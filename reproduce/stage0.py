"""Stage 0: trains the reference from scratch: ``python -m reproduce.stage0 --out runs/reference``.

Nothing here is ViCO. It makes the model that ViCO's two stages start from, since no released one is this small.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from reproduce.bank import Bank
from reproduce.model import SIZES, make_model
from reproduce.pages import Pages, Shared
from reproduce.reader import Lesson, evaluate, train_reader
from reproduce.tokens import IMAGE, make_tokenizer
from reproduce.vit import features, glyph_accuracy, train_vit
from vico_ext.training.chat import ChatEncoder

__all__ = ["LESSONS", "main"]

# One tile first, then whole pages.
LESSONS = (
    Lesson(tiles=1, batch=64, questions=5, steps=1500, target=0.97),
    Lesson(tiles=4, batch=24, questions=10, steps=2000, target=0.97),
)


class Log:
    """Lines of JSON, to a file and to the screen."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = time.perf_counter()

    def __call__(self, entry: dict[str, Any]) -> None:
        line = json.dumps({**entry, "wall_s": round(time.perf_counter() - self.start, 1)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and log.jsonl")
    parser.add_argument("--size", choices=sorted(SIZES), default="laptop")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches; the data are the same")
    parser.add_argument("--tiles", type=int, default=24_000, help="rendered for the ViT; it learns few by heart")
    parser.add_argument("--reader-tiles", type=int, default=12_000, help="of these, for connector and language model")
    parser.add_argument("--vit-steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vit", type=Path, help="take the ViT of an earlier run's vit.safetensors; skip stage 0a")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    log, cache = Log(args.out / "log.jsonl"), args.out / "banks"
    banks = {"train": Bank.cached("train", args.tiles, 0, cache)}
    banks |= {split: Bank.cached(split, 960, 0, cache) for split in ("seen", "validation")}
    log({"stage": "data", "tiles": args.tiles, "cpu_s": round(time.process_time(), 1)})

    model = make_model(SIZES[args.size], args.seed)
    tower = model.model.vision_tower
    if args.vit:
        tower.load_state_dict(load_file(args.vit))
    else:
        heads = train_vit(tower, banks["train"], args.vit_steps, seed=args.seed, log=log)
        save_file(tower.state_dict(), args.out / "vit.safetensors")
        for split in ("seen", "validation"):
            log({"stage": "0a", "split": split, "glyphs": glyph_accuracy(tower, heads, banks[split])})
    banks["train"] = banks["train"].first(args.reader_tiles)
    seen = {split: features(tower, bank) for split, bank in banks.items()}

    tokenizer = make_tokenizer()
    shared = Shared(ChatEncoder(tokenizer, IMAGE, model.config.image_seq_length))
    for number, lesson in enumerate(LESSONS):
        pages = Pages(banks["train"], 10 * args.seed + number)
        reached = train_reader(model, pages, seen["train"], shared, lesson, log=log)
        log({"stage": f"0b, {lesson.tiles} tiles", "reached": reached})
        model.eval().save_pretrained(args.out / "model")
        tokenizer.save_pretrained(args.out / "model")
    for split in ("seen", "validation"):
        score = evaluate(model, Pages(banks[split], 0), seen[split], shared)
        log({"stage": "0", "split": split, "score": score, "cpu_s": round(time.process_time(), 1)})


if __name__ == "__main__":
    main()
