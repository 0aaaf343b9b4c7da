"""Which problems are trained on: a hash of the problem, not of its phrasing, decides, so that every
phrasing lies in the same split and no test or validation problem is ever trained on."""

import hashlib

import exercises


def split_of(name, key):
    """'test' (4 %), 'valid' (4 %) or 'train', a function of the problem alone."""
    bucket = (
        int.from_bytes(hashlib.blake2b(f"{name}|{key}".encode(), digest_size=4).digest(), "little")
        % 100
    )
    return "test" if bucket < 4 else "valid" if bucket < 8 else "train"


def draw(name, rng, words, part):
    """One (prompt, answer) of exercise `name` from split `part`."""
    generate = exercises.EXERCISES[name][1]
    while True:
        key, prompt, answer = generate(rng, words)
        if split_of(name, key) == part:
            return prompt, answer
