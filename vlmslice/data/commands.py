"""`vlmslice data`: look at rendered samples, measure what they cost, and keep evaluated images out of training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmslice.command_line import UserError, picture_paths, print_note, save_picture
from vlmslice.errors import suggestion

if TYPE_CHECKING:
    from vlmslice.data.fonts import FontLibrary
    from vlmslice.data.samples import TaskConfig

data_app = typer.Typer(
    name="data", rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]}
)


@data_app.callback(invoke_without_command=True)
def _data(context: typer.Context) -> None:
    """Look at rendered training samples, and measure what they cost.

    - `vlmslice data preview --task receipt --task plot -o sheet.png`
    - `vlmslice data speed`
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


_Split = Annotated[str, typer.Option(help="Fonts, words and chart styles: train or eval.")]
_Megapixels = Annotated[
    tuple[float, float], typer.Option(metavar="LOW HIGH", help="Smallest and largest area of a picture.")
]
_TaskNames = Annotated[
    list[str] | None, typer.Option("--task", metavar="NAME", help="Task; may be repeated.  [default: all]")
]


@data_app.command()
def preview(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="SHEET.png", help="Where the sheet goes.")
    ],
    task: _TaskNames = None,
    num: Annotated[int, typer.Option(min=1, help="Samples of each task.")] = 4,
    seed: Annotated[int, typer.Option(help="Sample i of a seed is always the same.")] = 0,
    boxes: Annotated[bool, typer.Option("--boxes", help="Draw the dense truth over the pictures.")] = False,
    tile: Annotated[int, typer.Option(min=64, help="Largest side of a picture on the sheet, px.")] = 320,
    megapixels: _Megapixels = (0.06, 0.4),
    max_count: Annotated[int, typer.Option(min=1, help="Most things to count.")] = 20,
    split: _Split = "train",
    data_root: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Draw from the real sets of this folder; --task then names some of them."
        ),
    ] = None,
) -> None:
    """Draw a contact sheet of samples with question and answer.

    - `vlmslice data preview --task receipt --task plot -o sheet.png`
    - `vlmslice data preview -o sheet.png --num 2 --boxes --split eval`
    - `vlmslice data preview --data-root DATA --task receipt-page -o sheet.png --boxes`
    """
    from vlmslice.data.preview import contact_sheet, draw_real_samples, draw_samples
    from vlmslice.data.real_data import FILES
    from vlmslice.data.tasks import TASKS

    [path] = picture_paths(output, 1)
    config, fonts = _data_config(split, megapixels, max_count)
    if data_root is None:
        streams = [draw_samples(name, num, config, fonts, seed) for name in task or TASKS]
    else:
        streams = [draw_real_samples(name, num, data_root, split, seed) for name in task or FILES]
    samples = [sample for stream in streams for sample in stream]
    save_picture(contact_sheet(samples, columns=min(4, len(samples)), tile=tile, boxes=boxes), path)
    print_note(f"{len(samples)} samples drawn to {path}")


@data_app.command()
def speed(
    task: _TaskNames = None,
    num: Annotated[int, typer.Option(min=1, help="Samples of each task.")] = 40,
    megapixels: _Megapixels = (0.06, 0.4),
    max_count: Annotated[int, typer.Option(min=1, help="Most things to count.")] = 20,
    split: _Split = "train",
) -> None:
    """Measure samples per second of each task on one core, in CPU time, once the fonts are loaded."""
    from vlmslice.data.preview import check_tasks, measure_speed
    from vlmslice.data.tasks import TASKS

    names = task or list(TASKS)
    check_tasks(names)
    config, fonts = _data_config(split, megapixels, max_count)
    print(f"{'task':<12}{'samples/s':>10}{'ms/sample':>11}{'megapixels':>12}")
    for name in names:
        rate, area = measure_speed(name, config, fonts, num)
        print(f"{name:<12}{rate:>10.0f}{1000 / rate:>11.1f}{area:>12.2f}", flush=True)


@data_app.command()
def overlap(
    data_root: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the real sets.")],
    alike: Annotated[
        float, typer.Option(min=0, max=1, help="Likeness from which a pair is listed; 1 is a copy.")
    ] = 0.97,
) -> None:
    """Look for images of the suite `dev` among those that may train; exit code 1 if there are any.

    - `vlmslice data overlap --data-root DATA`
    """
    from vlmslice.data.overlap import find_overlap

    found = find_overlap(data_root)
    print(f"{found.num_evaluated} images are evaluated on, {found.num_trained} may train")
    print(f"the same path or file on both sides: {len(found.same_files)}")
    for image in found.same_files:
        print(f"  {image}")
    pairs = [pair for pair in found.pairs if pair[2] >= alike]
    print(f"alike by {alike:g} or more: {len(pairs)}")
    for evaluated, trained, likeness in pairs:
        print(f"  {likeness:.3f}  {evaluated}  {trained}")
    if found.same_files:
        raise typer.Exit(1)


def _data_config(
    split: str, megapixels: tuple[float, float], max_count: int
) -> tuple[TaskConfig, FontLibrary]:
    """Difficulty and fonts as the options of `data` have them."""
    from vlmslice.data.fonts import FontLibrary
    from vlmslice.data.samples import TaskConfig

    if split not in ("train", "eval"):
        raise UserError(f"--split is {split!r}{suggestion(split, ('train', 'eval'))}; expected train or eval")
    if not 0 < megapixels[0] <= megapixels[1]:
        raise UserError(
            f"--megapixels is {megapixels[0]} {megapixels[1]}; expected 0 < LOW <= HIGH, as in 0.06 0.4"
        )
    try:
        fonts = FontLibrary(split)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    return TaskConfig(megapixels=megapixels, max_count=max_count, split=split), fonts
