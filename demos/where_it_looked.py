"""Show where the model looked for each word of its answer: the attention of its connector, drawn on the image."""

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from vlmslice import Assistant
from vlmslice.attention_drawing import draw_attention, draw_frames
from vlmslice.attention_map import AttentionMap, attend
from vlmslice.demonstration import ModelOption, check_picture, hand_over, load_assistant, run_demo
from vlmslice.image_loading import load_image

RECEIPT_LINE = Path(__file__).parent / "images" / "receipt_line.png"
QUESTION = "What is written in the image?"


def show(
    assistant: Assistant, image: Image.Image, question: str, by: str = "word", all_heads: bool = False
) -> tuple[AttentionMap, Image.Image]:
    """Where the model looked, and the picture of it."""
    attention = attend(assistant, image, question, heads=None if all_heads else (0,))
    return attention, draw_attention(image, attention, by)


def main(
    image: Annotated[Path, typer.Argument(metavar="[IMAGE]", help="An image file.")] = RECEIPT_LINE,
    question: Annotated[str, typer.Argument(metavar="[QUESTION]", help="What to ask.")] = QUESTION,
    by: Annotated[str, typer.Option(help="`word` or `character`: what each small picture is for.")] = "word",
    all_heads: Annotated[
        bool,
        typer.Option("--all-heads", help="The mean of all heads, not the first, which is taught to look."),
    ] = False,
    picture: Annotated[
        Path, typer.Option(metavar="OUT", help="A sheet; as .gif or .webp, it shows part after part.")
    ] = Path("demo-output/where_it_looked.png"),
    model: ModelOption = None,
) -> None:
    """Show where the model looked for each word of its answer.

    - `python demos/where_it_looked.py`
    - `python demos/where_it_looked.py demos/images/shapes.png "How many red shapes are there?"`
    - `python demos/where_it_looked.py receipt.jpg "What is the total?" --by character --picture looked.gif`
    """
    check_picture(picture)
    loaded = load_image(image)
    attention, drawn = show(load_assistant(model), loaded, question, by, all_heads)
    print(attention.answer)
    for part in attention.parts(by):
        top, left, bottom, right = attention.boxes[part.weights.argmax()]
        print(
            f"{part.label}: {part.weights.sum():.0%} of its attention on the image, the most round "
            f"({(top + bottom) / 2:.0f}, {(left + right) / 2:.0f}) (y, x)"
        )
    if picture.suffix.lower() in (".gif", ".webp"):
        hand_over(draw_frames(loaded, attention, by), picture)
    else:
        hand_over(drawn, picture)


if __name__ == "__main__":
    run_demo(main)
