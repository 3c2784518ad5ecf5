"""What was answered: the number in a text, and one row of the test."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from vlmslice.counting_test.pictures import Picture
from vlmslice.metrics import parse_count

_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_VALUES = {word: value for value, word in enumerate(_UNITS)} | {
    word: 10 * value for value, word in enumerate(_TENS, start=2)
}
_NUMBER_WORD = re.compile(
    rf"\b(?:(?P<tens>{'|'.join(_TENS)})(?:[- ](?P<digit>{'|'.join(_UNITS[1:10])}))?"
    rf"|(?P<unit>{'|'.join(sorted(_UNITS, key=len, reverse=True))})|(?P<none>none|there (?:are|is) no))\b",
    re.IGNORECASE,
)


def read_count(text: str) -> int | None:
    """The number that an answer tells: its first one, in digits or in words up to ninety-nine.

    "none" and "there are no" tell 0. An answer without a number, or whose first number is no whole one, tells none.

    Example: `There are twenty-one balls, 7 in each row.` tells 21.
    """

    def spell(found: re.Match[str]) -> str:
        words = [found[name].lower() for name in ("tens", "digit", "unit") if found[name]]
        return str(sum(_VALUES[word] for word in words))

    return parse_count(_NUMBER_WORD.sub(spell, text))


@dataclass(frozen=True)
class CountAnswer:
    """One row of the test: a picture, an arm, and what was answered.

    Attributes:
        id: Of the picture; unique within an arm.
        set, group, variant, policy, num_on_seams: See `pictures.Picture`.
        arm: Name of the arm.
        height, width: Of the image in px.
        question: What was asked.
        truth: The true count.
        boxes: (top, left, bottom, right) in px of the shapes to count.
        text: The answer; None if the picture could not be asked about.
        count: The number in it; None without one.
        reason: Why it could not be asked about, such as a plan over the bound on visual tokens.
    """

    id: str
    set: str
    group: str
    variant: str
    arm: str
    height: int
    width: int
    question: str
    truth: int
    policy: str | None
    num_on_seams: int
    boxes: list[list[float]]
    text: str | None
    count: int | None
    reason: str | None = None

    @property
    def error(self) -> int | None:
        """Answer minus truth; None without a number."""
        return None if self.count is None else self.count - self.truth

    @property
    def is_exact(self) -> bool:
        """Whether the answer tells the true count."""
        return self.count == self.truth

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> CountAnswer:
        """The inverse of `to_dict`."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})


def record_answer(picture: Picture, arm: str, text: str | None, reason: str | None = None) -> CountAnswer:
    """The row of an answer, or with `reason` of a picture that could not be asked about."""
    height, width = picture.image_size
    return CountAnswer(
        id=picture.id,
        set=picture.set,
        group=picture.group,
        variant=picture.variant,
        arm=arm,
        height=height,
        width=width,
        question=picture.layout.question,
        truth=picture.layout.count,
        policy=picture.policy,
        num_on_seams=picture.num_on_seams,
        boxes=[[round(edge, 1) for edge in box] for box in picture.asked_boxes],
        text=text,
        count=None if text is None else read_count(text),
        reason=reason,
    )
