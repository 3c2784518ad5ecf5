"""Fonts for rendered data: found on the machine, sorted into families, split by family into training and held out.

A font file counts when it has a glyph for every printable ASCII character. Families are held out by name, so that an
evaluation font's bold or condensed cut is never seen in training either.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

CHARACTERS = string.ascii_letters + string.digits + string.punctuation

# Never used in training. The DejaVu and Verana families share their drawings, as do Schola and C059, Carlito and Lato.
HELD_OUT_FAMILIES = frozenset(
    {
        "Andika", "C059", "Caladea", "Carlito", "Comic Neue", "Courier Prime", "Courier Prime Code",
        "Courier Prime Sans", "DejaVu Sans", "DejaVu Sans Display", "DejaVu Sans Mono", "DejaVu Serif",
        "DejaVu Serif Display", "DejaVu Math TeX Gyre", "EB Garamond", "Fira Code", "Jura", "Lato", "Open Sans",
        "Open Sans Condensed", "Roboto", "Roboto Condensed", "TeX Gyre Schola", "Verana", "Verana Sans",
        "Verana Sans Demi", "Verana Sans Medium", "Vollkorn", "Sora",
    }
)  # fmt: skip

# Symbols in Latin places, small capitals for lower case, or shapes that a reader would not call letters.
_UNSUITABLE_FAMILIES = frozenset(
    {
        "Alfa-beta", "API  PHONÉTIQUE", "BABEL Unicode", "cmb10", "cmex10", "cmmi10", "cmr10", "cmss10", "cmsy10",
        "cmti10", "D050000L", "Ellhnikh", "Humor Sans", "IPA  PHONETICS", "Jara", "Junkyard", "Kristi",
        "Last Resort High-Efficiency", "Latin Modern Math", "Latin Modern Mono Caps", "Latin Modern Roman Caps",
        "Linux Biolinum Keyboard O", "Mekanus ADF Titling Std", "Noto Sans Math", "Penguin Attack",
        "Standard Symbols PS", "STIXSizeOneSym", "Symbola", "TeX Gyre Chorus",
    }
)  # fmt: skip

_MONOSPACED = re.compile(r"Mono|Courier|Code|Typewriter|Typist|Cursor|tt10|OCR|Spleen|Inconsolata|Hack")

SYSTEM_FONT_DIRS = ("/usr/share/fonts", "/usr/local/share/fonts", "/usr/share/texmf/fonts", "/Library/Fonts")


@dataclass(frozen=True)
class FontFile:
    family: str
    style: str
    path: str


def matplotlib_font_dir() -> Path | None:
    """Folder of the fonts that matplotlib carries (DejaVu among them), or None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _read_font_file(path: Path) -> FontFile | None:
    # Of the extra `train`; using a trained model must not need it.
    from fontTools.ttLib import TTFont, TTLibError

    try:
        with TTFont(path, lazy=True) as font:
            characters = font.getBestCmap() or {}
            if not all(ord(c) in characters for c in CHARACTERS + " "):
                return None
            names = font["name"]
            family = names.getDebugName(16) or names.getDebugName(1)
            style = names.getDebugName(17) or names.getDebugName(2)
    except (TTLibError, OSError, AssertionError, KeyError):
        return None
    return FontFile(family or path.stem, style or "Regular", str(path))


def _cache_path(files: list[Path]) -> Path:
    key = hashlib.sha256("\n".join(f"{f}:{f.stat().st_size}" for f in files).encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "vlmslice" / f"fonts-{key}.json"


def find_fonts(directories: Iterable[str | Path]) -> list[FontFile]:
    """Fonts with all of `CHARACTERS` under `directories`, sorted by path; the reading is cached per user."""
    files = sorted(
        {f for d in directories for suffix in ("ttf", "otf") for f in Path(d).rglob(f"*.{suffix}")}
    )
    return [font for font in _read_font_files(files) if font.family not in _UNSUITABLE_FAMILIES]


def _read_font_files(files: list[Path]) -> list[FontFile]:
    cache = _cache_path(files)
    if cache.exists():
        return [FontFile(**entry) for entry in json.loads(cache.read_text())]
    fonts = [font for font in map(_read_font_file, files) if font]
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps([vars(font) for font in fonts]))
    partial.replace(cache)
    return fonts


class FontLibrary:
    """Fonts by family; draws pick a family first, so that a family of 40 cuts does not outweigh one of 2.

    Args:
        split: "train" (families that are not held out) or "eval" (held-out families only).
        directories: where to look; default are the system's font folders and matplotlib's own fonts.

    Raises:
        FileNotFoundError: no font of the split is on this machine.
    """

    def __init__(self, split: str = "train", directories: Iterable[str | Path] | None = None):
        if directories is None:
            own = matplotlib_font_dir()
            directories = [*SYSTEM_FONT_DIRS, *([own] if own else [])]
        directories = [Path(d) for d in directories]
        wanted = {"train": False, "eval": True}[split]
        families: dict[str, list[FontFile]] = {}
        for font in find_fonts(directories):
            if (font.family in HELD_OUT_FAMILIES) == wanted:
                families.setdefault(font.family, []).append(font)
        if not families:
            raise FileNotFoundError(
                f"no font family for split {split!r} under {', '.join(map(str, directories))}; "
                "install some, for example Debian's fonts-liberation and fonts-dejavu, or `pip install matplotlib`"
            )
        self.split = split
        self.families = {name: families[name] for name in sorted(families)}
        self._names = list(self.families)

    def __len__(self) -> int:
        return sum(map(len, self.families.values()))

    def draw_monospaced(self, rng, size: int) -> ImageFont.FreeTypeFont:
        """As `draw`, from the families whose name says that all characters are of one width, if there are any."""
        names = [name for name in self._names if _MONOSPACED.search(name)] or self._names
        return load_font(rng.choice(self.families[rng.choice(names)]).path, size)

    def draw(self, rng, size: int) -> ImageFont.FreeTypeFont:
        """A font of `size` px per em, its family drawn first. `rng` is a `random.Random`."""
        return load_font(rng.choice(self.families[rng.choice(self._names)]).path, size)


@lru_cache(maxsize=256)  # an open font holds up to a megabyte
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=100_000)
def can_draw(path: str, character: str) -> bool:
    """Whether a font file draws a character as itself; some list characters for which they draw an empty box."""
    font = load_font(path, 24)
    drawn, missing = font.getmask(character), font.getmask("\U0010ffff")
    return drawn.getbbox() is not None and (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))


def spell(text: str, font: ImageFont.FreeTypeFont) -> str:
    """`text` with accented letters that `font` lacks replaced by their base letters ("é" -> "e")."""
    if text.isascii():
        return text
    path = str(font.path)
    return "".join(
        c if c.isascii() or can_draw(path, c) else unicodedata.normalize("NFD", c.replace("ø", "o"))[0]
        for c in text
    )
