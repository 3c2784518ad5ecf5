"""Contact sheets of rendered and real samples, with question, answer and the dense truth, and what each task costs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlmslice.data.fonts import FontLibrary, load_font, matplotlib_font_dir
from vlmslice.data.real_data import RealDataset
from vlmslice.data.samples import TaskConfig, TaskSample
from vlmslice.data.scenes import Scene
from vlmslice.data.tasks import TASKS, Curriculum, TaskDataset
from vlmslice.errors import VlmSliceError, suggestion

_GAP, _LINE, _MOST_LINES = 10, 15, 7
_INK, _ANSWER, _PAPER, _FRAME = (30, 30, 30), (0, 90, 170), (250, 250, 250), (190, 190, 190)
_BOX_COLORS = {"glyph": (230, 60, 60), "shape": (230, 60, 60), "word": (40, 150, 60), "line": (50, 90, 220)}
_OTHER_BOX = (170, 60, 190)


class UnknownTaskError(VlmSliceError, ValueError):
    """There is no rendered task of this name."""


def check_tasks(names: Sequence[str]) -> None:
    """Raises `UnknownTaskError` for the first name that is not in `TASKS`."""
    for name in names:
        if name not in TASKS:
            raise UnknownTaskError(
                f"there is no task {name!r}; expected one of {', '.join(TASKS)}{suggestion(name, TASKS)}"
            )


def draw_samples(
    task: str, num_samples: int, config: TaskConfig, fonts: FontLibrary, seed: int = 0
) -> Iterator[TaskSample]:
    """The first samples of a task, as `TaskDataset` gives them to training for the same seed."""
    check_tasks([task])
    dataset = TaskDataset(
        [Curriculum(num_samples, config, {task: 1.0})], fonts, seed, group=1, name=f"preview-{task}"
    )
    return (dataset[i] for i in range(num_samples))


def draw_real_samples(
    name: str, num_samples: int, data_root: Path, split: str = "train", seed: int = 0
) -> Iterator[TaskSample]:
    """The first samples of a real set of `RealDataset`, shuffled; all of them if there are fewer."""
    from vlmslice.data.mixture import ShuffledDataset  # loads torch

    dataset = ShuffledDataset(RealDataset(data_root, [name], split, seed), seed)
    return (dataset[i] for i in range(min(num_samples, len(dataset))))


def contact_sheet(
    samples: Sequence[TaskSample], columns: int = 4, tile: int = 320, boxes: bool = False
) -> Image.Image:
    """Samples side by side, each scaled to fit `tile` px and over its task, question and answer.

    Args:
        samples: one or more.
        columns: tiles in a row.
        tile: largest width and height of a picture on the sheet, px.
        boxes: draw the dense truth over each picture: glyphs and shapes red, words green, lines blue, other regions
            violet.
    """
    # Pillow's own font lacks accented letters.
    carried = matplotlib_font_dir()
    font = load_font(str(carried / "DejaVuSans.ttf"), 12) if carried else ImageFont.load_default(12)
    tiles = [_tile(sample, tile, boxes, font) for sample in samples]
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    width = columns * tile + (columns + 1) * _GAP
    sheet = Image.new("RGB", (width, sum(max(t.height for t in row) + _GAP for row in rows) + _GAP), _PAPER)
    top = _GAP
    for row in rows:
        for i, picture in enumerate(row):
            sheet.paste(picture, (_GAP + i * (tile + _GAP), top))
        top += max(t.height for t in row) + _GAP
    return sheet


def _tile(
    sample: TaskSample, side: int, boxes: bool, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> Image.Image:
    image = sample.scene.image
    scale = min(side / image.width, side / image.height, 2.0)
    if boxes:
        image = with_boxes(sample.scene)
    picture = image.resize(
        (max(1, round(scale * image.width)), max(1, round(scale * image.height))), Image.Resampling.LANCZOS
    )
    caption = [(line, _INK) for line in _broken(f"{sample.task}: {sample.question}", font, side)]
    answer = [line for part in sample.answer.split("\n") for line in _broken(part, font, side)]
    caption += [(line, _ANSWER) for line in answer[:_MOST_LINES]]
    if len(answer) > _MOST_LINES:
        caption[-1] = (f"... {len(answer) - _MOST_LINES + 1} more lines", _ANSWER)
    tile = Image.new("RGB", (side, picture.height + 4 + _LINE * len(caption)), _PAPER)
    tile.paste(picture, (0, 0))
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, picture.width - 1, picture.height - 1), outline=_FRAME)
    for i, (line, color) in enumerate(caption):
        draw.text((0, picture.height + 2 + i * _LINE), line, font=font, fill=color)
    return tile


def _broken(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """`text` in pieces no wider than `width` px."""
    lines = [""]
    for character in text:
        if font.getlength(lines[-1] + character) > width:
            whole, space, word = lines[-1].rpartition(" ")
            lines[-1:] = [whole, word] if space and character != " " else [lines[-1], ""]
        lines[-1] += character
    return lines


def with_boxes(scene: Scene) -> Image.Image:
    """The picture with every box of its dense truth drawn over it."""
    image = scene.image.copy()
    draw = ImageDraw.Draw(image)
    width = max(1, round(max(image.size) / 700))
    named = [(region.kind, region.box) for region in scene.regions]
    named += [("glyph", glyph.box) for glyph in scene.glyphs] + [
        ("shape", shape.box) for shape in scene.shapes
    ]
    for kind, (top, left, bottom, right) in named:
        draw.rectangle((left, top, right, bottom), outline=_BOX_COLORS.get(kind, _OTHER_BOX), width=width)
    return image


def measure_speed(
    task: str, config: TaskConfig, fonts: FontLibrary, num_samples: int = 40, seed: int = 0
) -> tuple[float, float]:
    """Samples per second of CPU time on one core, and mean megapixels, after some samples that load the fonts."""
    for _ in draw_samples(task, max(2, num_samples // 4), config, fonts, seed + 1):
        pass
    start = time.process_time()
    sizes = [
        s.scene.image.width * s.scene.image.height
        for s in draw_samples(task, num_samples, config, fonts, seed)
    ]
    return len(sizes) / (time.process_time() - start), sum(sizes) / len(sizes) / 1e6
