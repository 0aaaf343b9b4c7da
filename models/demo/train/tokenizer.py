"""Trains the byte-level BPE tokenizer and writes the tokenizer files of the checkpoint."""

import argparse
import json
import pathlib
import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import data
import exercises
import split

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Words with their leading space, single digits, runs of punctuation, runs of space.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def texts(corpus, words, count):
    """Prose and code in chunks, and `count` exercises: what the merges are learned from."""
    for text in (corpus["prose"], corpus["code"][:2_000_000]):
        for start in range(0, len(text), 10_000):
            yield text[start : start + 10_000]
    rng = random.Random(1)
    for _ in range(count):
        prompt, answer = split.draw(rng.choice(list(exercises.EXERCISES)), rng, words, "train")
        yield prompt + "\n" + answer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=pathlib.Path, required=True, help="folder with data.py's corpus"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="checkpoint folder to write to"
    )
    parser.add_argument("--vocab", type=int, default=2048)
    args = parser.parse_args()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab,
        special_tokens=SPECIAL,
        show_progress=True,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        texts(data.corpus(args.work), data.words(args.work), 40_000), trainer
    )
    tokenizer.save(str(args.out / "tokenizer.json"))

    def write(name, value):
        (args.out / name).write_text(json.dumps(value, indent=2) + "\n")

    write(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 2048,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
        },
    )
    write(
        "generation_config.json",
        {
            "eos_token_id": [
                tokenizer.token_to_id("<|im_end|>"),
                tokenizer.token_to_id("<|endoftext|>"),
            ],
            "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        },
    )
    (args.out / "chat_template.jinja").write_text(TEMPLATE)
    print("vocabulary:", tokenizer.get_vocab_size())


if __name__ == "__main__":
    main()
