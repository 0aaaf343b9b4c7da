#!/usr/bin/env python3
"""Trains the small tokenizers of tokenizers/ and writes what HF's `tokenizers` makes of 5,550 strings.

    pip install tokenizers==0.23.3 && python make_tokenizers.py

Everything is generated from a fixed seed; run it again and git shows no difference. Files:
  strings.json         the strings (a JSON list); the last ones spell special tokens
  tokenizers/N.json    tokenizer.json of tokenizer N
  tokenizers/N.ids     line i: ids of string i, two base-64 digits (A-Za-z0-9+/) per id, most significant first; control
                       tokens in the text are parsed, no bos is added
  tokenizers/N.cases.json  {"text_ids": [[index, ids], …]: strings with special tokens taken as text,
                       "decode": [[ids, text with specials, text without], …], "with_bos": [[index, ids], …]}
"""
import json
import pathlib
import random
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent
OUT = HERE / "tokenizers"
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

SENTENCES = """The switchyard never sleeps: trains arrive, are taken apart, and leave again in another order.
I'm sure they'll say we've seen it, but you're right; he'd rather not. It's John's, isn't it?
Der Zug fährt über die Brücke, während Größe und Maß geprüft werden.
L'été dernier, nous avons goûté des crêpes à la crème brûlée où qu'elles fussent.
El niño comió piñas en Málaga; ¿qué más podría pedir?
Поезд прибыл на станцию точно в полдень, и все вышли.
電車は時間通りに駅に到着しました。乗客は降りました。
火车准时到达车站,旅客们下了车。今天天气很好!
기차가 제시간에 역에 도착했고 모두 내렸다.
وصل القطار إلى المحطة في موعده تماما ونزل الجميع.
הרכבת הגיעה לתחנה בזמן וכולם ירדו.
ट्रेन समय पर स्टेशन पहुँची और सब उतर गए।
รถไฟมาถึงสถานีตรงเวลาและทุกคนก็ลง
Το τρένο έφτασε στην ώρα του στον σταθμό.
Tàu đến ga đúng giờ và mọi người xuống tàu.
def route(tokens, experts):\n    return {t: experts[hash(t) % len(experts)] for t in tokens}
for (int i = 0; i < n; ++i) { sum += values[i] * 0.5f; }  // accumulate
SELECT name, COUNT(*) FROM users WHERE age >= 21 GROUP BY name;
{"name": "switchyard", "port": 8000, "ratio": 3.14159, "tags": ["moe", "cpu"], "ok": true, "none": null}
<div class="row"><a href="https://example.org/?q=1&r=2">link</a></div>
1 + 1 = 2, 12 * 12 = 144, 1000000 / 7 = 142857.142857, 0xFF == 255, 3.0e-10""".replace("\\n", "\n").split("\n")

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>", "<s>", "</s>", "<unk>",
            "<think>", "</think>", "<tool_call>", "[INST]", "<0x41>", "▁", "<|im_start", "im_end|>", "<|", "|>", "<s", "[MASK]",
            "[WORD]"]
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "❤️", "🤷🏾‍♀️", "🧑‍🚀", "☃", "1️⃣", "©", "™", "🫠", "🥲"]
SPACES = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", " \n", "\n ", "\u00a0", "\u2003", "\u3000", "\u180e", "\u200b", "\u2028",
          "\u2029", "\u0085", "\u000b", "\u000c", "\u1680", "\u202f", "\ufeff", "        ", "\t\t\t"]
ODD = ["\u0000", "\u0001", "\u001b[0m", "\u007f", "\ufffd", "\uffff", "\ue000", "\U0010ffff", "\U0001d4d0", "ﬁ", "ﬆ", "ſ", "K", "Å", "İ", "ı", "ẞ", "ß",
       "ǅ", "½", "²", "Ⅷ", "٣", "௧", "൪", "㊿", "①", "ⓐ", "‘", "’s", "'S", "'ſ", "'LL", "’ll", "'Ve", "…", "—", "«", "»", "„", "¿", "。", "!", "!",
       "\u200d", "\u200c", "\u202e", "\u2066", "\u00ad", "\u0301", "e\u0301", "é", "\u1100\u1161\u11a8", "각", "가\u11a8", "\u0344", "\u212b", "\u2126", "\ufb1d"]


