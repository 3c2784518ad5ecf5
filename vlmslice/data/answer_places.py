"""Where the words of an answer stand on the picture, for the guide loss.

A renderer that writes with a `Pen` lists the words it wrote. What an answer quotes of them (a line, a cell of a table,
a field of a JSON record) is found again by whole words, so that the language model can be shown where each of its
characters comes from, whatever the task.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from vlmslice.data.samples import Place
from vlmslice.data.scenes import Scene

_MARKUP = re.compile(r'<[^<>]*>|["{}\[\],:;\n]|->')
"""What stands between the quoted pieces of JSON, CSV, HTML and lists of arrows."""

_Word = tuple[str, list[Place]]
"""Characters of a written word, and the centre of each."""

_Span = tuple[int, int]
"""First character, and the one after the last."""


def locate_answer(answer: str, scene: Scene) -> list[list[Place]]:
    """`TaskSample.places` of an answer: for each of its characters the point where it is written, if that is known.

    Lines are looked for first, then what stands between markup, then single words. What is written in several places
    is taken where it follows the words found before, and else left out: which of them is meant is the question.

    Returns:
        One list a character, of one point or none; an empty list where nothing was found.
    """
    written = _written_words(scene)
    if not written:
        return []
    places: list[list[Place]] = [[] for _ in answer]
    # An answer that quotes most of what is written begins with its first word.
    after = 0 if 2 * len(answer.split()) > len(written) else -1
    for start, end in _pieces(answer):
        if any(places[start:end]):
            continue
        words = [(m.group(), start + m.start()) for m in re.finditer(r"\S+", answer[start:end])]
        first = _find([word for word, _ in words], written, after)
        if first is None:
            continue
        for (word, offset), (_, centers) in zip(words, written[first:], strict=False):
            for i in range(len(word)):
                places[offset + i] = [centers[i]]
        after = first + len(words)
    return places if any(places) else []


def _pieces(answer: str) -> Iterator[_Span]:
    """The lines of an answer, each followed by its parts and their words."""
    for line in _between(re.compile("\n"), answer, (0, len(answer))):
        yield line
        for part in _between(_MARKUP, answer, line):
            yield part
            yield from _between(re.compile(r"\s+"), answer, part)


def _between(separator: re.Pattern[str], text: str, span: _Span) -> list[_Span]:
    """The parts of a span that are not separators nor blank."""
    start, spans = span[0], []
    for match in separator.finditer(text, *span):
        spans.append((start, match.start()))
        start = match.end()
    spans.append((start, span[1]))
    return [(a, b) for a, b in spans if text[a:b].strip()]


def _written_words(scene: Scene) -> list[_Word]:
    """The words of the scene in the order of writing. Glyphs that belong to none, of turned text, are passed over."""
    characters = "".join(glyph.character for glyph in scene.glyphs)
    words, end = [], 0
    for region in scene.regions:
        text = "".join(region.text.split())
        if region.kind != "word" or not text:
            continue
        start = characters.find(text, end)
        if start < 0:
            continue
        end = start + len(text)
        words.append((text, [glyph.center for glyph in scene.glyphs[start:end]]))
    return words


def _find(words: list[str], written: list[_Word], after: int) -> int | None:
    """Where `words` stand among those written: at `after`, or else in the only place there is."""
    found = [
        i
        for i in range(len(written) - len(words) + 1)
        if all(written[i + j][0] == word for j, word in enumerate(words))
    ]
    if after in found:
        return after
    return found[0] if len(found) == 1 else None
