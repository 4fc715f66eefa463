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
from reproduce.pages import Chats, Pages
from reproduce.reader import Lesson, evaluate, train_reader
from reproduce.tokens import IMAGE, make_tokenizer
from reproduce.vit import features, glyph_accuracy, train_vit
from vico_ext._files import replacing
from vico_ext.training.chat import ChatEncoder

__all__ = ["main"]

SPLITS = ("seen", "validation")  # what the log has scores of; test is for the end


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
    parser = argparse.ArgumentParser(prog="python -m reproduce.stage0", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and log.jsonl")
    parser.add_argument("--banks", type=Path, help="where rendered tiles are kept; by default OUT/banks")
    parser.add_argument("--size", choices=sorted(SIZES), default="laptop")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches; the data are the same")
    parser.add_argument("--tiles", type=int, default=24_960, help="rendered for training")
    parser.add_argument("--sheets", type=int, default=16_000, help="tiles full of print, for the ViT")
    parser.add_argument("--vit-steps", type=int, default=2200)
    parser.add_argument("--steps", type=int, default=1700, help="of connector and language model, at most")
    parser.add_argument("--attempts", type=int, default=4, help="at stage 0b, each from other weights")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    log, cache = Log(args.out / "log.jsonl"), args.banks or args.out / "banks"
    banks = {"train": Bank.cached("train", args.tiles, 0, cache)}
    banks |= {split: Bank.cached(split, 2496, 0, cache) for split in SPLITS}

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(SIZES[args.size], args.seed).to(device)
    tower, kept = model.model.vision_tower, args.out / "vit.safetensors"
    if kept.exists():
        tower.load_state_dict(load_file(kept))
    else:
        sheets = Bank.sheets(args.sheets)
        log({"stage": "data", "tiles": args.tiles, "sheets": args.sheets, "cpu_s": round(time.process_time(), 1)})
        heads = train_vit(tower, banks["train"], sheets, args.vit_steps, seed=args.seed, log=log)
        del sheets
        for split in SPLITS:
            log({"stage": "0a", "split": split, "glyphs": glyph_accuracy(tower, heads, banks[split])})
        with replacing(kept) as path:
            save_file(tower.state_dict(), path)
    seen = {split: features(tower, bank) for split, bank in banks.items()}

    tokenizer = make_tokenizer()
    chats = Chats(ChatEncoder(tokenizer, IMAGE, model.config.image_seq_length))
    lesson, sight = Lesson(steps=args.steps), tower.state_dict()
    for attempt in range(args.attempts):
        if attempt:
            model = make_model(SIZES[args.size], args.seed + 1000 * attempt).to(device)
            model.model.vision_tower.load_state_dict(sight)
        pages = Pages(banks["train"], args.seed, readable=0.5)
        reached = train_reader(model, pages, seen["train"], chats, lesson, seed=args.seed, log=log)
        if reached is not None:
            break
        log({"stage": "0b", "given up": attempt + 1})
    else:
        raise SystemExit(f"the model did not begin to read in {args.attempts} attempts: try another --seed")
    for split in SPLITS:
        score = evaluate(model, Pages(banks[split], 0), seen[split], chats)
        log({"stage": "0b", "split": split, "reached": reached, "score": score, "cpu_s": round(time.process_time(), 1)})
    partial = args.out / "model.partial"
    tokenizer.save_pretrained(partial)
    model.eval().save_pretrained(partial)
    partial.rename(args.out / "model")  # whoever finds the folder finds all of it


if __name__ == "__main__":
    main()
