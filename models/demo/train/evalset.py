"""Measures every exercise on the validation split, keeps those the model has learned, and draws
eval.jsonl for them from the test split; then scores it. Greedy exact match throughout."""

import argparse
import json
import os
import pathlib
import random

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
from tokenizers import Tokenizer

import data
import exercises
import split
from export import load_params
from model import CONFIG, Model
from train import accuracy

KEEP = 0.85  # validation accuracy below which an exercise is left out of eval.jsonl


def draw_items(names, per_exercise, words, tokenizer):
    """Distinct test problems: lines of eval.jsonl."""
    rng, lines, seen = random.Random(7), [], set()
    for name in names:
        found = 0
        while found < per_exercise:
            prompt, answer = split.draw(name, rng, words, "test")
            if prompt not in seen:
                seen.add(prompt)
                found += 1
                lines.append(
                    {
                        "domain": exercises.EXERCISES[name][0],
                        "messages": [{"role": "user", "content": prompt}],
                        "answer": answer,
                    }
                )
    rng.shuffle(lines)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="corpus folder (data.py)")
    parser.add_argument(
        "--model", type=pathlib.Path, required=True, help="checkpoint folder; eval.jsonl goes there"
    )
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--validation-items", type=int, default=50, help="per exercise")
    parser.add_argument("--items", type=int, default=10, help="per exercise in eval.jsonl")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = Model(CONFIG, load_params(args.checkpoint, "ema" if args.ema else "flat"))

    held_out = data.validation(args.work, tokenizer, args.validation_items, "valid", 21)
    scores = accuracy(model, held_out)
    kept = [name for name, score in scores.items() if score >= KEEP]
    print("| exercise | domain | validation | kept |\n|---|---|---|---|")
    for name, score in scores.items():
        keep = "yes" if name in kept else "no"
        print(f"| {name} | {exercises.EXERCISES[name][0]} | {score:.0%} | {keep} |")

    lines = draw_items(kept, args.items, data.words(args.work), tokenizer)
    (args.model / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batches = data.Batches(args.work, tokenizer, 0)
    items = []
    for line in lines:
        ids, weights = batches.turn(line["messages"][0]["content"], line["answer"])
        cut = weights.index(1.0)
        items.append((line["domain"], ids[:cut], ids[cut:-1]))
    result = accuracy(model, items)
    print(
        f"\neval.jsonl: {len(lines)} items, by domain:",
        ", ".join(f"{d} {s:.1%}" for d, s in sorted(result.items())),
    )
    right = sum(score * sum(i[0] == domain for i in items) for domain, score in result.items())
    print(f"overall {right / len(items):.1%}")


if __name__ == "__main__":
    main()
