"""Corpus, packing and batches.

`data.py --work DIR` downloads the prose (a Debian package with Jane Austen's novels, public domain)
with apt-get, takes the source code from the Python standard library (PSF licence), and writes
prose.txt, code.txt, their held-out ends, and words.txt into DIR. The other scripts import the rest.
"""

import argparse
import bz2
import collections
import lzma
import pathlib
import random
import re
import struct
import subprocess
import tempfile
import zlib

import numpy as np
import torch

import exercises
import split

PACKAGE = "r-cran-janeaustenr"
HELD_OUT = 60_000  # characters at the end of each text, never trained on
MICRO_BATCH = 1024  # tokens, whatever the row length
EOT, START, END = 0, 1, 2  # <|endoftext|>, <|im_start|>, <|im_end|>
SYSTEM = ["You are a helpful assistant.", "Answer briefly.", "You are Switchyard, a small model."]


# --- corpus ---------------------------------------------------------------------------------------


def _r_strings(blob):
    """The strings of a serialised R object (XDR): flags with type CHARSXP (9), length, bytes."""
    out, at = [], 0
    while True:
        at = blob.find(b"\x09", at)
        if at < 0 or at + 5 > len(blob):
            return out
        (size,) = struct.unpack(">i", blob[at + 1 : at + 5])
        if blob[at - 3] == 0 and 0 <= size < 500 and at + 5 + size <= len(blob):
            out.append(blob[at + 5 : at + 5 + size].decode("utf-8", "replace"))
            at += 5 + size
        else:
            at += 1


def _novels():
    """Each novel: an R lazy-load database is compressed chunks, each one character vector."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
        deb = next(pathlib.Path(folder).glob("*.deb"))
        subprocess.run(["dpkg", "-x", deb, folder], check=True)
        blob = next(pathlib.Path(folder).rglob("data/Rdata.rdb")).read_bytes()
        index = zlib.decompress(next(pathlib.Path(folder).rglob("data/Rdata.rdx")).read_bytes(), 31)
    spans = re.findall(rb"\x00\x00\x00\x0d\x00\x00\x00\x02(.{8})", index, re.S)
    for start, size in (struct.unpack(">ii", s) for s in spans):
        kind, body = blob[start + 4 : start + 5], blob[start + 5 : start + size]
        unpack = {b"2": bz2.decompress, b"Z": lzma.decompress}.get(kind)
        lines = _r_strings(
            unpack(body) if unpack else zlib.decompress(blob[start + 4 : start + size])
        )
        if len(lines) > 1000:
            # One paragraph a line, as a chat model should write it.
            paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
            yield "\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip())


def _modules():
    """Python's standard library without tests: one string per module, in a fixed mixed order."""
    import sysconfig

    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = sorted(
        p
        for p in root.rglob("*.py")
        if not {
            "test",
            "tests",
            "dist-packages",
            "site-packages",
            "encodings",
            "idlelib",
            "pydoc_data",
        }
        & set(p.parts)
    )
    random.Random(0).shuffle(files)
    return [p.read_text("utf-8", "replace") for p in files]


def corpus(work):
    return {name: (work / f"{name}.txt").read_text() for name in ("prose", "code")}


def words(work):
    return (work / "words.txt").read_text().split()


def encode_corpus(work, tokenizer):
    """Token arrays of the training texts, cached beside them."""
    arrays = {}
    for name, text in corpus(work).items():
        cache = work / f"{name}.npy"
        if not cache.exists():
            pieces = [text[i : i + 50_000] for i in range(0, len(text), 50_000)]
            ids = [i for e in tokenizer.encode_batch(pieces) for i in e.ids]
            np.save(cache, np.array(ids, np.uint16))
        arrays[name] = np.load(cache)
    return arrays


# --- batches --------------------------------------------------------------------------------------


