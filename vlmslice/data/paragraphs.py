"""Running text: paragraphs, pages with columns, and questions about one line or one place of a picture."""

from __future__ import annotations

import random

from vlmslice.data.fonts import FontLibrary, load_font, spell
from vlmslice.data.photo_effects import photograph
from vlmslice.data.phrases import Phrases
from vlmslice.data.samples import READ_QUESTIONS, TaskConfig, TaskSample, ask_several, find_places, font_size
from vlmslice.data.scenes import Scene, approximate_length, ink_and_paper, paper_image
from vlmslice.data.typesetting import Pen, cut, fill_lines, line_height

PARAGRAPH_QUESTIONS = (
    *READ_QUESTIONS,
    "Read all the text.",
    "Transcribe the text line by line.",
    "What is written here?",
    "Read the paragraph.",
    "Write down every line of text.",
)

PAGE_QUESTIONS = (
    *READ_QUESTIONS,
    "Read the page.",
    "Transcribe the page, column by column.",
    "Read all the text, from the left column to the right.",
    "What is written on this page?",
)

PLACES = {
    (0, 0): "top left", (0, 1): "top centre", (0, 2): "top right",
    (1, 0): "middle left", (1, 1): "centre", (1, 2): "middle right",
    (2, 0): "bottom left", (2, 1): "bottom centre", (2, 2): "bottom right",
}  # fmt: skip

PLACE_QUESTIONS = (
    "What is written in the {}?",
    "Read the text in the {}.",
    "Which text is in the {}?",
    "What does it say in the {} of the picture?",
)

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def _blank_sheet(rng: random.Random, height: int, width: int) -> tuple[Scene, Pen]:
    ink, paper = ink_and_paper(rng)
    scene = Scene(paper_image(rng, height, width, paper))
    return scene, Pen(scene, ink)