def build_strings():
    rng = random.Random(20240607)
    words = sorted({w for s in SENTENCES for w in s.split()})
    letters = [chr(c) for c in range(0x21, 0x1FFFF) if unicodedata.category(chr(c))[0] in "LMNPSZ"]
    zalgo = [chr(c) for c in range(0x300, 0x370)]
    strings = ["", " ", "a", " a", "a ", "é", "e\u0301", "'", "''", "\n", "0", "1234567890", "12 345,678.90"]
    strings += SENTENCES + SPACES + ODD + EMOJI

    def piece():
        kind = rng.randrange(16)
        if kind < 5:
            return rng.choice(words)
        if kind == 5:
            return rng.choice(SPACES) * rng.randrange(1, 4)
        if kind == 6:
            return rng.choice(EMOJI)
        if kind == 7:
            return rng.choice(ODD)
        if kind == 8:
            return "".join(rng.choice("0123456789") for _ in range(rng.randrange(1, 8)))
        if kind == 9:
            return "".join(rng.choice(letters) for _ in range(rng.randrange(1, 4)))
        if kind == 10:
            return rng.choice("aeoAn") + "".join(rng.choice(zalgo) for _ in range(rng.randrange(1, 6)))
        if kind == 11:
            return "".join(rng.choice("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") for _ in range(rng.randrange(1, 5)))
        if kind == 12:
            return "".join(rng.choice("abcdefghijklmnopqrstuvwxyzABC_") for _ in range(rng.randrange(1, 9)))
        if kind == 13:
            return chr(rng.choice([rng.randrange(0x4E00, 0x9FA5), rng.randrange(0xAC00, 0xD7A3), rng.randrange(0x3041, 0x3096)]))
        if kind == 14:
            return rng.choice(words).upper() + rng.choice(["'s", "'LL", "n't", "’re", "'d"])
        return rng.choice(SPACES) + rng.choice(words)

    while len(strings) < 5200:
        joiner = rng.choice(["", " ", " ", "  "])
        strings.append(joiner.join(piece() for _ in range(rng.randrange(1, 6))))
    num_plain = len(strings)
    while len(strings) < 5550:
        parts = [rng.choice(SPECIALS) if rng.random() < 0.5 else piece() for _ in range(rng.randrange(1, 6))]
        strings.append(rng.choice(["", " "]).join(parts))
    return strings, num_plain


def corpus():
    rng = random.Random(7)
    words = [w for s in SENTENCES for w in s.split(" ")]
    for s in SENTENCES * 20:
        yield s
    for _ in range(3000):
        yield " ".join(rng.choice(words) for _ in range(rng.randrange(3, 12)))


def special(text, **kw):
    return AddedToken(text, special=True, normalized=False, **kw)


def plain(text, **kw):
    return AddedToken(text, special=False, **{"normalized": False, **kw})


BYTE_ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def train(tok, size, tokens=(), alphabet=BYTE_ALPHABET, **kw):
    tok.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet),
                                                          special_tokens=list(tokens), show_progress=False, **kw))


def gpt2():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    train(tok, 1200)
    tok.add_tokens([special("<|endoftext|>")])
    return tok


QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level_split(*patterns):
    steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    return pre_tokenizers.Sequence(steps + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def qwen():
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = byte_level_split(QWEN)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    train(tok, 1200)
    tok.add_tokens([special("<|endoftext|>"), special("<|im_start|>"), special("<|im_end|>"), plain("<think>"), plain("</think>"),
                    plain("<tool_call>")])
    return tok


def llama3():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = byte_level_split(LLAMA3)
    tok.decoder = decoders.ByteLevel()
    train(tok, 1000)
    spec = json.loads(tok.to_str())
    for word in ["switchyard", "Ġarrive", "Ġthe", "Ġexperts", "ĠZug", "145"]:  # words that no merges lead to
        spec["model"]["vocab"].setdefault(word, len(spec["model"]["vocab"]))
    spec["model"]["ignore_merges"] = True
    tok = Tokenizer.from_str(json.dumps(spec))
    tok.add_tokens([special("<|begin_of_text|>"), special("<|eot_id|>"), special("<|im_start|>")])
    bos = tok.token_to_id("<|begin_of_text|>")
    tok.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|> $B",
                                      special_tokens=[("<|begin_of_text|>", bos)])])
    return tok


def sentencepiece(normalizer, pre_tokenizer):
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizer
    tok.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    train(tok, 1300, [special("<unk>"), special("<s>"), special("</s>")] + bytes_, alphabet=[], limit_alphabet=300)
    tok.pre_tokenizer = pre_tokenizer
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    spec = json.loads(tok.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # the byte tokens belong to the model alone
    return Tokenizer.from_str(json.dumps(spec))


def llama2():
    return sentencepiece(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None)


def mixtral():
    return sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def metaspace():
    tok = sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True))
    tok.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="always")])
    return tok


