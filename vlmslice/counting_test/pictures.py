"""Matched pictures: layouts of shapes in shares of an image, drawn at any size; each set varies one thing.

    Layout  ->  Picture (size, shift, transposition)  ->  pixels, and the box of every shape

The pictures of a group show the same layout, so what changes between their answers comes from what was varied:

- `nine-balls`: the picture of nine balls at sizes of 224 to 4096 px
- `count`: 0 to 30 shapes
- `size`: layouts at several sizes
- `aspect`: layouts stretched from 1:8 to 8:1, the short side and the shapes as large as before
- `object-size`: layouts whose shapes shrink
- `copies`: layouts, shifted by some px and transposed
- `position`: four circles at every place of a picture, after the pilot of LLaVA-UHD (https://arxiv.org/abs/2403.11703)
- `seams-POLICY`: layouts in which some shapes lie across the seams of a slice plan, or all inside slices

Nothing here is drawn before `Picture.draw` is called, and all of it is the same for the same seed, on every machine.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from PIL import Image

from vlmslice.data import nine_balls
from vlmslice.data.counting import matches, name_things
from vlmslice.data.scenes import Box, Color, sample_rng
from vlmslice.data.shapes import COLORS, KINDS, draw_shape, visible_colors
from vlmslice.errors import VlmSliceError
from vlmslice.slicing import SlicePlan, SlicingConfig, SlicingError, plan_slices

DEFAULT_SEED = 20_261_123
SIZES = (256, 512, 1024, 2048)
ASPECTS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
COUNTS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30)
OBJECT_RADII = (0.012, 0.025, 0.05)
SEAM_SIZES = ((512, 512), (384, 768), (768, 384), (640, 640), (540, 960), (960, 540))
SHIFTS = ((0, 5), (5, 0), (8, 8), (-8, 8))

FORMS = ("all", "kind", "color", "both")
_CIRCLES = "How many circles are there?"
# Their own mirror images on the diagonal: transposed, they are the same shapes elsewhere.
_SYMMETRIC_KINDS = ("circle", "square", "cross", "ring")
_GROUNDS: tuple[Color, ...] = ((255, 255, 255), (238, 234, 222), (40, 44, 52))
# Corners of a square lie 1.27 radii from its centre.
_REACH = 1.3
_GAP = 0.012  # between shapes and to the border, in shares of the short side: 2.7 px at 224
_MARGIN = 0.03  # to the border, likewise, for pictures that are shifted
SEEN_SHARE = 0.2
"""Least share of an object's box that a slice must see to know that something is there."""


class PictureError(VlmSliceError, ValueError):
    """Shapes find no room on a picture."""


@dataclass(frozen=True)
class Item:
    """One shape of a layout.

    Attributes:
        kind: One of `shapes.KINDS`.
        color: One of `shapes.COLORS`.
        y, x: Centre, in shares of the height and width.
        radius: Half the side of its box, in shares of the short side.
    """

    kind: str
    color: str
    y: float
    x: float
    radius: float


@dataclass(frozen=True)
class Layout:
    """Shapes on a ground, and what is asked about them.

    Attributes:
        items: Those asked for, and distractors.
        ground: Colour of the page.
        question: Such as "How many red circles are there?"
        form: What the question names: "all", the "kind", the "color" or "both".
        kind, color: The kind and colour it names; without meaning where the form has none.
    """

    items: tuple[Item, ...]
    ground: Color
    question: str
    form: str
    kind: str = ""
    color: str = ""

    def is_asked(self, item: Item) -> bool:
        """Whether a shape is one of those to count."""
        return matches(item.kind, item.color, self.form, self.kind, self.color, "shapes")

    @property
    def count(self) -> int:
        """The true answer."""
        return sum(map(self.is_asked, self.items))


