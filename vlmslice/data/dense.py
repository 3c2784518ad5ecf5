"""Dense truth on the patch grid: a label for every cell of 8 px, and crops full of text and shapes to learn it from.

A small ViT taught with one label per cell reads within minutes, where the language loss alone shows nothing after
tens of thousands of pictures. The labels of a cell say what covers its centre: the character, the kind and the colour
of the shape, and whether a shape's own centre lies in the cell. One label more spells: `glyph` lists the characters
whose centres lie in a patch, in reading order, so that every character of a line is found in one patch and only there.
"""

from __future__ import annotations

import math
import random
import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from vlmslice.data.fonts import CHARACTERS, FontLibrary
from vlmslice.data.scenes import (
    Scene,
    add_camera_effects,
    approximate_length,
    draw_line,
    ink_and_paper,
    paper_image,
    sample_rng,
)
from vlmslice.data.shapes import COLORS, KINDS, draw_shape, scatter_shapes, vary, visible_colors
from vlmslice.data.text import random_words
from vlmslice.view_packing import split_into_patches

CELLS_PER_SIDE = 2
"""Cells along one side of a patch: patches of 16 px give cells of 8 px."""

HEADS = {
    "character": 1 + len(CHARACTERS),  # 0: none
    "kind": 1 + len(KINDS),
    "color": 1 + len(COLORS),
    "center": 2,
    "glyph": 1 + len(CHARACTERS),
}
"""Name and number of classes of each label of a cell; of `glyph`, the k-th cell is the k-th character of the patch."""

UNKNOWN = -100
"""Label of a cell of which nobody knows what is there."""

_CHARACTER_LABEL = {c: i + 1 for i, c in enumerate(CHARACTERS)}
_KIND_LABEL = {k: i + 1 for i, k in enumerate(KINDS)}
_COLOR_LABEL = {c: i + 1 for i, c in enumerate(COLORS)}


@cache
def _character_label(character: str) -> int:
    """Accented letters count as their base letter; 0 for what has none among `CHARACTERS`."""
    return _CHARACTER_LABEL.get(unicodedata.normalize("NFD", character)[0], 0)


def _cell_range(low: float, high: float, cell: float, count: int) -> slice:
    """Cells whose centres lie in [low, high)."""
    return slice(max(0, math.ceil(low / cell - 0.5)), max(0, min(count, math.ceil(high / cell - 0.5))))


