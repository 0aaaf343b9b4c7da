"""Writes golden.json: what transformers computes from the exported checkpoint, for the C++ tests.

All in float32 from the bfloat16 weights on the CPU unless a name says otherwise:
  prompts      50 prompts as token ids, each with greedy tokens (end tokens do not stop it) and, for
               every generated position, the logit margin of the best over the second-best token
  last_logits  for 3 prompts the 20 largest logits of the next token, as [id, logit], best first
  perplexity   windows of held-out text as ids; per window the mean of -log p(token | tokens before
               it in the window) over all but the first token; totals are means over all tokens
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import random

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import tokenizers
import torch
import transformers

import data
import exercises
import split

SEED, EXERCISE_PROMPTS, PROSE_PROMPTS = 11, 42, 8
EXERCISE_TOKENS, PROSE_TOKENS = 24, 32
WINDOW = 384


@torch.no_grad()
def greedy(model, ids, count):
    """`count` arg-max tokens after ids with their margins, and the logits after the prompt."""
    tokens, margins, cache, feed, first = [], [], None, ids, None
    for _ in range(count):
        out = model(torch.tensor([feed]), past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1]
        first = logits if first is None else first
        top = logits.topk(2)
        tokens.append(int(top.indices[0]))
        margins.append(float(top.values[0] - top.values[1]))
        feed = tokens[-1:]
    return tokens, margins, first


@torch.no_grad()
def window_nll(model, ids):
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])))


def prompts(tokenizer, work):
    """(domain, ids, tokens to generate): unseen exercises as chats, then unseen prose."""
    rng, words = random.Random(SEED), data.words(work)
    names = list(exercises.EXERCISES)
    for i in range(EXERCISE_PROMPTS):
        name = names[i % len(names)]
        prompt, _ = split.draw(name, rng, words, "test")
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        yield exercises.EXERCISES[name][0], ids, EXERCISE_TOKENS
    prose = tokenizer((work / "prose_held_out.txt").read_text()).input_ids
    for i in range(PROSE_PROMPTS):
        start, length = rng.randrange(len(prose) - 1000), (40, 80, 160, 320)[i % 4]
        yield "prose", prose[start : start + length], PROSE_TOKENS


def perplexity(windows, models):
    out = {"windows": windows}
    for kind, model in models.items():
        nlls = [window_nll(model, w) for w in windows]
        total = sum(n * (len(w) - 1) for n, w in zip(nlls, windows)) / sum(
            len(w) - 1 for w in windows
        )
        out[kind] = {"window_nll": nlls, "nll": total, "perplexity": math.exp(total)}
    return out


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=pathlib.Path, required=True, help="corpus folder (data.py)")
    parser.add_argument(
        "--model",
        type=pathlib.Path,
        required=True,
        help="checkpoint folder; golden.json goes there",
    )
    args = parser.parse_args()

    def load(dtype):
        return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()

    model = load(torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)

    rows, last = [], []
    for domain, ids, count in prompts(tokenizer, args.work):
        tokens, margins, logits = greedy(model, ids, count)
        rows.append(
            {
                "domain": domain,
                "ids": ids,
                "tokens": tokens,
                "margins": [float(f"{m:.4g}") for m in margins],
            }
        )
        if len(rows) in (1, 20, EXERCISE_PROMPTS + 1):
            top = logits.topk(20)
            last.append(
                {
                    "ids": ids,
                    "top": [[int(i), round(float(logits[i]), 6)] for i in top.indices],
                }
            )
    prose, code = (
        tokenizer((args.work / f"{n}_held_out.txt").read_text()).input_ids
        for n in ("prose", "code")
    )
    windows = [prose[5000 : 5000 + WINDOW], prose[9000 : 9000 + WINDOW], code[5000 : 5000 + WINDOW]]
    golden = {
        "generator": "models/demo/train/golden.py",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
        "weights_sha256": hashlib.sha256(
            (args.model / "model.safetensors").read_bytes()
        ).hexdigest(),
        "prompts": rows,
        "last_logits": last,
        "perplexity": perplexity(windows, {"float32": model, "bfloat16": load(torch.bfloat16)}),
    }
    text = json.dumps(golden, separators=(",", ":"))
    for start in ('{"domain"', '"last_logits"', '"perplexity":{"windows"'):
        text = text.replace("," + start, ",\n" + start)
    (args.model / "golden.json").write_text(text + "\n")
    margins = [m for r in rows for m in r["margins"]]
    print(
        f"{len(margins)} positions, smallest margin {min(margins):.2e}, "
        f"below 1e-3: {sum(m < 1e-3 for m in margins)}; perplexity "
        + ", ".join(
            f"{k} {golden['perplexity'][k]['perplexity']:.4f}" for k in ("float32", "bfloat16")
        )
    )


if __name__ == "__main__":
    main()
