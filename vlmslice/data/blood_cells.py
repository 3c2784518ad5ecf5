"""Blood under a microscope: red cells that overlap and are cut by the border, white cells, platelets, and stains."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image

from vlmslice.data.fonts import FontLibrary
from vlmslice.data.samples import Mention, Place, TaskConfig, TaskSample, Turn, reshape
from vlmslice.data.scenes import Color, Scene, Shape, add_camera_effects
from vlmslice.data.shapes import vary

QUESTIONS = (
    "How many {} are in the image?",
    "How many {} are there?",
    "How many {} do you see?",
    "Count the {}.",
    "What is the number of {} in the image?",
)

_APART = 17.0
"""Two middles in one patch of 16 px could not be pointed at one after the other."""
_LEAST_SHOWN = 0.35
"""Share of a cell's box that must lie on the picture for the cell to count."""


def count_blood_cells(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> TaskSample:
    """Up to `config.max_count` red cells, two white ones and four platelets; asked for in turn."""
    height, width = reshape(height, width, (0.75, 1.4))
    smear = _Smear(rng, height, width)
    red, white, platelets = smear.draw_red(config.max_count), smear.draw_white(), smear.draw_platelets()
    scene = Scene(add_camera_effects(rng, smear.picture()), shapes=[*red, *white, *platelets])
    turns = [
        _ask(rng, things, [cell.center for cell in cells])
        for things, cells in (
            ("red blood cells", red),
            ("white blood cells", white),
            ("platelets", platelets),
        )
    ]
    # Red cells are what there is to count; the others are asked for now and then.
    if rng.random() < 0.4:
        rng.shuffle(turns)
    return TaskSample.of_turns("cells", scene, turns[: rng.randint(1, config.max_questions)])


def _ask(rng: random.Random, things: str, centers: list[Place]) -> Turn:
    question = rng.choice(QUESTIONS).format(things)
    start = question.index(things)
    mention = Mention(start, start + len(things), centers)
    return Turn(question, str(len(centers)), points=centers, mentions=[mention])


class _Smear:
    """A picture being stained; light passes through all that lies on one another."""

    def __init__(self, rng: random.Random, height: int, width: int):
        self.rng, self.height, self.width = rng, height, width
        self.ground = vary(rng, (214, 216, 204), 16)
        generator = np.random.default_rng(rng.getrandbits(32))
        cells = rng.randint(2, 5)
        uneven = Image.fromarray(generator.integers(0, 26, (cells, cells), dtype=np.uint8))
        uneven = uneven.resize((width, height), Image.Resampling.BICUBIC)
        self.light = np.array(self.ground, dtype=np.float32) - np.asarray(uneven, dtype=np.float32)[..., None]
        self.radius = rng.uniform(0.075, 0.125) * min(height, width)
        self.taken: list[tuple[float, float, float]] = []

    def picture(self) -> Image.Image:
        return Image.fromarray(np.clip(self.light, 0, 255).astype(np.uint8))

    def stain(
        self,
        center: Place,
        axes: tuple[float, float],
        turn: float,
        color: Color,
        depth: float,
        pale: float = 0.0,
        soft: float = 0.06,
        covers: float = 0.0,
    ) -> None:
        """Adds an ellipse.

        Args:
            center: (y, x), px; may lie outside.
            axes: half the length of each axis, px.
            turn: of the first axis, radians.
            color: what is left of white light.
            depth: 0 for nothing, 1 for the whole colour.
            pale: share of the depth that its middle lacks.
            soft: width of its edge, in shares of its size.
            covers: 0 lets what lies below shine through, which darkens it; 1 hides it.
        """
        reach = max(axes) * (1 + 2 * soft) + 1
        top, bottom = max(0, int(center[0] - reach)), min(self.height, int(center[0] + reach) + 2)
        left, right = max(0, int(center[1] - reach)), min(self.width, int(center[1] + reach) + 2)
        if top >= bottom or left >= right:
            return
        y, x = (
            np.mgrid[top:bottom, left:right].astype(np.float32) - np.array(center, np.float32)[:, None, None]
        )
        along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
        distance = np.hypot(along / axes[0], across / axes[1])
        edge = max(soft, 0.7 / min(axes))
        share = depth * np.clip((1 + edge / 2 - distance) / edge, 0, 1)
        share *= 1 - pale * np.exp(-((distance / 0.5) ** 4))
        below = self.light[top:bottom, left:right]
        hue = np.array(color, dtype=np.float32)
        through = covers * hue + (1 - covers) * below * hue / np.array(self.ground, dtype=np.float32)
        below += share[..., None] * (through - below)

    def place(self, radius: float, near: float) -> Place | None:
        """Where a cell finds room; cells may overlap down to `near` of the sum of their radii."""
        for _ in range(60):
            y = self.rng.uniform(-0.4 * radius, self.height + 0.4 * radius)
            x = self.rng.uniform(-0.4 * radius, self.width + 0.4 * radius)
            if self._take(y, x, radius, near):
                return y, x
        return None

    def _take(self, y: float, x: float, radius: float, near: float) -> bool:
        """Puts a cell there unless another one is nearer than `near` of the sum of their radii."""
        has_room = all(math.hypot(y - v, x - u) >= max(near * (radius + r), _APART) for v, u, r in self.taken)
        if has_room:
            self.taken.append((y, x, radius))
        return has_room

    def draw_red(self, most: int) -> list[Shape]:
        """Red cells, alone, in heaps and in rolls; what is seen of those that count."""
        rng = self.rng
        color = vary(rng, (202, 150, 138), 16)
        heaped = rng.choice((1.0, 0.8, 0.6, 0.45))
        cells: list[Shape] = []
        for _ in range(rng.randint(0 if rng.random() < 0.1 else 2, max(2, most))):
            radius = self.radius * rng.uniform(0.85, 1.15)
            place = self._beside(radius) if self.taken and rng.random() < 1 - heaped else None
            place = place or self.place(radius, heaped)
            if place is None:
                continue
            axes = (radius * rng.uniform(1.0, 1.25), radius * rng.uniform(0.75, 1.0))
            turn = rng.uniform(0, math.pi)
            pale = rng.choice((0.0, rng.uniform(0.1, 0.4), rng.uniform(0.5, 0.95)))
            depth, soft, covers = rng.uniform(0.7, 1.0), rng.uniform(0.05, 0.14), rng.uniform(0.3, 0.9)
            self.stain(place, axes, turn, vary(rng, color, 7), depth, pale, soft, covers)
            if rng.random() < 0.2:  # a crack that the light is broken by
                spot = (place[0] + rng.gauss(0, 0.2) * radius, place[1] + rng.gauss(0, 0.2) * radius)
                self.stain(spot, (0.16 * radius, 0.1 * radius), turn, (130, 80, 90), 0.7, rng.random())
            cells += self._seen(place, radius, "red")
        return cells

    def _beside(self, radius: float) -> Place | None:
        """A place that overlaps a cell which is there already."""
        v, u, r = self.rng.choice(self.taken)
        for _ in range(12):
            angle, reach = self.rng.uniform(0, 2 * math.pi), self.rng.uniform(0.5, 0.95) * (radius + r)
            y, x = v + reach * math.sin(angle), u + reach * math.cos(angle)
            inside = (
                -0.3 * radius < y < self.height + 0.3 * radius
                and -0.3 * radius < x < self.width + 0.3 * radius
            )
            if inside and self._take(y, x, radius, 0.45):
                return y, x
        return None

    def draw_white(self) -> list[Shape]:
        """White cells: a large pale body and a dark nucleus, whole or in lobes."""
        rng = self.rng
        cells: list[Shape] = []
        for _ in range(rng.choices((0, 1, 2), (2, 6, 1))[0]):
            radius = self.radius * rng.uniform(1.1, 1.9)
            place = self.place(radius, 0.6)
            if place is None:
                continue
            self.stain(
                place,
                (radius, 0.93 * radius),
                rng.random(),
                vary(rng, (205, 178, 214), 14),
                0.95,
                covers=1.0,
            )
            nucleus = vary(rng, (112, 84, 205), 18)
            if rng.random() < 0.35:
                self.stain(
                    place, (0.85 * radius, 0.8 * radius), rng.random(), nucleus, 0.95, soft=0.1, covers=1.0
                )
            else:
                first = rng.uniform(0, 2 * math.pi)
                for k in range(rng.randint(2, 4)):
                    angle = first + 1.5 * k
                    lobe = (
                        place[0] + 0.4 * radius * math.sin(angle),
                        place[1] + 0.4 * radius * math.cos(angle),
                    )
                    axes = (radius * rng.uniform(0.3, 0.45), radius * rng.uniform(0.25, 0.35))
                    self.stain(lobe, axes, rng.uniform(0, 3), nucleus, 0.95, soft=0.12, covers=1.0)
            cells += self._seen(place, radius, "purple")
        return cells

    def draw_platelets(self) -> list[Shape]:
        """Platelets, small and violet, beside faint blue stains that are none."""
        rng = self.rng
        for _ in range(rng.choice((0, 0, 1, 3))):
            spot = rng.uniform(0, self.height), rng.uniform(0, self.width)
            size = self.radius * rng.uniform(0.2, 0.5)
            self.stain(
                spot, (size, size * rng.uniform(0.5, 1)), rng.random() * 3, (165, 185, 215), 0.6, soft=0.7
            )
        cells: list[Shape] = []
        for _ in range(rng.choices((0, 1, 2, 3, 4), (9, 6, 3, 2, 1))[0]):
            radius = self.radius * rng.uniform(0.16, 0.3)
            place = self.place(radius, 0.9)
            if place is None:
                continue
            axes = (radius, radius * rng.uniform(0.7, 1))
            self.stain(
                place, axes, rng.random() * 3, vary(rng, (140, 110, 200), 18), 0.9, soft=0.3, covers=1.0
            )
            cells += self._seen(place, radius, "purple")
        return cells

    def _seen(self, place: Place, radius: float, color: str) -> list[Shape]:
        """What lies on the picture of a cell, if it is enough of it to count."""
        top, bottom = max(0.0, place[0] - radius), min(float(self.height), place[0] + radius)
        left, right = max(0.0, place[1] - radius), min(float(self.width), place[1] + radius)
        if top >= bottom or left >= right or (bottom - top) * (right - left) < _LEAST_SHOWN * 4 * radius**2:
            return []
        return [Shape("circle", color, (top, left, bottom, right))]
