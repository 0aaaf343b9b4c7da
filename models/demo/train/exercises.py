"""Exercises with checkable answers: each draws from thousands of prompts.

A generator takes a `random.Random` and the word list and returns `(key, prompt, answer)`. The key
names the problem without its phrasing; split.py hashes it.
"""

import json
import string

NAMES = """Ann Bob Cid Dan Eve Fay Gus Hal Ida Jim Kim Leo May Ned Oli Pam Ray Sam Tom Uma Vic Zoe
Emma Jane Mary Anne John Frank Harriet George Henry William Lucy Fanny Charles Edward Kitty Lydia
Louisa Charlotte Robert Maria Julia Isabella Catherine Elizabeth James Eleanor Thomas
Sophia""".split()
THINGS = """key cup pen hat map box bag book coin lamp ring rope shoe fork bell drum comb vase coat
letter candle basket ribbon bottle carriage flower apple mirror table chair stone""".split()
ORDINALS = ["first", "second", "third", "fourth"]
ADJECTIVES = [
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("richer", "richest", "poorest"),
    ("stronger", "strongest", "weakest"),
]
UNITS = [("km", "m", 3), ("m", "cm", 2), ("kg", "g", 3), ("cm", "mm", 1), ("l", "ml", 3)]


def _number(rng, digits):
    """A number of 1..digits digits, each length equally likely."""
    n = rng.randint(1, digits)
    return rng.randint(0 if n == 1 else 10 ** (n - 1), 10**n - 1)


def _distinct(rng, count, top=99):
    return rng.sample(range(top + 1), count)


# --- math -----------------------------------------------------------------------------------------


def add(rng, words):
    a, b = _number(rng, 2), _number(rng, 2)
    prompt = rng.choice(["What is {} + {}?", "{} + {} =", "Add {} and {}."]).format(a, b)
    return f"{a} {b}", prompt, str(a + b)


def subtract(rng, words):
    b, a = sorted([_number(rng, 2), _number(rng, 2)])
    prompt = rng.choice([f"What is {a} - {b}?", f"{a} - {b} =", f"Subtract {b} from {a}."])
    return f"{a} {b}", prompt, str(a - b)


def larger(rng, words):
    a, b = rng.sample(range(1000), 2)
    prompt, f = rng.choice(
        [("Which is larger, {} or {}?", max), ("Which is smaller, {} or {}?", min)]
    )
    return f"{a} {b}", prompt.format(a, b), str(f(a, b))


def parity(rng, words):
    a = _number(rng, 5)
    return str(a), f"Is {a} even or odd?", ("even", "odd")[a % 2]


def successor(rng, words):
    a = rng.randint(1, 9999) if rng.random() < 0.7 else rng.randint(1, 999) * 10 + 9
    prompt = rng.choice(["What number comes after {}?", "What comes next after {}?"]).format(a)
    return str(a), prompt, str(a + 1)


# --- data -----------------------------------------------------------------------------------------


def _value(rng, words):
    return rng.randint(0, 999) if rng.random() < 0.5 else rng.choice(words)


def json_get(rng, words):
    keys = rng.sample(words, rng.randint(2, 4))
    data = {k: _value(rng, words) for k in keys}
    key = rng.choice(keys)
    text = json.dumps(data)
    ask = rng.choice(['What is the value of "{}"?', 'Get "{}".', "What is {}?"]).format(key)
    return text + key, f"{text}\n{ask}", str(data[key])


def json_make(rng, words):
    data = {k: _value(rng, words) for k in rng.sample(words, rng.randint(1, 2))}
    text = ", ".join(f"{k} is {v}" for k, v in data.items())
    return text, f"Write as JSON: {text}", json.dumps(data)


def list_pick(rng, words):
    count = rng.randint(3, 4)
    items = rng.sample(words, count) if rng.random() < 0.5 else _distinct(rng, count)
    place = rng.randrange(len(items))
    word = "last" if place == len(items) - 1 and rng.random() < 0.5 else ORDINALS[place]
    text = ", ".join(map(str, items))
    return text + word, f"{text}\nWhat is the {word} item?", str(items[place])


def sort_numbers(rng, words):
    items = _distinct(rng, rng.randint(3, 4))
    text = " ".join(map(str, items))
    prompt = rng.choice([f"Sort: {text}", f"Sort these numbers: {text}"])
    return text, prompt, " ".join(map(str, sorted(items)))


def list_extreme(rng, words):
    items = _distinct(rng, rng.randint(3, 4))
    text = ", ".join(map(str, items))
    name, f = rng.choice([("largest", max), ("smallest", min)])
    return text + name, f"{text}\nWhat is the {name} number?", str(f(items))


# --- text -----------------------------------------------------------------------------------------


def _letters(rng, low, high):
    return rng.choices(string.ascii_lowercase, k=rng.randint(low, high))


def reverse(rng, words):
    items = _letters(rng, 3, 7)
    text = " ".join(items)
    return text, f"Reverse: {text}", " ".join(items[::-1])


def upper(rng, words):
    text = " ".join(_letters(rng, 3, 7))
    return text, f"Upper case: {text}", text.upper()


def count_letters(rng, words):
    items = _letters(rng, 2, 9)
    text = " ".join(items)
    return text, f"How many letters are there? {text}", str(len(items))


def first_letter(rng, words):
    word = rng.choice(words)
    prompt = rng.choice(['What is the first letter of "{}"?', "What letter does {} start with?"])
    return word, prompt.format(word), word[0]


