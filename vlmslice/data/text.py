"""Strings to render: words from a bundled list, numbers, prices, dates, codes."""

from __future__ import annotations

import random
import string
import zlib
from functools import cache
from importlib import resources

# Kept for evaluation: one word in ten, chosen by a checksum so that the list may grow without a word changing sides.
_HELD_OUT_SHARE = 10


@cache
def words(split: str = "train") -> tuple[str, ...]:
    """Lower-case words of 2-12 letters. "train" and "eval" share none; the list is a sample of SCOWL (see NOTICE)."""
    listed = resources.files("vlmslice.data").joinpath("words.txt").read_text().split()
    held_out = {"train": False, "eval": True}[split]
    return tuple(w for w in listed if (zlib.crc32(w.encode()) % _HELD_OUT_SHARE == 0) == held_out)


def _word(rng: random.Random, split: str) -> str:
    word = rng.choice(words(split))
    draw = rng.random()
    if draw < 0.55:
        return word
    return word.capitalize() if draw < 0.85 else word.upper()


def _number(rng: random.Random, split: str) -> str:
    return str(rng.randrange(10 ** rng.randint(1, 6)))


def _price(rng: random.Random, split: str) -> str:
    amount = f"{rng.randrange(1000)}.{rng.randrange(100):02d}"
    return rng.choice(["", "", "$"]) + amount


def _date(rng: random.Random, split: str) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1990, 2030)
    separator = rng.choice("/-.")
    return separator.join([f"{day:02d}", f"{month:02d}", str(year)])


def _code(rng: random.Random, split: str) -> str:
    letters = string.ascii_uppercase + string.digits + ("-" if rng.random() < 0.3 else "")
    return "".join(rng.choice(letters) for _ in range(rng.randint(3, 8)))


def _punctuated(rng: random.Random, split: str) -> str:
    word = _word(rng, split)
    return rng.choice(
        [word + ",", word + ".", word + "!", word + "?", word + ":", f"({word})", f'"{word}"', word + ";"]
    )


def _characters(rng: random.Random, split: str) -> str:
    letters = string.ascii_letters + string.digits + string.punctuation
    return "".join(rng.choice(letters) for _ in range(rng.randint(1, 8)))


_KINDS = (
    (_word, 0.62), (_number, 0.08), (_price, 0.06), (_date, 0.05), (_code, 0.05), (_punctuated, 0.1),
    (_characters, 0.04),
)  # fmt: skip


def random_token(rng: random.Random, split: str = "train") -> str:
    """One run of characters without spaces."""
    kind = rng.choices([k for k, _ in _KINDS], [w for _, w in _KINDS])[0]
    return kind(rng, split)


def random_words(rng: random.Random, num_words: int, split: str = "train") -> str:
    """`num_words` tokens joined by single spaces.

    In training, one line in seven says something twice: who finds the place on the picture by what was written last
    must learn to tell the two apart.
    """
    tokens = [random_token(rng, split) for _ in range(num_words)]
    if split == "train" and num_words > 1 and rng.random() < 0.15:
        first, second = sorted(rng.sample(range(num_words), 2))
        tokens[second] = tokens[first]
    return " ".join(tokens)