def _draw_paragraph(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> tuple[Scene, list[str]]:
    """A block of lines somewhere on the picture, ragged or centred."""
    scene, pen = _blank_sheet(rng, height, width)
    phrases = Phrases(rng, config.split, config.accents)
    wanted = rng.randint(*config.num_lines)
    # Words of a dozen letters should fit on the line, and the lines on the picture.
    font = fonts.draw(rng, font_size(rng, config, max(10, min(height / (1.5 * wanted), width / 8))))
    step = line_height(font) * rng.uniform(1.0, 1.5)
    num_lines = max(1, min(wanted, int((0.94 * height - line_height(font)) / step) + 1))
    measure = 0.94 * width * (1.0 if rng.random() < 0.5 else rng.uniform(0.6, 1.0))
    lines = fill_lines(
        phrases.sentence, font, measure, num_lines, config.max_answer, rng.randint(10, config.max_characters)
    )
    block = max(approximate_length(font, line) for line in lines)
    tall = (len(lines) - 1) * step + line_height(font)
    top = rng.uniform(0, max(0.0, height - tall))
    left = rng.uniform(0, max(0.0, width - block - 2))
    centred = rng.random() < 0.15
    for i, line in enumerate(lines):
        if centred:
            pen.write_middle(line, font, top + i * step, left + block / 2)
        else:
            pen.write(line, font, top + i * step, left)
    return photograph(rng, scene, config.photo), lines


def read_paragraph(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> TaskSample:
    """Several lines of running text; the answer is the lines, joined by line breaks."""
    scene, lines = _draw_paragraph(rng, config, fonts, height, width)
    answer = "\n".join(lines)
    return TaskSample(
        "paragraph", scene, rng.choice(PARAGRAPH_QUESTIONS), answer, find_places(answer, scene.glyphs)
    )


def find_line(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> TaskSample:
    """Several lines of running text; the question asks for one of them, by number or by its neighbour."""
    scene, lines = _draw_paragraph(rng, config, fonts, height, width)
    return ask_several(rng, config, "line", scene, lambda: _ask_line(rng, lines))


def _ask_line(rng: random.Random, lines: list[str]) -> tuple[str, str]:
    i = rng.randrange(len(lines))
    asked = [f"Read line {i + 1}.", f"What does line {i + 1} say?"]
    if i < len(_ORDINALS):
        asked.append(f"Read the {_ORDINALS[i]} line.")
    if i == len(lines) - 1:
        asked += ["Read the last line.", "What is written in the last line?"]
    if i > 0 and lines.count(lines[i - 1]) == 1:
        asked += [f'Read the line after "{lines[i - 1]}".', f'What is written below "{lines[i - 1]}"?']
    if i < len(lines) - 1 and lines.count(lines[i + 1]) == 1:
        asked += [f'Read the line before "{lines[i + 1]}".', f'What is written above "{lines[i + 1]}"?']
    return rng.choice(asked), lines[i]


def read_place(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> TaskSample:
    """Short texts in some of nine places; the question asks for one by its place, or for the place of one."""
    scene, pen = _blank_sheet(rng, height, width)
    phrases = Phrases(rng, config.split, config.accents)
    font = fonts.draw(rng, font_size(rng, config, max(8, min(height / 5, width / 12))))
    places = rng.sample(sorted(PLACES), rng.randint(2, 6))
    texts: dict[tuple[int, int], str] = {}
    third, tall = 0.96 * width / 3, line_height(font)
    for place in places:
        texts[place] = cut(spell(phrases.entry(), font), font, 0.9 * third)
        long = approximate_length(font, texts[place])
        row, column = place
        # Text hugs the side that its place is named after.
        top = (0.02 * height, (height - tall) / 2, 0.98 * height - tall)[row]
        left = (0.02 * width, (width - long) / 2, 0.98 * width - long)[column]
        slack = max(0.0, 0.3 * (height / 3 - tall))
        top += rng.uniform(0, slack) * (1, 0, -1)[row]
        pen.write(texts[place], font, top, left)
    scene = photograph(rng, scene, config.photo)
    return ask_several(rng, config, "place", scene, lambda: _ask_place(rng, texts))


def _ask_place(rng: random.Random, texts: dict[tuple[int, int], str]) -> tuple[str, str]:
    asked = rng.choice(list(texts))
    if rng.random() < 0.2 and list(texts.values()).count(texts[asked]) == 1:
        return f'Where is "{texts[asked]}" written?', PLACES[asked]
    return rng.choice(PLACE_QUESTIONS).format(PLACES[asked]), texts[asked]


def read_page(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> TaskSample:
    """A page with a heading and one to three columns; asks for all of it, for one column or for the heading."""
    scene, pen = _blank_sheet(rng, height, width)
    phrases = Phrases(rng, config.split, config.accents)
    num_columns = rng.randint(1, 3 if width > height else 2)
    size = font_size(rng, config, max(9, min(height / 8, width / (8 * num_columns))))
    font = fonts.draw(rng, size)
    margin, gutter = 0.03 * width, max(0.035 * width, 1.2 * size)
    top, has_heading = 0.03 * height, rng.random() < 0.6
    heading = ""
    if has_heading:
        large = load_font(str(font.path), round(size * rng.uniform(1.2, 1.6)))
        heading = cut(spell(phrases.heading(rng.randint(1, 4)), large), large, width - 2 * margin)
        if rng.random() < 0.5:
            pen.write(heading, large, top, margin, kind="heading")
        else:
            pen.write_middle(heading, large, top, width / 2, kind="heading")
        top += 1.3 * line_height(large)
    measure = (width - 2 * margin - (num_columns - 1) * gutter) / num_columns
    step = line_height(font) * rng.uniform(1.0, 1.3)
    num_lines = max(1, min(config.num_lines[1], int((0.97 * height - top - line_height(font)) / step) + 1))
    budget = (config.max_answer - len(heading)) // num_columns - 1
    columns = []
    for i in range(num_columns):
        lines = fill_lines(phrases.sentence, font, measure, num_lines, budget, config.max_characters)
        left = margin + i * (measure + gutter)
        for j, line in enumerate(lines):
            pen.write(line, font, top + j * step, left)
        columns.append("\n".join(lines))
        if i and rng.random() < 0.3:
            x = left - gutter / 2
            pen.draw.line((x, top, x, top + len(lines) * step), fill=pen.ink, width=max(1, size // 16))
    scene = photograph(rng, scene, config.photo)
    whole = "\n".join(([heading] if has_heading else []) + columns)
    asked = [(question, whole) for question in PAGE_QUESTIONS]
    if has_heading:
        asked += [("What is the heading?", heading), ("Read the heading.", heading)]
    if num_columns > 1:
        names = {2: ("left", "right"), 3: ("left", "middle", "right")}[num_columns]
        i = rng.randrange(num_columns)
        asked += [(f"Read the {names[i]} column.", columns[i]), (f"Read column {i + 1}.", columns[i])]
    return ask_several(rng, config, "page", scene, lambda: rng.choice(asked))
