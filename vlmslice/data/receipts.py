"""Receipts: tall, printed on a thermal or needle printer, with a total to find and a JSON record to give."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from vlmslice.data.fonts import FontLibrary, load_font, spell
from vlmslice.data.photo_effects import photograph, print_thermally
from vlmslice.data.phrases import Phrases
from vlmslice.data.samples import READ_QUESTIONS, TaskConfig, TaskSample, ask_several, reshape
from vlmslice.data.scenes import Scene, paper_image
from vlmslice.data.typesetting import Font, Pen, line_height

_ASPECTS = (0.35, 0.8)
_MIN_AREA = 330 * 120
_SMALLEST = 9  # px per em
_TOTAL_WORDS = ("TOTAL", "Total", "TOTAL DUE", "Grand Total", "AMOUNT DUE", "Total Amount")
_CASH_WORDS = ("CASH", "Cash", "VISA", "Card", "Mastercard")
_THANKS = ("THANK YOU", "Thank you!", "Please come again", "GOODS SOLD ARE NOT RETURNABLE", "Have a nice day")

QUESTIONS = {
    "all": (
        *READ_QUESTIONS,
        "Read the receipt.",
        "Transcribe the receipt line by line.",
        "Read all the text of the receipt.",
    ),
    "total": (
        "What is the total?",
        "What is the total amount?",
        "How much was paid in total?",
        "Find the total.",
    ),
    "date": ("What is the date?", "What is the date of the receipt?", "When was it issued?"),
    "company": (
        "What is the name of the company?",
        "Which company issued the receipt?",
        "Who is the seller?",
    ),
    "address": ("What is the address?", "Where is the company?"),
    "json": (
        "Read the receipt as JSON.",
        "Give the company, date, address and total of this receipt as JSON.",
        "Give company, date, address and total as JSON.",
        "Extract the company, date, address and total as JSON.",
    ),
    "items": ("List the items as JSON.", "Give the items and their prices as JSON."),
}

_WEIGHTS = {"all": 3, "total": 3, "date": 2, "company": 2, "address": 1, "json": 4, "items": 1, "price": 2}


@dataclass(frozen=True)
class Receipt:
    """What is printed; amounts as they are spelled, in the order of the lines."""

    company: str
    address: str
    date: str
    items: tuple[tuple[str, str], ...]
    total: str

    def record(self) -> dict[str, str]:
        """The fields that are asked for as JSON, named as in SROIE."""
        return {"company": self.company, "date": self.date, "address": self.address, "total": self.total}


def compact_json(value: object) -> str:
    """JSON without spaces, accents as they are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def random_receipt(rng: random.Random, phrases: Phrases, num_items: int) -> Receipt:
    """A receipt whose total is the sum of its prices, with distinct items."""
    names = phrases.distinct_words(num_items, longest=9)
    upper = rng.random() < 0.5
    cents = [rng.choice((rng.randrange(50, 3000), 5 * rng.randrange(10, 2000))) for _ in names]
    items = []
    for name, price in zip(names, cents, strict=True):
        label = f"{name} {phrases.word(7)}" if rng.random() < 0.4 else name
        items.append((label.upper() if upper else label, f"{price / 100:.2f}"))
    address = phrases.address()
    return Receipt(
        phrases.company(),
        address.upper() if upper else address,
        phrases.date(),
        tuple(items),
        f"{sum(cents) / 100:,.2f}",
    )


Row = tuple[str, str]
"""Text on the left (or in the middle, if nothing stands on the right), and on the right."""