def label_cells(
    scene: Scene, box: tuple[float, float, float, float], patch_grid: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Labels of a view of `scene`.

    Args:
        scene: picture and boxes.
        box: the view's box in the picture (top, left, bottom, right), as in `View.box`.
        patch_grid: patches (height, width) that the box is resized to.

    Returns:
        For each name in `HEADS` an `int64[patches, CELLS_PER_SIDE**2]`, patches and cells row-major. A patch that
        holds the centres of more characters than it has cells names the first of them in `glyph`. All `UNKNOWN` where
        the scene is not listed.
    """
    if not scene.is_listed:
        unknown = np.full((patch_grid[0] * patch_grid[1], CELLS_PER_SIDE**2), UNKNOWN, dtype=np.int64)
        return dict.fromkeys(HEADS, unknown)
    rows, cols = patch_grid[0] * CELLS_PER_SIDE, patch_grid[1] * CELLS_PER_SIDE
    top, left, bottom, right = box
    cell_h, cell_w = (bottom - top) / rows, (right - left) / cols
    planes = {name: np.zeros((rows, cols), dtype=np.int64) for name in HEADS if name != "glyph"}
    for shape in scene.shapes:
        window = (
            _cell_range(shape.box[0] - top, shape.box[2] - top, cell_h, rows),
            _cell_range(shape.box[1] - left, shape.box[3] - left, cell_w, cols),
        )
        planes["kind"][window] = _KIND_LABEL[shape.kind]
        planes["color"][window] = _COLOR_LABEL[shape.color]
    for shape in scene.shapes:
        y, x = shape.center
        row, col = math.floor((y - top) / cell_h), math.floor((x - left) / cell_w)
        if 0 <= row < rows and 0 <= col < cols:
            planes["center"][row, col] = 1
    for glyph in scene.glyphs:
        window = (
            _cell_range(glyph.box[0] - top, glyph.box[2] - top, cell_h, rows),
            _cell_range(glyph.box[1] - left, glyph.box[3] - left, cell_w, cols),
        )
        planes["character"][window] = _character_label(glyph.character)
    c = CELLS_PER_SIDE
    labels = {
        name: plane.reshape(patch_grid[0], c, patch_grid[1], c).swapaxes(1, 2).reshape(-1, c * c)
        for name, plane in planes.items()
    }
    return labels | {"glyph": _spell_patches(scene, box, patch_grid)}


def _spell_patches(
    scene: Scene, box: tuple[float, float, float, float], patch_grid: tuple[int, int]
) -> np.ndarray:
    """Labels of the first characters whose centres lie in each patch: `int64[patches, CELLS_PER_SIDE**2]`."""
    top, left, bottom, right = box
    spelt: list[list[int]] = [[] for _ in range(patch_grid[0] * patch_grid[1])]
    for glyph in scene.glyphs:
        y, x = glyph.center
        if top <= y < bottom and left <= x < right:
            row = int((y - top) / (bottom - top) * patch_grid[0])
            col = int((x - left) / (right - left) * patch_grid[1])
            spelt[row * patch_grid[1] + col].append(_character_label(glyph.character))
    labels = np.zeros((len(spelt), CELLS_PER_SIDE**2), dtype=np.int64)
    for patch, characters in enumerate(spelt):
        characters = characters[: labels.shape[1]]
        labels[patch, : len(characters)] = characters
    return labels


def text_crop(
    rng: random.Random, fonts: FontLibrary, height: int, width: int, split: str = "train", easy: bool = False
) -> Scene:
    """A crop out of a page: lines of several fonts and sizes that run past the edges.

    `easy` draws black on white, 14-30 px, without zoom or camera effects: the first thing to learn to read.
    """
    zoom = rng.uniform(1.0, 2.2) if rng.random() < 0.4 and not easy else 1.0
    full_h, full_w = round(height * zoom), round(width * zoom)
    ink, paper = ((0, 0, 0), (255, 255, 255)) if easy else ink_and_paper(rng)
    image = paper_image(rng, full_h, full_w, paper)
    draw = ImageDraw.Draw(image)
    scene = Scene(image)
    y = -rng.uniform(0, 20 * zoom)
    font = None
    while y < full_h:
        if font is None or rng.random() < 0.35:
            size = rng.randint(14, 30) if easy else round(zoom * 10 * (7.5 ** (rng.random() ** 1.5)))
            font = fonts.draw(rng, size)
        ascent, descent = font.getmetrics()
        x = rng.uniform(-60, 30) * zoom
        line = random_words(rng, 1, split)
        while x + approximate_length(font, line) < full_w and len(line) < 60:
            line += " " + random_words(rng, 1, split)
        scene.glyphs += draw_line(draw, line, font, y, x, ink)
        y += (ascent + descent) * rng.uniform(0.95, 1.5) + (rng.uniform(0, 60) if rng.random() < 0.15 else 0)
    if zoom != 1.0:
        scene = resize_scene(scene, height, width)
    if not easy:
        scene.image = add_camera_effects(rng, scene.image)
    return scene


def shape_crop(rng: random.Random, height: int, width: int) -> Scene:
    """Shapes of all kinds and colours on one ground; some run past the edges, as at the seam of two slices."""
    _, paper = ink_and_paper(rng)
    image = paper_image(rng, height, width, paper)
    colors = visible_colors(paper)
    largest = min(height, width) / 2 - 2
    low = 5.0 * (largest / 5.0) ** (rng.random() * 0.8)
    radii = (low, min(largest, low * rng.uniform(1.05, 2.0)))
    shapes = []
    for _ in range(rng.randint(0, 3)):
        y, x = rng.choice([0, height]) + rng.uniform(-low, low), rng.uniform(0, width)
        if rng.random() < 0.5:
            y, x = rng.uniform(0, height), rng.choice([0, width]) + rng.uniform(-low, low)
        color = rng.choice(colors)
        shapes.append(
            draw_shape(image, rng.choice(KINDS), color, (y, x), rng.uniform(*radii), vary(rng, COLORS[color]))
        )
    wanted = [(rng.choice(KINDS), rng.choice(colors)) for _ in range(rng.randint(1, 14))]
    inside = scatter_shapes(rng, image, wanted, radii, max_tries=20)
    shapes = [s for s in shapes if not any(_overlap(s.box, t.box) for t in inside)] + inside
    return Scene(add_camera_effects(rng, image), shapes=shapes)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def resize_scene(scene: Scene, height: int, width: int) -> Scene:
    """The same scene at another size, boxes included."""
    sy, sx = height / scene.image.height, width / scene.image.width
    image = scene.image.resize((width, height), Image.Resampling.BICUBIC)
    return scene.moved(image, lambda boxes: boxes * np.array([sy, sx, sy, sx]))


@dataclass(frozen=True)
class DenseCropConfig:
    seed: int = 0
    num_samples: int = 1_000_000
    group: int = 32
    """Consecutive samples that share a patch grid, so that a batch of them needs no padding."""
    patch_size: int = 16
    min_side: int = 4
    max_side: int = 14
    max_patches: int = 100
    text_share: float = 0.75
    easy_samples: int = 120_000
    """Samples over which the share of easy text falls from 1 to `least_easy`: reading starts on it much sooner."""
    least_easy: float = 0.25
    split: str = "train"


class DenseCropDataset(Dataset):
    """Single views with cell labels; sample i of a seed is always the same.

    A sample is `{"pixels": uint8[H, W, 3], "labels": {name: int64[patches, cells]}}`.
    """

    def __init__(self, config: DenseCropConfig, fonts: FontLibrary):
        self.config = config
        self.fonts = fonts

    def __len__(self) -> int:
        return self.config.num_samples

    def __getitem__(self, index: int) -> dict:
        config = self.config
        shape_rng = sample_rng(config.seed, "crop-grid", index // config.group)
        sides = range(config.min_side, config.max_side + 1, 2)
        grids = [
            (h, w) for h in sides for w in sides if config.max_patches // 2 <= h * w <= config.max_patches
        ]
        grid = shape_rng.choice(grids)
        height, width = grid[0] * config.patch_size, grid[1] * config.patch_size
        rng = sample_rng(config.seed, "crop", index)
        easy = rng.random() < max(config.least_easy, 1 - index / config.easy_samples)
        if rng.random() < config.text_share:
            scene = text_crop(rng, self.fonts, height, width, config.split, easy)
        else:
            scene = shape_crop(rng, height, width)
        return {"pixels": np.array(scene.image), "labels": label_cells(scene, (0, 0, height, width), grid)}


def collate_crops(samples: list[dict], patch_size: int = 16) -> dict[str, torch.Tensor]:
    """Stacks crops of one size into encoder inputs (`pixel_values`, `target_sizes`) and `label_NAME`s."""
    patches = torch.stack([split_into_patches(torch.from_numpy(s["pixels"]), patch_size) for s in samples])
    height, width, _ = samples[0]["pixels"].shape
    batch = {
        "pixel_values": patches.float() / 127.5 - 1,
        "target_sizes": torch.tensor([[height // patch_size, width // patch_size]] * len(samples)),
    }
    for name in HEADS:
        batch[f"label_{name}"] = torch.from_numpy(np.stack([s["labels"][name] for s in samples]))
    return batch