def deepseek():
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.Sequence([])
    tok.pre_tokenizer = byte_level_split(r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK)
    tok.decoder = decoders.ByteLevel()
    train(tok, 900)
    tok.add_tokens([special("<|im_start|>"), plain("[INST]", normalized=True)])
    return tok


def o200k():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = byte_level_split(O200K)
    tok.decoder = decoders.ByteLevel()
    train(tok, 900)
    tok.add_tokens([special("<|endoftext|>")])
    return tok


def digits():  # OLMo-like: digits one by one, and runs of spaces as added tokens
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)])
    tok.decoder = decoders.ByteLevel()
    train(tok, 900)
    tok.add_tokens([special("<|endoftext|>"), plain("        ", normalized=True), plain("    ", normalized=True), plain("  ", normalized=True)])
    return tok


def mixed():  # every other component that is supported
    tok = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##", end_of_word_suffix="</w>"))
    tok.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(),
                                           normalizers.Replace(Regex(r"\d{4,}"), "#"), normalizers.Replace("tt", "t")])
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split("e", "merged_with_previous"), pre_tokenizers.Split(Regex("[os]"), "merged_with_next"),
        pre_tokenizers.Split(Regex("[a-m]+"), "removed", invert=False), pre_tokenizers.Split("x", "isolated", invert=True)])
    train(tok, 500, [special("<unk>")], alphabet=[], limit_alphabet=120, continuing_subword_prefix="##", end_of_word_suffix="</w>")
    tok.add_tokens([special("[MASK]", lstrip=True), plain("[INST]", rstrip=True), plain("[WORD]", single_word=True),
                    plain("Málaga", normalized=True)])
    return tok


def whitespace():
    tok = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
    tok.normalizer = normalizers.NFKD()
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    train(tok, 500, [special("<unk>")], alphabet=[], limit_alphabet=100)
    return tok


FULL = [gpt2, qwen, llama3, llama2, mixtral]
PART = [metaspace, deepseek, o200k, digits, mixed, whitespace]
NUM_PART = 400


def pack(ids):
    assert all(i < 4096 for i in ids)
    return "".join(DIGITS[i >> 6] + DIGITS[i & 63] for i in ids)


def cases(tok, strings, num_plain, name):
    rng = random.Random(99)
    out = {"text_ids": [], "decode": [], "with_bos": []}
    tok.encode_special_tokens = True
    for i in range(num_plain, len(strings), 2):
        out["text_ids"].append([i, pack(tok.encode(strings[i], add_special_tokens=False).ids)])
    tok.encode_special_tokens = False
    for i in rng.sample(range(num_plain), 20):
        out["with_bos"].append([i, pack(tok.encode(strings[i], add_special_tokens=True).ids)])
    size = tok.get_vocab_size()
    while len(out["decode"]) < 60:
        if rng.random() < 0.5:
            ids = [rng.randrange(size) for _ in range(rng.randrange(1, 8))]
        else:
            ids = tok.encode(rng.choice(strings), add_special_tokens=False).ids
            ids = ids[rng.randrange(len(ids) + 1):][:10]
        text = tok.decode(ids, skip_special_tokens=False)
        # The reference turns a whole run of byte tokens into U+FFFD when any part is broken; a stream cannot know.
        if name in ("llama2", "mixtral") and "\ufffd" in text:
            continue
        out["decode"].append([pack(ids), text, tok.decode(ids, skip_special_tokens=True)])
    return out


def main():
    strings, num_plain = build_strings()
    with open(HERE / "strings.json", "w", encoding="utf-8") as f:
        f.write("[\n" + ",\n".join(json.dumps(s, ensure_ascii=False) for s in strings) + "\n]\n")
    OUT.mkdir(exist_ok=True)
    for build in FULL + PART:
        name = build.__name__
        tok = build()
        (OUT / f"{name}.json").write_text(json.dumps(json.loads(tok.to_str()), ensure_ascii=False, separators=(",", ":")) + "\n")
        chosen = list(range(len(strings)))
        if build in PART:
            chosen = [i for i in chosen if i < NUM_PART or i >= num_plain]
        lines = ["" for _ in strings]
        for i in chosen:
            lines[i] = pack(tok.encode(strings[i], add_special_tokens=False).ids)
        if build in PART:
            lines = lines[:NUM_PART] + lines[num_plain:]
        (OUT / f"{name}.ids").write_text("\n".join(lines) + "\n")
        (OUT / f"{name}.cases.json").write_text(json.dumps(cases(tok, strings, num_plain, name), ensure_ascii=False, separators=(",", ":")) + "\n")
        print(name, tok.get_vocab_size())


if __name__ == "__main__":
    main()