class Batches:
    """Draws micro-batches of `MICRO_BATCH` tokens; owned by one process."""

    def __init__(self, work, tokenizer, seed):
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.words = words(work)
        self.texts = encode_corpus(work, tokenizer)
        self.names = list(exercises.EXERCISES)
        self.weights = [1.0] * len(self.names)
        self.pool = []

    def _ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def turn(self, prompt, answer):
        """Ids of one user/assistant turn, and the loss weight of each."""
        newline = self._ids("\n")
        head = (
            [START]
            + self._ids("user\n" + prompt)
            + [END]
            + newline
            + [START]
            + self._ids("assistant\n")
        )
        tail = self._ids(answer) + [END]
        return head + tail + newline, [0.0] * len(head) + [1.0] * len(tail) + [0.0]

    def chat(self, turns):
        ids, weights = [], []
        if self.rng.random() < 0.1:
            ids = (
                [START] + self._ids("system\n" + self.rng.choice(SYSTEM)) + [END] + self._ids("\n")
            )
            weights = [0.0] * len(ids)
        for _ in range(turns):
            name = self.rng.choices(self.names, self.weights)[0]
            more = self.turn(*split.draw(name, self.rng, self.words, "train"))
            ids, weights = ids + more[0], weights + more[1]
        return ids, weights

    def _packed(self, length):
        """A row of `length` tokens: whole chats (ids, weights, chat number), padded at the end."""
        ids, weights, docs = [], [], []
        while True:
            while len(self.pool) < 12:
                self.pool.append(self.chat(1 if self.rng.random() < 0.8 else 2))
            fit = [c for c in self.pool if len(c[0]) <= length - len(ids)]
            if not fit:
                if not ids:
                    self.pool.pop(0)  # longer than a row
                    continue
                break
            chat = max(fit, key=lambda c: len(c[0])) if length - len(ids) < 80 else fit[0]
            self.pool.remove(chat)
            docs += [docs[-1] + 1 if docs else 0] * len(chat[0])
            ids, weights = ids + chat[0], weights + chat[1]
        pad = length - len(ids)
        return ids + [EOT] * pad, weights + [0.0] * pad, docs + [-1] * pad

    def exercise_rows(self, length=128):
        rows = [self._packed(length) for _ in range(MICRO_BATCH // length)]
        docs = torch.tensor([r[2] for r in rows])
        mask = (docs[:, :, None] == docs[:, None, :]) & torch.ones(
            length, length, dtype=torch.bool
        ).tril()
        return self._tensors([r[:2] for r in rows], mask[:, None])

    def text_rows(self, length=256):
        """Running text, mostly prose; in some rows the positions jump once, up to 2047 in all."""
        rows = []
        for _ in range(MICRO_BATCH // length):
            ids = self.texts["prose" if self.rng.random() < 0.75 else "code"]
            at = self.rng.randrange(len(ids) - length - 1)
            rows.append((ids[at : at + length].astype(np.int64).tolist(), [0.25] * length))
        batch = self._tensors(rows, None)
        for row in batch["positions"]:
            if self.rng.random() < 0.25:
                row[self.rng.randrange(1, length) :] += self.rng.randrange(2048 - length)
        return batch

    def long_rows(self):
        """Long rows of running text, or one long conversation."""
        if self.rng.random() < 0.5:
            return self.text_rows(self.rng.choice([MICRO_BATCH // 2, MICRO_BATCH]))
        ids, weights = [], []
        while len(ids) < MICRO_BATCH:
            more = self.chat(4)
            ids, weights = ids + more[0], weights + more[1]
        return self._tensors([(ids[:MICRO_BATCH], weights[:MICRO_BATCH])], None)

    @staticmethod
    def _tensors(rows, mask):
        ids = torch.tensor([r[0] for r in rows])
        weights = torch.tensor([r[1] for r in rows])
        targets = torch.roll(ids, -1, 1)
        target_weights = torch.roll(weights, -1, 1)
        target_weights[:, -1] = 0
        return {
            "ids": ids,
            "targets": targets,
            "weights": target_weights,
            "mask": mask,
            "positions": torch.arange(ids.shape[1]).repeat(len(rows), 1),
        }


def validation(work, tokenizer, per_exercise, part, seed):
    """`[(name, prompt ids, answer ids)]` of problems from a held-out split."""
    batches = Batches(work, tokenizer, seed)
    out = []
    for name in exercises.EXERCISES:
        seen = set()
        while len(seen) < per_exercise:
            prompt, answer = split.draw(name, batches.rng, batches.words, part)
            if prompt not in seen:
                seen.add(prompt)
                ids, weights = batches.turn(prompt, answer)
                cut = int(weights.index(1.0))
                out.append((name, ids[:cut], ids[cut:-1]))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for the corpus")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    texts = {"prose": "\n\n\n".join(_novels()), "code": "\n\n\n".join(_modules())}
    for name, text in texts.items():
        (args.work / f"{name}.txt").write_text(text[:-HELD_OUT])
        (args.work / f"{name}_held_out.txt").write_text(text[-HELD_OUT:])
        print(f"{name}: {len(text):,} characters")
    counts = collections.Counter(re.findall(r"(?<![\w'])[a-z]{3,8}(?![\w'])", texts["prose"]))
    common = sorted(w for w, n in counts.items() if n >= 3)
    (args.work / "words.txt").write_text("\n".join(common) + "\n")
    print(f"words: {len(common):,}")


if __name__ == "__main__":
    main()
