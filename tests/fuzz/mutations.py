"""Small changes of what files hold, which keep most of the structure: values, fields, bytes, operations."""

import copy
import json
import pickletools
import re
from random import Random
from typing import Any

# What readers of numbers, names and lists have stumbled on.
NASTY: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2,
    3,
    2**31,
    2**63,
    10**30,
    10**5,
    0.5,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "owner/name",
    "../up",
    "a\0b",
    "\x1b[31m",
    "\ud800",
    "x" * 5000,
    "9" * 5000,
    [],
    {},
    [None],
    [[]],
    [0],
    [2**62, 4],
    {"x": {}},
    ["x"] * 1000,
    [3] * 300,
)


# Operations that make something grow when they are repeated: a tuple, one of itself twice, a list, a copy of
# what is there, a mark.
RUNS = ([b"\x86"], [b"q\x01", b"h\x01", b"\x86"], [b"]"], [b"2"], [b"("])
# Stands for lists in one another, so many, until it is written as JSON.
NESTED = re.compile(r'"<nested (\d+)>"')


def change_value(random: Random, value: Any) -> Any:
    """A value with one thing in it, anywhere, replaced, taken out, doubled or put under another name."""
    value = copy.deepcopy(value)
    holder, key = None, None
    at = value
    while isinstance(at, dict | list) and at and (holder is None or random.random() < 0.7):
        holder, key = at, random.choice(list(at) if isinstance(at, dict) else range(len(at)))
        at = at[key]
    if holder is None:
        return random.choice(NASTY)
    action = random.random()
    if action < 0.6:
        holder[key] = near(random, at)
    elif action < 0.75:
        del holder[key]
    elif isinstance(holder, dict):
        name = random.choice(["x", "", f"{key}x", str(key).upper(), "a" * 3000])
        holder[name] = random.choice([at, near(random, at)])
    else:
        holder[key:key] = [at] * random.choice([1, 2, 1000])
    return value


def near(random: Random, value: Any) -> Any:
    """Another value, more often than not of the same type."""
    if random.random() < 0.03:
        return f"<nested {random.choice([70, 900, 200_000])}>"
    if random.random() < 0.5:
        return random.choice(NASTY)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return random.choice([value + 1, value - 1, -value, value * 2, value * 1000, value / 3])
    if isinstance(value, str):
        return bytes_of(random, value.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    return random.choice(NASTY)


def as_json(random: Random, value: Any) -> bytes:
    """JSON, now and then in another encoding or with numbers that are written otherwise."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.8)
    text = NESTED.sub(lambda match: "[" * int(match[1]) + "]" * int(match[1]), text)
    kind = random.random()
    if kind < 0.05:
        return text.encode("utf-16", "surrogatepass")
    if kind < 0.1:
        return text.replace(" ", " 1e999 ", 1).encode("utf-8", "surrogatepass")
    if kind < 0.15:
        return bytes_of(random, text.encode("utf-8", "surrogatepass"))
    return text.encode("utf-8", "surrogatepass")


def bytes_of(random: Random, content: bytes) -> bytes:
    """Bytes of which a few are changed, cut, doubled or moved."""
    made = bytearray(content)
    for _ in range(random.choice([1, 1, 1, 2, 5, 30])):
        at = random.randrange(len(made) + 1)
        length = random.choice([1, 1, 2, 4, 8, 50])
        action = random.randrange(5)
        if action == 0 and made:
            made[at % len(made)] ^= 1 << random.randrange(8)
        elif action == 1:
            made[at : at + length] = random.randbytes(length)
        elif action == 2:
            del made[at : at + length]
        elif action == 3:
            made[at:at] = made[at : at + length] * random.choice([1, 3])
        else:
            made[at : at + length] = random.choice([b"\xff", b"\0", b"\x7f"]) * length
    if random.random() < 0.1:
        del made[random.randrange(len(made) + 1) :]
    return bytes(made)


def operations(random: Random, outline: bytes) -> bytes:
    """A pickle of which a few operations are taken out, doubled, exchanged or given other numbers."""
    starts = [position for _, _, position in pickletools.genops(outline)]
    pieces = [outline[start:end] for start, end in zip(starts, [*starts[1:], len(outline)], strict=True)]
    for _ in range(random.choice([1, 1, 2, 4])):
        at, other = random.randrange(1, len(pieces)), random.randrange(1, len(pieces))
        action = random.randrange(5)
        if action == 0:
            del pieces[at]
        elif action == 1:
            pieces.insert(other, pieces[at])
        elif action == 2:
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif action == 3 and len(pieces[at]) > 1:
            pieces[at] = pieces[at][:1] + bytes_of(random, pieces[at][1:])
        else:
            times = random.choice([1, 30, 2000])
            pieces[at:at] = random.choice(RUNS) * times
    return b"".join(pieces)
