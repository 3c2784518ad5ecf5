"""Drag the size or drop an image, and see every policy's slices and tokens.

With `--picture`, the same as a picture, without a browser.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmslice.command_line import read_size
from vlmslice.demonstration import ModelOption, check_picture, hand_over, run_demo
from vlmslice.errors import VlmSliceError
from vlmslice.image_loading import ImageError, load_image
from vlmslice.model_files import read_slicing_config
from vlmslice.page.server import import_gradio
from vlmslice.policy_sheet import draw_policy_sheet
from vlmslice.slicing import SlicingConfig

LONGEST = 4096
"""Side, in px, at the end of the sliders; a larger image makes them longer."""


def main(
    source: Annotated[
        str,
        typer.Argument(metavar="[WIDTHxHEIGHT|IMAGE]", help="A size such as 1920x1080, or an image file."),
    ] = "1280x720",
    picture: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw the sheet to this file, without a browser.")
    ] = None,
    max_visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most visual tokens of an image.  [default: the model's]")
    ] = None,
    port: Annotated[int, typer.Option(help="Of the page.")] = 7861,
    model: ModelOption = None,
) -> None:
    """Drag the size or drop an image, and see every policy's slices and tokens.

    - `python demos/slicing_explorer.py`: the page, at http://127.0.0.1:7861
    - `python demos/slicing_explorer.py 4000x100 --picture sheet.png`
    - `python demos/slicing_explorer.py photo.jpg --picture sheet.png --max-visual-tokens 1024`

    The page needs what `vlmslice demo` needs; `--picture` does not.
    """
    fields = read_slicing_config(model).to_dict()
    if max_visual_tokens is not None:
        fields["max_visual_tokens"] = max_visual_tokens
    config = SlicingConfig.from_dict(fields)
    height, width = read_size(source)
    if picture is None:
        build_page(config, height, width).launch(server_port=port)
        return
    check_picture(picture)
    image = load_image(source) if Path(source).is_file() else None
    hand_over(draw_policy_sheet(height, width, config, image), picture)


def build_page(config: SlicingConfig, height: int, width: int) -> Any:
    """The page, a `gradio.Blocks`: sliders for the size and the bound, a place for an image, and the sheet."""
    gradio = import_gradio()

    def draw(high: int, wide: int, bound: int, path: str | None) -> Any:
        fields = config.to_dict() | {"max_visual_tokens": int(bound)}
        try:
            image = load_image(path) if path else None
            return draw_policy_sheet(int(high), int(wide), SlicingConfig.from_dict(fields), image)
        except VlmSliceError as error:
            raise gradio.Error(str(error)) from error

    def take_size(path: str | None, high: int, wide: int) -> list[Any]:
        try:
            size = read_size(path) if path else (int(high), int(wide))
        except ImageError as error:
            raise gradio.Error(str(error)) from error
        return [gradio.Slider(value=side, maximum=max(side, LONGEST)) for side in size]

    with gradio.Blocks(title="Slicing explorer") as page:
        gradio.Markdown("## Slicing explorer\nDrag the size or drop an image: every policy, side by side.")
        with gradio.Row():
            with gradio.Column(scale=3):
                wide = gradio.Slider(16, LONGEST, value=width, step=1, label="width, px")
                high = gradio.Slider(16, LONGEST, value=height, step=1, label="height, px")
                bound = gradio.Slider(
                    64, 8192, value=config.max_visual_tokens, step=1, label="most visual tokens"
                )
            image = gradio.Image(type="filepath", label="or an image", scale=1, height=210)
        sheet = gradio.Image(
            value=draw_policy_sheet(height, width, config),
            show_label=False,
            format="png",
            interactive=False,
        )
        image.change(take_size, [image, high, wide], [high, wide])
        inputs: list[Any] = [high, wide, bound, image]
        for control in inputs:
            control.change(draw, inputs, sheet, show_progress="hidden", trigger_mode="always_last")
    return page


if __name__ == "__main__":
    run_demo(main)