def read_receipt(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> TaskSample:
    """A receipt; asks for a field, a price, all of it, or JSON. The picture is made tall, and large enough to read."""
    height, width = reshape(height, width, _ASPECTS, _MIN_AREA)
    phrases = Phrases(rng, config.split, config.accents)
    draw_font = fonts.draw_monospaced if rng.random() < 0.6 else fonts.draw
    font = draw_font(rng, 20)
    # Lines must fit at a legible size: the items are as many as there is room for below a dozen other lines.
    most = int(0.94 * height / (1.25 * _SMALLEST)) - 10
    num_items = max(1, min(rng.randint(*config.num_lines), most, (config.max_answer - 120) // 22))
    receipt = random_receipt(rng, phrases, num_items)
    receipt = _spelled(receipt, font)
    rows = _rows(rng, phrases, receipt, font, rng.choice(("", "", "$", "RM ", "EUR ")))
    font = _fit(font, rows, 0.96 * height, 0.92 * width)
    ink = (rng.randrange(70),) * 3 if rng.random() < 0.8 else (40, 40, rng.randrange(90, 140))
    white = rng.randrange(215, 256)
    scene = Scene(paper_image(rng, height, width, (white, white, white - rng.randrange(12))))
    pen = Pen(scene, ink)
    step = (
        min(1.6 * line_height(font), 0.96 * height / len(rows)) if rng.random() < 0.7 else line_height(font)
    )
    top = 0.02 * height + rng.uniform(0, max(0.0, 0.96 * height - step * len(rows)))
    lines = []
    for left_text, right_text in rows:
        if right_text:
            pen.write(left_text, font, top, 0.04 * width)
            pen.write_right(right_text, font, top, 0.96 * width)
        elif left_text:
            pen.write_middle(left_text, font, top, width / 2)
        else:
            y = top + line_height(font) / 2
            _rule(pen, y, 0.04 * width, 0.96 * width, max(1, round(font.size / 14)))
        if left_text:
            lines.append(f"{left_text} {right_text}".strip())
        top += step
    if rng.random() < 0.35:
        scene.image = print_thermally(rng, scene.image, max(2, round(font.size / 9)))
    scene = photograph(rng, scene, config.photo)
    return ask_several(rng, config, "receipt", scene, lambda: _ask(rng, receipt, lines))


def _spelled(receipt: Receipt, font: Font) -> Receipt:
    """The receipt in characters that the font has."""
    return Receipt(
        spell(receipt.company, font),
        spell(receipt.address, font),
        receipt.date,
        tuple((spell(name, font), price) for name, price in receipt.items),
        receipt.total,
    )


def _rows(rng: random.Random, phrases: Phrases, receipt: Receipt, font: Font, currency: str) -> list[Row]:
    """All lines in print; the total comes with its currency, which answers leave out."""
    rule: Row = ("", "")
    street, place = receipt.address.split(", ")
    rows = [(receipt.company, ""), (f"{street},", ""), (place, "")]
    if rng.random() < 0.4:
        rows.append((f"TEL {phrases.phone()}", ""))
    dated = (
        [(rng.choice(("Date", "DATE", "Date:")), receipt.date)]
        if rng.random() < 0.5
        else [(receipt.date, "")]
    )
    numbered = [(rng.choice(("Receipt", "Invoice No", "Bill")), phrases.code())] if rng.random() < 0.5 else []
    last = rng.random() < 0.2
    rows += numbered + ([] if last else dated) + [rule]
    rows += list(receipt.items)
    if rng.random() < 0.7:
        rows.append(rule)
    if rng.random() < 0.3:
        rows.append(("Items", str(len(receipt.items))))
    rows.append((rng.choice(_TOTAL_WORDS), currency + receipt.total))
    if rng.random() < 0.4:
        rows.append((rng.choice(_CASH_WORDS), currency + receipt.total))
    rows += dated if last else []
    if rng.random() < 0.5:
        rows.append((rng.choice(_THANKS), ""))
    return [(spell(left, font), right) for left, right in rows]


def _fit(font: Font, rows: list[Row], height: float, width: float) -> Font:
    """The font at the largest size at which the rows fit."""
    widest = max(font.getlength(f"{left}  {right}" if right else left) for left, right in rows)
    scale = min(width / widest, height / (len(rows) * line_height(font)))
    return load_font(str(font.path), max(7, int(font.size * scale)))


def _rule(pen: Pen, y: float, left: float, right: float, thickness: int) -> None:
    dash = 4 * thickness
    x = left
    while x < right:
        pen.draw.line((x, y, min(x + dash, right), y), fill=pen.ink, width=thickness)
        x += 1.7 * dash


def _ask(rng: random.Random, receipt: Receipt, lines: list[str]) -> tuple[str, str]:
    kind = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    if kind == "price":
        name, price = rng.choice(receipt.items)
        return rng.choice(
            (f"What is the price of {name}?", f"How much is {name}?", f"What does {name} cost?")
        ), price
    items = [{"name": name, "price": price} for name, price in receipt.items]
    answers = {
        "all": "\n".join(lines),
        "total": receipt.total,
        "date": receipt.date,
        "company": receipt.company,
        "address": receipt.address,
        "json": compact_json(receipt.record()),
        "items": compact_json(items),
    }
    return rng.choice(QUESTIONS[kind]), answers[kind]