def spell(rng, words):
    word = rng.choice(words)
    return word, rng.choice(["Spell {}.", "Spell the word {}."]).format(word), " ".join(word)


def copy(rng, words):
    text = " ".join(str(_value(rng, words)) for _ in range(rng.randint(2, 4)))
    return text, rng.choice([f"Repeat: {text}", f"Say this again: {text}"]), text


# --- logic ----------------------------------------------------------------------------------------


def order_people(rng, words):
    people = rng.sample(NAMES, 3)
    more, most, least = rng.choice(ADJECTIVES)
    facts = [f"{a} is {more} than {b}." for a, b in zip(people, people[1:])]
    rng.shuffle(facts)
    ask, who = rng.choice([(most, people[0]), (least, people[-1])])
    text = " ".join(facts)
    return text + ask, f"{text} Who is the {ask}?", who


def who_has(rng, words):
    count = rng.randint(2, 3)
    people, things = rng.sample(NAMES, count), rng.sample(THINGS, count)
    text = " ".join(f"{p} has the {t}." for p, t in zip(people, things))
    i = rng.randrange(count)
    ask, answer = rng.choice(
        [
            (f"Who has the {things[i]}?", people[i]),
            (f"What does {people[i]} have?", f"the {things[i]}"),
        ]
    )
    return text + ask, f"{text} {ask}", answer


def compare_both(rng, words):
    a, b, c, d = (rng.randint(0, 99) for _ in range(4))
    joint = rng.choice(["and", "or"])
    truth = (a > b and c > d) if joint == "and" else (a > b or c > d)
    text = f"{a} > {b} {joint} {c} > {d}"
    return text, f"True or false: {text}", str(truth).lower()


def member(rng, words):
    items = rng.sample(words, rng.randint(3, 4))
    item = rng.choice(items) if rng.random() < 0.5 else rng.choice(words)
    text = ", ".join(items)
    return text + item, f"Is {item} one of these? {text}", "yes" if item in items else "no"


# --- time -----------------------------------------------------------------------------------------


def _clock(minutes):
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def clock_hours(rng, words):
    start, step = rng.randrange(24 * 60), rng.randint(1, 9)
    prompt = f"What time is {step} hours after {_clock(start)}?"
    return f"{start} {step}", prompt, _clock(start + step * 60)


def clock_order(rng, words):
    a, b = rng.sample(range(24 * 60), 2)
    ask, f = rng.choice([("earlier", min), ("later", max)])
    return f"{a} {b} {ask}", f"Which time is {ask}, {_clock(a)} or {_clock(b)}?", _clock(f(a, b))


def convert(rng, words):
    a, (big, small, power) = max(1, _number(rng, 4)), rng.choice(UNITS)
    return f"{a} {big}", f"Convert {a} {big} to {small}.", f"{a * 10**power} {small}"


# --- code -----------------------------------------------------------------------------------------

RUN = "What does this print?\n"


def py_sum(rng, words):
    a, b = _number(rng, 2), _number(rng, 2)
    a, b = max(a, b), min(a, b)
    op, value = rng.choice([("+", a + b), ("-", a - b)])
    return f"{a}{op}{b}", f"{RUN}print({a} {op} {b})", str(value)


def py_index(rng, words):
    items = _distinct(rng, rng.randint(3, 4))
    i = rng.randrange(-1, len(items))
    return f"{items}{i}", f"{RUN}print({items}[{i}])", str(items[i])


def py_len(rng, words):
    items = _distinct(rng, rng.randint(1, 7))
    return f"{items}", f"{RUN}print(len({items}))", str(len(items))


def py_max(rng, words):
    items = _distinct(rng, rng.randint(2, 4))
    f = rng.choice([max, min])
    text = ", ".join(map(str, items))
    return f.__name__ + text, f"{RUN}print({f.__name__}({text}))", str(f(items))


def py_sorted(rng, words):
    items = _distinct(rng, rng.randint(3, 4))
    return str(items), f"{RUN}print(sorted({items}))", str(sorted(items))


def py_variable(rng, words):
    names = rng.sample("abcdefghijkmnpqrstuvwxyz", rng.randint(2, 3))
    values = {n: rng.randint(0, 99) for n in names}
    text = "\n".join(f"{n} = {v}" for n, v in values.items())
    name = rng.choice(names)
    return text + name, f"{RUN}{text}\nprint({name})", str(values[name])


def py_compare(rng, words):
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    op, value = rng.choice([(">", a > b), ("<", a < b), ("==", a == b)])
    return f"{a}{op}{b}", f"{RUN}print({a} {op} {b})", str(value)


def py_words(rng, words):
    parts = rng.sample(words, rng.randint(2, 3))
    return str(parts), f"{RUN}print({', '.join(json.dumps(p) for p in parts)})", " ".join(parts)


DOMAINS = {
    "math": [add, subtract, larger, parity, successor],
    "data": [json_get, json_make, list_pick, sort_numbers, list_extreme],
    "text": [reverse, upper, count_letters, first_letter, spell, copy],
    "logic": [order_people, who_has, compare_both, member],
    "time": [clock_hours, clock_order, convert],
    "code": [py_sum, py_index, py_len, py_max, py_sorted, py_variable, py_compare, py_words],
}
EXERCISES = {f.__name__: (domain, f) for domain, fs in DOMAINS.items() for f in fs}
