"""Text of documents: sentences, names, companies, addresses, e-mail addresses, dates and amounts in many spellings."""

from __future__ import annotations

import random
import string
import unicodedata

from vlmslice.data.text import words

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip

_ACCENTED = {
    "a": "àáâäãå", "c": "çč", "e": "èéêë", "i": "ìíîï", "n": "ñ", "o": "òóôöõø", "s": "š", "u": "ùúûü", "y": "ý",
    "z": "ž",
}  # fmt: skip
_COMPANY_ENDS = ("Ltd", "Ltd.", "Inc.", "GmbH", "S.A.", "Co.", "& Co", "& Sons", "Sdn Bhd", "Store", "Market", "Cafe",
                 "Trading", "Shop")  # fmt: skip
_STREETS = ("Street", "Road", "Avenue", "Lane", "Square", "St.", "Rd", "Jalan", "Way")
_DOMAINS = ("com", "org", "net", "de", "fr", "co.uk", "io")


class Phrases:
    """Draws text from one random source and one split of the words.

    Args:
        rng: drawn from.
        split: "train" or "eval"; the two share no word.
        accents: share of words with an accented letter; call `fonts.spell` on the text for a font that lacks some.
    """

    def __init__(self, rng: random.Random, split: str = "train", accents: float = 0.0):
        self.rng, self.split, self.accents = rng, split, accents

    def word(self, longest: int = 12) -> str:
        """A lower-case word of at most `longest` letters (3 or more), accented now and then."""
        word = self.rng.choice(words(self.split))
        while len(word) > longest:
            word = self.rng.choice(words(self.split))
        if self.rng.random() < self.accents:
            places = [i for i, letter in enumerate(word) if letter in _ACCENTED]
            if places:
                i = self.rng.choice(places)
                word = word[:i] + self.rng.choice(_ACCENTED[word[i]]) + word[i + 1 :]
        return word

    def capitalized(self, longest: int = 12) -> str:
        return self.word(longest).capitalize()

    def heading(self, num_words: int) -> str:
        """Words that all begin with a capital, or all in capitals."""
        text = " ".join(self.capitalized() for _ in range(num_words))
        return text.upper() if self.rng.random() < 0.3 else text

    def distinct_words(self, number: int, longest: int = 12) -> list[str]:
        """Capitalised words, no two alike even without accents."""
        found: dict[str, str] = {}
        while len(found) < number:
            word = self.capitalized(longest)
            found.setdefault(unaccented(word), word)
        return list(found.values())

    def sentence(self) -> list[str]:
        """The tokens of a sentence: mostly words, some numbers, dates and amounts, a stop at its end."""
        tokens = [self.word() for _ in range(self.rng.randint(4, 12))]
        for i in range(len(tokens)):
            draw = self.rng.random()
            if draw < 0.08:
                tokens[i] = self.rng.choice(
                    (self.number, self.amount, self.numeric_date, self.code, self.percent, self.clock)
                )()
            elif draw < 0.16 and i:
                tokens[i] = self.capitalized()
            elif draw < 0.22:
                tokens[i] = self.rng.choice(("({})", '"{}"', "'{}'")).format(tokens[i])
            elif draw < 0.25 and i:
                tokens[i] = f"{tokens[i]}-{self.word()}"
            if self.rng.random() < 0.08 and i < len(tokens) - 1:
                tokens[i] += self.rng.choice(",,,;:")
        if tokens[0][0].isalpha():
            tokens[0] = tokens[0][0].upper() + tokens[0][1:]
        tokens[-1] += self.rng.choice("......!?")
        return tokens

    def entry(self) -> str:
        """A short thing that stands alone on a document: a name, an address, a date, a code, a few words."""
        return self.rng.choice(
            (
                self.name, self.email, self.web, self.phone, self.date, self.price, self.code, self.company,
                self.clock, self.percent, self.label, self.label, self.label,
            )
        )()  # fmt: skip

    def label(self) -> str:
        """One or two words, the first with a capital."""
        return " ".join([self.capitalized(9)] + [self.word(8)] * (self.rng.random() < 0.4))

    def name(self) -> str:
        first = self.capitalized(8)
        return (
            f"{first[0]}. {self.capitalized(9)}"
            if self.rng.random() < 0.2
            else f"{first} {self.capitalized(9)}"
        )

    def company(self) -> str:
        text = " ".join(
            [*(self.capitalized(9) for _ in range(self.rng.randint(1, 2))), self.rng.choice(_COMPANY_ENDS)]
        )
        return text.upper() if self.rng.random() < 0.5 else text

    def address(self) -> str:
        street = f"{self.capitalized(9)} {self.rng.choice(_STREETS)}"
        place = f"{self.rng.randrange(10_000, 99_999)} {self.capitalized(9)}"
        return f"{self.rng.randint(1, 199)} {street}, {place}"

    def email(self) -> str:
        user = self.rng.choice(("{0}", "{0}.{1}", "{0}_{1}", "{0}{2}")).format(
            unaccented(self.word(8)), unaccented(self.word(8)), self.rng.randrange(100)
        )
        return f"{user}@{unaccented(self.word(9))}.{self.rng.choice(_DOMAINS)}"

    def web(self) -> str:
        return f"{self.rng.choice(('www.', 'https://', 'www.'))}{unaccented(self.word(9))}.{self.rng.choice(_DOMAINS)}"

    def phone(self) -> str:
        a, b, c = self.rng.randrange(10, 999), self.rng.randrange(100, 999), self.rng.randrange(1000, 9999)
        return self.rng.choice((f"+{a} {b} {c}", f"({b}) {b}-{c}", f"{a:03d}-{b}{c}", f"0{a} {c}{b}"))

    def clock(self) -> str:
        hour, minute = self.rng.randrange(24), self.rng.randrange(60)
        text = f"{hour:02d}:{minute:02d}"
        return f"{text}:{self.rng.randrange(60):02d}" if self.rng.random() < 0.3 else text

    def numeric_date(self) -> str:
        day, month, year = self.rng.randint(1, 28), self.rng.randint(1, 12), self.rng.randint(1990, 2035)
        sep = self.rng.choice("//-.")
        return self.rng.choice(
            (
                f"{day:02d}{sep}{month:02d}{sep}{year}", f"{day:02d}{sep}{month:02d}{sep}{year % 100:02d}",
                f"{year}-{month:02d}-{day:02d}", f"{day}{sep}{month}{sep}{year}",
            )
        )  # fmt: skip

    def date(self) -> str:
        """A date in numbers, or with the name of the month."""
        if self.rng.random() < 0.6:
            return self.numeric_date()
        day, month, year = self.rng.randint(1, 28), self.rng.choice(MONTHS), self.rng.randint(1990, 2035)
        short = month[:3]
        return self.rng.choice(
            (
                f"{day} {month} {year}",
                f"{month} {day}, {year}",
                f"{day:02d} {short} {year}",
                f"{day:02d}-{short}-{year}",
            )
        )

    def number(self) -> str:
        value = self.rng.randrange(10 ** self.rng.randint(1, 6))
        return f"{value:,}" if self.rng.random() < 0.5 else str(value)

    def amount(self) -> str:
        """A number with two decimals."""
        value = self.rng.randrange(10 ** self.rng.randint(2, 5)) / 100
        return f"{value:.2f}"

    def price(self) -> str:
        """An amount, mostly with its currency."""
        return self.rng.choice(("{}", "${}", "{} USD", "RM {}", "EUR {}", "${}")).format(self.amount())

    def percent(self) -> str:
        return (
            f"{self.rng.randrange(101)}%"
            if self.rng.random() < 0.6
            else f"{self.rng.randrange(1000) / 10:.1f} %"
        )

    def code(self) -> str:
        letters = "".join(self.rng.choice(string.ascii_uppercase) for _ in range(self.rng.randint(1, 3)))
        digits = "".join(self.rng.choice(string.digits) for _ in range(self.rng.randint(2, 6)))
        return self.rng.choice(
            (f"{letters}{digits}", f"{letters}-{digits}", f"#{digits}", f"{digits}/{letters}")
        )


def unaccented(text: str) -> str:
    """Accented letters turned to their base letters; "ø" and the like, which have none, to "o"."""
    text = text.replace("ø", "o")
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