@dataclass(frozen=True)
class Picture:
    """A layout at a size.

    Attributes:
        set: Name of the set, see the top of this file.
        group: Pictures of a set with the same group show the same layout.
        variant: What sets this picture apart from its group.
        layout: What is drawn.
        size: (height, width) in px at which the layout is drawn, before any transposition.
        shift: (down, right) in px by which all shapes are moved.
        transposed: Rows and columns of pixels are swapped, after the shift.
        policy: The slicing policy whose seams the layout was made for, if any.
        num_on_seams: Of the shapes to count, those that lie across its seams.
    """

    set: str
    group: str
    variant: str
    layout: Layout
    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    transposed: bool = False
    policy: str | None = None
    num_on_seams: int = 0

    @property
    def id(self) -> str:
        """Unique among all pictures."""
        return f"{self.set}/{self.group}/{self.variant}"

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the image in px."""
        return (self.size[1], self.size[0]) if self.transposed else self.size

    @property
    def boxes(self) -> list[Box]:
        """(top, left, bottom, right) in px of each shape of the layout, in its order."""
        boxes = []
        height, width = self.size
        for item in self.layout.items:
            y, x = item.y * height + self.shift[0], item.x * width + self.shift[1]
            radius = item.radius * min(self.size)
            box = (y - radius, x - radius, y + radius, x + radius)
            boxes.append((box[1], box[0], box[3], box[2]) if self.transposed else box)
        return boxes

    @property
    def asked_boxes(self) -> list[Box]:
        """The boxes of the shapes to count."""
        asked = map(self.layout.is_asked, self.layout.items)
        return [box for box, is_asked in zip(self.boxes, asked, strict=True) if is_asked]

    def draw(self) -> Image.Image:
        """The pixels. A shifted or transposed picture has exactly those of the plain one, elsewhere."""
        height, width = self.size
        image = Image.new("RGB", (width, height), self.layout.ground)
        for item in self.layout.items:
            center = (item.y * height, item.x * width)
            draw_shape(image, item.kind, item.color, center, item.radius * min(self.size), COLORS[item.color])
        if self.shift != (0, 0):
            moved = Image.new("RGB", (width, height), self.layout.ground)
            moved.paste(image, (self.shift[1], self.shift[0]))
            image = moved
        return image.transpose(Image.Transpose.TRANSPOSE) if self.transposed else image


# Layouts


def draw_layout(
    rng: random.Random,
    count: int,
    *,
    form: str = "all",
    radius: float | None = None,
    num_others: int = 0,
    kinds: Sequence[str] = KINDS,
) -> Layout:
    """A layout whose shapes keep apart on every picture that is at least 224 px high and wide.

    Args:
        rng: Source of all that is chosen.
        count: Shapes to count.
        form: One of `FORMS`.
        radius: Of all shapes, in shares of the short side; by default what leaves them room.
        num_others: Distractors; none with the form "all".
        kinds: Of `shapes.KINDS`, those to choose from; two at least.
    """
    ground = rng.choice(_GROUNDS)
    num_others = 0 if form == "all" else num_others
    looks, kind, color = _choose_looks(rng, count, num_others, form, visible_colors(ground), kinds)
    radius = radius or min(0.06, 0.2 / max(count + num_others, 1) ** 0.5)
    centers = _scatter(rng, [radius] * len(looks))
    items = tuple(Item(*look, *center, radius) for look, center in zip(looks, centers, strict=True))
    return Layout(items, ground, f"How many {name_things(form, kind, color)} are there?", form, kind, color)


def _choose_looks(
    rng: random.Random, count: int, num_others: int, form: str, colors: Sequence[str], kinds: Sequence[str]
) -> tuple[list[tuple[str, str]], str, str]:
    """Kind and colour of each shape, and those that the question names."""
    kind, color = rng.choice(kinds), rng.choice(colors)

    def other(options: Sequence[str], taken: str) -> str:
        return rng.choice([option for option in options if option != taken])

    named = {"all": (False, False), "kind": (True, False), "color": (False, True), "both": (True, True)}[form]
    looks = [
        (kind if named[0] else rng.choice(kinds), color if named[1] else rng.choice(colors))
        for _ in range(count)
    ]
    for number in range(num_others):
        # Of red circles, others are circles or red in turn: neither kind nor colour alone gives them away.
        other_kind = form == "kind" or (form == "both" and number % 2 == 1)
        looks.append(
            (
                other(kinds, kind) if other_kind else kind if form == "both" else rng.choice(kinds),
                other(colors, color) if not other_kind else color if form == "both" else rng.choice(colors),
            )
        )
    return looks, kind, color


def _scatter(rng: random.Random, radii: Sequence[float]) -> list[tuple[float, float]]:
    """Centres on the unit square. What is apart there is so on every longer picture of the same short side."""
    for _ in range(50):
        centers: list[tuple[float, float]] = []
        for radius in radii:
            low = radius + _GAP + _MARGIN
            for _ in range(300):
                center = rng.uniform(low, 1 - low), rng.uniform(low, 1 - low)
                if _is_free(center, radius, zip(centers, radii, strict=False), _GAP):
                    centers.append(center)
                    break
        if len(centers) == len(radii):
            return centers
    raise PictureError(
        f"{len(radii)} shapes of radius {max(radii):.3f} find no room on a square of side 1; make them fewer or smaller"
    )


def _is_free(
    center: tuple[float, float],
    radius: float,
    taken: Iterable[tuple[tuple[float, float], float]],
    gap: float,
) -> bool:
    return all(
        (center[0] - y) ** 2 + (center[1] - x) ** 2 >= (_REACH * (radius + other) + gap) ** 2
        for (y, x), other in taken
    )


# Sets


def nine_balls_pictures(sides: Sequence[int] = nine_balls.NINE_BALLS_SIZES[::2]) -> list[Picture]:
    """The picture of nine balls at these sides in px, by default at 12 of 224 to 3,600."""
    items = tuple(Item("circle", "blue", *center, nine_balls.RADIUS) for center in nine_balls.CENTERS)
    # Every counting model knows the word "circles"; whether it knows "balls" has nothing to do with slicing.
    layout = Layout(items, (255, 255, 255), _CIRCLES, "all")
    return [Picture("nine-balls", f"{side:04}", str(side), layout, (side, side)) for side in sides]


def count_pictures(
    seed: int = DEFAULT_SEED, num: int = 2, counts: Sequence[int] = COUNTS, side: int = 640
) -> list[Picture]:
    """`num` layouts of each count on squares, asked for in all forms by turns."""
    pictures = []
    for number in range(num):
        for place, count in enumerate(counts):
            rng = sample_rng(seed, "count", number * 1000 + count)
            layout = draw_layout(
                rng, count, form=FORMS[(place + number) % len(FORMS)], num_others=rng.randint(1, 4)
            )
            pictures.append(Picture("count", f"{count:02}-{number}", str(count), layout, (side, side)))
    return pictures


def size_pictures(seed: int = DEFAULT_SEED, num: int = 8, sides: Sequence[int] = SIZES) -> list[Picture]:
    """`num` layouts of 3 to 9 shapes, as squares of each side in px."""
    return _vary("size", seed, num, {str(side): (side, side) for side in sides})


def aspect_pictures(
    seed: int = DEFAULT_SEED, num: int = 6, aspects: Sequence[float] = ASPECTS, short_side: int = 256
) -> list[Picture]:
    """`num` layouts of 3 to 9 shapes at each ratio of width to height; short side and shapes keep their size in px."""
    sizes = {
        name_aspect(aspect): (
            (short_side, round(short_side * aspect))
            if aspect >= 1
            else (round(short_side / aspect), short_side)
        )
        for aspect in aspects
    }
    return _vary("aspect", seed, num, sizes)


def name_aspect(aspect: float) -> str:
    """Width to height, `4:1` for 4."""
    return f"{aspect:g}:1" if aspect >= 1 else f"1:{1 / aspect:g}"


def object_size_pictures(
    seed: int = DEFAULT_SEED, num: int = 8, radii: Sequence[float] = OBJECT_RADII, side: int = 512
) -> list[Picture]:
    """`num` layouts of 3 to 9 shapes, on squares, with each radius in shares of the side; centres stay."""
    pictures = []
    for number, layout in enumerate(_few_shapes("object-size", seed, num, max(radii))):
        for radius in radii:
            items = tuple(replace(item, radius=radius) for item in layout.items)
            variant = f"{2 * radius * side:.0f}px"
            pictures.append(
                Picture("object-size", f"{number:02}", variant, replace(layout, items=items), (side, side))
            )
    return pictures


def copy_pictures(
    seed: int = DEFAULT_SEED, num: int = 10, side: int = 448, shifts: Sequence[tuple[int, int]] = SHIFTS
) -> list[Picture]:
    """`num` layouts of 3 to 9 shapes on oblongs: plain, transposed, shifted by each of `shifts` (down, right; px)."""
    pictures = []
    for number, layout in enumerate(_few_shapes("copies", seed, num, kinds=_SYMMETRIC_KINDS)):
        size = (side, round(1.5 * side)) if number % 2 else (round(1.5 * side), side)
        plain = Picture("copies", f"{number:02}", "plain", layout, size)
        pictures += [plain, replace(plain, variant="transposed", transposed=True)]
        pictures += [replace(plain, variant=f"shifted{dy:+}{dx:+}", shift=(dy, dx)) for dy, dx in shifts]
    return pictures


def position_pictures(num_places: int = 7, side: int = 672) -> list[Picture]:
    """Two by two circles at `num_places` x `num_places` places of a square; groups are named by row and column."""
    radius, spacing = 0.03, 0.1
    low, high = spacing / 2 + radius + 2 * _GAP, 1 - spacing / 2 - radius - 2 * _GAP
    steps = [low + (high - low) * i / max(num_places - 1, 1) for i in range(num_places)]
    corners = [(dy * spacing / 2, dx * spacing / 2) for dy in (-1, 1) for dx in (-1, 1)]
    pictures = []
    for row, y in enumerate(steps):
        for col, x in enumerate(steps):
            items = tuple(Item("circle", "red", y + dy, x + dx, radius) for dy, dx in corners)
            layout = Layout(items, (255, 255, 255), _CIRCLES, "all")
            pictures.append(Picture("position", f"{row}-{col}", f"{y:.3f},{x:.3f}", layout, (side, side)))
    return pictures


def _vary(name: str, seed: int, num: int, sizes: Mapping[str, tuple[int, int]]) -> list[Picture]:
    return [
        Picture(name, f"{number:02}", variant, layout, size)
        for number, layout in enumerate(_few_shapes(name, seed, num))
        for variant, size in sizes.items()
    ]


def _few_shapes(
    name: str, seed: int, num: int, radius: float | None = None, kinds: Sequence[str] = KINDS
) -> list[Layout]:
    layouts = []
    for number in range(num):
        rng = sample_rng(seed, name, number)
        form = FORMS[number % len(FORMS)]
        layouts.append(
            draw_layout(
                rng, rng.randint(3, 9), form=form, radius=radius, num_others=rng.randint(1, 3), kinds=kinds
            )
        )
    return layouts


# Seams


def seen_shares(plan: SlicePlan, box: Box) -> list[float]:
    """How much of a box, as a share of its area, each slice of a plan shows by visual tokens that are received."""
    top, left, bottom, right = box
    area = (bottom - top) * (right - left)
    return [
        max(min(bottom, seen[2]) - max(top, seen[0]), 0.0)
        * max(min(right, seen[3]) - max(left, seen[1]), 0.0)
        / area
        for seen in (view.received_box for view in plan.slices)
    ]


def num_slices_seeing(plan: SlicePlan, box: Box, least: float = SEEN_SHARE) -> int:
    """Slices that see at least this share of a box: 2 for an object that a seam cuts in the middle."""
    return sum(share >= least for share in seen_shares(plan, box))


def is_inside(plan: SlicePlan, box: Box, gap: float = 1.0) -> bool:
    """Whether one slice holds a box and all within `gap` px of it, and no other slice sees any of that."""
    grown = (box[0] - gap, box[1] - gap, box[2] + gap, box[3] + gap)
    return sorted(seen_shares(plan, grown))[-2:] in ([1.0], [0.0, 1.0])


def seam_pictures(
    config: SlicingConfig,
    seed: int = DEFAULT_SEED,
    num: int = 12,
    sizes: Sequence[tuple[int, int]] = SEAM_SIZES,
) -> list[Picture]:
    """`num` pairs of pictures, `inside` and `on`: in the second, 1 to 3 shapes lie across seams between two slices.

    All other shapes stay where they are, and kinds, colours and sizes are the same. Where slices overlap, what lies in
    the middle of the overlap is seen by both.

    Args:
        config: The slicing under test.
        seed: Of all choices.
        num: Pairs.
        sizes: (height, width) of pictures in px, taken by turns; those that one view covers, or that the policy cannot
            plan, are left out.

    Returns:
        The pictures; none if no size has a seam.

    Raises:
        PictureError: Slices overlap so much that no shape can lie inside a single one.
    """
    plans = []
    for height, width in sizes:
        try:
            plan = plan_slices(height, width, config)
        except SlicingError:
            continue
        if len(plan.slices) > 1:
            plans.append(plan)
    pictures = []
    for number in range(num if plans else 0):
        rng = sample_rng(seed, f"seams-{config.policy}", number)
        pictures += _seam_pair(rng, plans[number % len(plans)], f"{number:02}", FORMS[number % len(FORMS)])
    return pictures


def _seam_pair(rng: random.Random, plan: SlicePlan, group: str, form: str) -> list[Picture]:
    height, width = plan.image_size
    count, num_others = rng.randint(3, 8), rng.randint(0, 2) if form != "all" else 0
    num_on = rng.randint(1, 3)
    looked = draw_layout(rng, count, form=form, num_others=num_others)
    side = min(
        min(view.box[2], height) - max(view.box[0], 0) + min(view.box[3], width) - max(view.box[1], 0)
        for view in plan.slices
    )
    largest = side / 2 * rng.uniform(0.07, 0.1)
    for shrink in (1.0, 0.8, 0.64, 0.5, 0.4):
        radius = max(largest * shrink, 5.0)
        placed = _place_pair(rng, plan, len(looked.items), num_on, radius)
        if placed is None:
            continue
        pictures = []
        for variant, centers, num_on_seams in (("inside", placed[0], 0), ("on", placed[1], num_on)):
            items = tuple(
                replace(item, y=y / height, x=x / width, radius=radius / min(height, width))
                for item, (y, x) in zip(looked.items, centers, strict=True)
            )
            layout = replace(looked, items=items)
            name = f"seams-{plan.policy}"
            pictures.append(
                Picture(
                    name,
                    group,
                    variant,
                    layout,
                    (height, width),
                    policy=plan.policy,
                    num_on_seams=num_on_seams,
                )  # fmt: skip
            )
        return pictures
    raise PictureError(
        f"policy {plan.policy!r} leaves {len(looked.items)} shapes of {height} x {width} px (height x width) no room "
        "both inside single slices and on seams; give sizes with larger slices"
    )


def _place_pair(
    rng: random.Random, plan: SlicePlan, num: int, num_on: int, radius: float
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]] | None:
    """Centres in px of `num` shapes inside slices, and the same with the first `num_on` moved to seams."""
    height, width = plan.image_size
    gap = max(3.0, _GAP * min(height, width))
    low, bottom, right = radius + gap, height - radius - gap, width - radius - gap

    def place(
        propose: Callable[[], tuple[float, float]],
        fits: Callable[[Box], bool],
        taken: list[tuple[float, float]],
    ) -> tuple[float, float] | None:
        for _ in range(400):
            y, x = propose()
            if (
                low <= y <= bottom
                and low <= x <= right
                and fits((y - radius, x - radius, y + radius, x + radius))
                and _is_free((y, x), radius, ((center, radius) for center in taken), gap)
            ):
                return y, x
        return None

    inside: list[tuple[float, float]] = []
    for _ in range(num):
        found = place(
            lambda: (rng.uniform(low, bottom), rng.uniform(low, right)),
            lambda box: is_inside(plan, box),
            inside,
        )
        if found is None:
            return None
        inside.append(found)
    seams = _seams(plan)

    def on_a_seam() -> tuple[float, float]:
        top, left, seam_bottom, seam_right = rng.choice(seams)
        y, x = rng.uniform(top, seam_bottom), rng.uniform(left, seam_right)
        # A little to one side, where the seam is a line.
        return y + rng.uniform(-0.1, 0.1) * radius, x + rng.uniform(-0.1, 0.1) * radius

    on: list[tuple[float, float]] = []
    for _ in range(num_on):
        found = place(on_a_seam, lambda box: is_on_seam(plan, box), [*on, *inside[num_on:]])
        if found is None:
            return None
        on.append(found)
    return inside, [*on, *inside[num_on:]]


def is_on_seam(plan: SlicePlan, box: Box) -> bool:
    """Whether just two slices see something of a box, and both enough of it to know that something is there."""
    shares = seen_shares(plan, box)
    return sum(share > 0 for share in shares) == sum(share >= 1.5 * SEEN_SHARE for share in shares) == 2


def _seams(plan: SlicePlan) -> list[Box]:
    """Between neighbouring slices: the line that parts them, or the middle line of what both see."""
    rows, cols = plan.grid
    boxes = [view.box for view in plan.slices]
    lines: list[Box] = []
    for row in range(rows):
        for one, other in pairwise(boxes[row * cols : (row + 1) * cols]):
            x = (one[3] + other[1]) / 2
            lines.append((max(one[0], other[0]), x, min(one[2], other[2]), x))
    for col in range(cols):
        for one, other in pairwise(boxes[col::cols]):
            y = (one[2] + other[0]) / 2
            lines.append((y, max(one[1], other[1]), y, min(one[3], other[3])))
    return lines


# All of them


def all_pictures(
    seam_configs: Iterable[SlicingConfig], seed: int = DEFAULT_SEED, limit: int | None = None
) -> list[Picture]:
    """Every set, with the default numbers of pictures, and the pairs on the seams of each of these ways to slice.

    Args:
        seam_configs: The slicing of each policy under test.
        seed: Of all choices.
        limit: Most groups of each set, spread evenly over it.
    """
    sets = [
        nine_balls_pictures(),
        count_pictures(seed),
        size_pictures(seed),
        aspect_pictures(seed),
        object_size_pictures(seed),
        copy_pictures(seed),
        position_pictures(),
        *(seam_pictures(config, seed) for config in seam_configs),
    ]
    return [picture for pictures in sets for picture in _spread(pictures, limit)]


def _spread(pictures: Sequence[Picture], limit: int | None) -> Iterable[Picture]:
    groups = [list(group) for _, group in groupby(pictures, lambda picture: picture.group)]
    if limit is not None and limit < len(groups):
        groups = [groups[i * len(groups) // limit] for i in range(limit)]
    return [picture for group in groups for picture in group]


def pictures_digest(pictures: Iterable[Picture]) -> str:
    """SHA-256 over all that pictures show and ask: equal for equal sets."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(repr(picture).encode())
    return digest.hexdigest()
