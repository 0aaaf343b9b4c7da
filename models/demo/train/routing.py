"""Prints how skewed routing is: the load of the busiest expert over the mean load, per domain and
layer, on text that was never trained on, as a table for the README."""

import argparse
import os
import pathlib
import random

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
from tokenizers import Tokenizer

import data
import exercises
import split
from export import load_params
from model import CONFIG, Model

TOKENS = 8192


def rows_of(domain, work, tokenizer, length=256):
    """Rows of token ids: running text for prose and library, chats of a domain's exercises else."""
    if domain in ("prose", "library"):
        name = "prose" if domain == "prose" else "code"
        ids = tokenizer.encode((work / f"{name}_held_out.txt").read_text()).ids[:TOKENS]
    else:
        rng, words, batches = random.Random(3), data.words(work), data.Batches(work, tokenizer, 3)
        ids = []
        while len(ids) < TOKENS:
            name = rng.choice(exercises.DOMAINS[domain]).__name__
            ids += batches.turn(*split.draw(name, rng, words, "valid"))[0]
    return torch.tensor(ids[: TOKENS // length * length]).view(-1, length)


@torch.no_grad()
def loads(model, rows):
    """Rows sent to each expert [layers, experts]."""
    positions = torch.arange(rows.shape[1]).repeat(len(rows), 1)
    return torch.stack([counts for _, counts in model.hidden(rows, positions, None)[1]]).float()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="corpus folder (data.py)")
    parser.add_argument(
        "--model", type=pathlib.Path, required=True, help="folder with tokenizer.json"
    )
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--ema", action="store_true")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = Model(CONFIG, load_params(args.checkpoint, "ema" if args.ema else "flat"))
    layers = CONFIG["num_hidden_layers"]
    print("| domain | " + " | ".join(f"layer {i}" for i in range(layers)) + " |")
    print("|---" * (layers + 1) + "|")
    total = torch.zeros(layers, CONFIG["num_experts"])
    for domain in ["prose", "library", *exercises.DOMAINS]:
        counts = loads(model, rows_of(domain, args.work, tokenizer))
        total += counts / counts.sum()
        print_row(domain, counts)
    print_row("equal mix", total)


def print_row(name, counts):
    skew = counts.max(1).values / counts.mean(1)
    print(f"| {name} | " + " | ".join(f"{s:.2f}" for s in skew) + " |", flush=True)


if __name__ == "__main__":
    main()
