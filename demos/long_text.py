"""Render a long text as an image, and ask about it.

A picture costs as many visual tokens as it has room for, however many words stand on it; a text costs tokens by the
word. The demo tells both numbers, and what was read.
"""

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from vlmslice import Assistant
from vlmslice.answer_sheet import draw_answer_sheet
from vlmslice.demonstration import (
    ModelOption,
    PictureOption,
    SeedOption,
    check_picture,
    hand_over,
    load_assistant,
    render_text,
    run_demo,
)
from vlmslice.marking import Marked, mark_text


def questions(lines: list[str]) -> list[tuple[str, str]]:
    """Questions about lines of text, as training asks them, with their answers."""
    middle = len(lines) // 2
    asked = [("Transcribe the text line by line.", "\n".join(lines)), ("Read the first line.", lines[0])]
    if len(lines) > 2:
        asked += [
            (f"Read line {middle + 1}.", lines[middle]),
            ("Read the last line.", lines[-1]),
        ]
    return asked


def show(
    assistant: Assistant, image: Image.Image, asked: list[tuple[str, str]]
) -> tuple[list[tuple[str, Marked]], int, Image.Image]:
    """Each question with its marked answer, the visual tokens of the image, and the picture of all."""
    answers = [assistant.ask([image], question) for question, _ in asked]
    marked = [
        (question, mark_text(answer.text, truth))
        for (question, truth), answer in zip(asked, answers, strict=True)
    ]
    return marked, answers[0].num_visual_tokens, draw_answer_sheet(image, marked)


def main(
    text: Annotated[
        Path | None,
        typer.Argument(metavar="[TEXT]", help="A text file.  [default: sentences of random words]"),
    ] = None,
    seed: SeedOption = 3,
    font_px: Annotated[int, typer.Option(min=8, max=90, help="Font size, px per em.")] = 22,
    width: Annotated[int, typer.Option(min=100, max=4000, help="Of the image, px.")] = 620,
    picture: PictureOption = Path("demo-output/long_text.png"),
    model: ModelOption = None,
) -> None:
    """Render a long text as an image, and ask about it.

    - `python demos/long_text.py`
    - `python demos/long_text.py notes.txt --font-px 18 --width 900`
    """
    check_picture(picture)
    image, lines = render_text(text, font_px, width, seed)
    assistant = load_assistant(model)
    answers, num_visual_tokens, drawn = show(assistant, image, questions(lines))
    for question, marked in answers:
        print(question)
        for row in marked.rows:
            print(f"  {row[0].mark.value:<7}{row[0].text}")
        print(f"  {marked.summary}")
    num_text_tokens = len(assistant.processor.tokenizer("\n".join(lines)).input_ids)
    print(f"{num_visual_tokens} visual tokens for {num_text_tokens} tokens of text")
    hand_over(drawn, picture)


if __name__ == "__main__":
    run_demo(main)
