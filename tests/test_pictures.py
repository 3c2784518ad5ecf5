"""Matched pictures: what differs within a group is what was varied, and nothing touches."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmslice.counting_test.pictures import (
    FORMS,
    Picture,
    PictureError,
    all_pictures,
    aspect_pictures,
    copy_pictures,
    count_pictures,
    draw_layout,
    is_inside,
    is_on_seam,
    name_aspect,
    nine_balls_pictures,
    num_slices_seeing,
    object_size_pictures,
    pictures_digest,
    position_pictures,
    seam_pictures,
    seen_shares,
    size_pictures,
)
from vlmslice.data.nine_balls import draw_nine_balls
from vlmslice.data.shapes import COLORS, draw_shape
from vlmslice.slicing import SlicingConfig, plan_slices
from vlmslice.slicing_policies import POLICIES

seeds = st.integers(0, 2**32)
UNBOUNDED = 50_000  # visual tokens


def groups(pictures: list[Picture]) -> list[list[Picture]]:
    return [list(group) for _, group in groupby(pictures, lambda picture: picture.group)]


def looks(picture: Picture) -> list[tuple[str, str]]:
    return [(item.kind, item.color) for item in picture.layout.items]


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(picture.draw()).astype(int)


def assert_apart(picture: Picture) -> None:
    """By the pixels: every shape drawn alone keeps off the border and off the pixels of all others."""
    height, width = picture.size
    covered = np.zeros((height, width), dtype=int)
    for item in picture.layout.items:
        image = Image.new("RGB", (width, height), picture.layout.ground)
        center = item.y * height, item.x * width
        draw_shape(image, item.kind, item.color, center, item.radius * min(picture.size), COLORS[item.color])
        alone = (np.asarray(image) != picture.layout.ground).any(axis=-1)
        assert alone.any()
        covered += alone
    assert covered.max(initial=0) <= 1, picture.id
    edges = (covered[0], covered[-1], covered[:, 0], covered[:, -1])
    assert not any(edge.any() for edge in edges), picture.id


@given(seed=seeds, count=st.integers(0, 30), form=st.sampled_from(FORMS), num_others=st.integers(0, 5))
@settings(max_examples=60)
def test_layouts_hold_what_they_ask_for(seed: int, count: int, form: str, num_others: int) -> None:
    layout = draw_layout(random.Random(seed), count, form=form, num_others=num_others)
    assert layout.count == count
    assert len(layout.items) == count + (0 if form == "all" else num_others)
    for one, other in combinations(layout.items, 2):
        # Circles round the corners of squares, which lie outermost.
        assert (one.y - other.y) ** 2 + (one.x - other.x) ** 2 > (1.28 * (one.radius + other.radius)) ** 2


def test_shapes_touch_neither_one_another_nor_the_border() -> None:
    configs = [SlicingConfig(policy=policy, max_visual_tokens=UNBOUNDED) for policy in POLICIES]
    for picture in all_pictures(configs, limit=3):
        if max(picture.size) <= 1024:
            assert_apart(picture)
    for layout_side in (224, 230):
        for picture in count_pictures(side=layout_side):
            assert_apart(picture)


def test_shifted_shapes_stay_on_the_picture() -> None:
    for picture in copy_pictures(num=20):
        height, width = picture.image_size
        for top, left, bottom, right in picture.boxes:
            assert top >= 1 and left >= 1 and bottom <= height - 1 and right <= width - 1


@given(seed=seeds)
@settings(max_examples=15)
def test_groups_differ_in_what_is_varied_alone(seed: int) -> None:
    for group in groups(size_pictures(seed, 2)):
        assert len({picture.layout for picture in group}) == 1
        assert [picture.size for picture in group] == [(256, 256), (512, 512), (1024, 1024), (2048, 2048)]
    for group in groups(aspect_pictures(seed, 2)):
        assert len({picture.layout for picture in group}) == 1
        assert {min(picture.size) for picture in group} == {256}
        assert [name_aspect(p.size[1] / p.size[0]) for p in group] == [p.variant for p in group]
        # Short side and shares equal: shapes have one size in px.
        assert len({round(box[2] - box[0], 6) for picture in group for box in picture.boxes}) == 1
    for group in groups(object_size_pictures(seed, 2)):
        places = {
            replace(picture.layout, items=tuple(replace(item, radius=0.0) for item in picture.layout.items))
            for picture in group
        }
        assert len(places) == 1
        assert len({picture.layout.items[0].radius for picture in group}) == len(group) == 3
    for group in groups(copy_pictures(seed, 2)):
        assert len({(picture.layout, picture.size) for picture in group}) == 1


def test_copies_have_the_same_pixels_elsewhere() -> None:
    for group in groups(copy_pictures(num=2, side=160)):
        plain, *others = group
        assert plain.variant == "plain" and others[0].variant == "transposed" and len(others) == 5
        original = pixels(plain)
        assert (pixels(others[0]) == original.transpose(1, 0, 2)).all()
        assert others[0].draw().size == (others[0].image_size[1], others[0].image_size[0])
        for picture in others[1:]:
            down, right = picture.shift
            assert (down, right) != (0, 0)
            # The ground is plain and no shape reaches the border, so moving round the edge is a shift.
            assert (pixels(picture) == np.roll(original, (down, right), axis=(0, 1))).all()
        for picture in group:
            assert_boxes_hold_the_shapes(picture)


def assert_boxes_hold_the_shapes(picture: Picture) -> None:
    drawn = (pixels(picture) != picture.layout.ground).any(axis=-1)
    held = np.zeros_like(drawn)
    for top, left, bottom, right in picture.boxes:
        inside = slice(int(top) - 1, int(bottom) + 2), slice(int(left) - 1, int(right) + 2)
        assert drawn[inside].any()
        held[inside] = True
    assert not (drawn & ~held).any()


def test_nine_balls_are_the_nine_balls() -> None:
    for picture in nine_balls_pictures((224, 401)):
        assert picture.layout.count == 9
        assert (pixels(picture) == np.asarray(draw_nine_balls(picture.size[0]))).all()


def test_positions_cover_the_picture() -> None:
    pictures = position_pictures(num_places=4, side=300)
    assert len(pictures) == 16 and all(picture.layout.count == 4 for picture in pictures)
    for picture in pictures:
        assert_apart(picture)
    boxes = [box for picture in pictures for box in picture.boxes]
    assert min(box[0] for box in boxes) < 15 and max(box[3] for box in boxes) > 285


# Seams


@pytest.mark.parametrize("policy", POLICIES)
def test_seam_pairs_of_every_policy(policy: str) -> None:
    config = SlicingConfig(policy=policy, max_visual_tokens=UNBOUNDED)
    pictures = seam_pictures(config, num=12)
    has_seams = len(plan_slices(640, 640, config).slices) > 1
    assert len(pictures) == (24 if has_seams else 0)
    for group in groups(pictures):
        inside, on = group
        assert (inside.variant, on.variant) == ("inside", "on")
        assert (inside.size, looks(inside), inside.layout.question) == (
            on.size,
            looks(on),
            on.layout.question,
        )
        assert len({item.radius for picture in group for item in picture.layout.items}) == 1
        assert inside.num_on_seams == 0 < on.num_on_seams <= on.layout.count
        # Those on seams come first, and all others stay.
        assert inside.layout.items[on.num_on_seams :] == on.layout.items[on.num_on_seams :]
        plan = plan_slices(*inside.size, config)
        assert all(is_inside(plan, box) for box in inside.boxes)
        for number, box in enumerate(on.boxes):
            is_moved = number < on.num_on_seams
            assert on.layout.is_asked(on.layout.items[number]) or not is_moved
            assert is_inside(plan, box) != is_moved
            assert is_on_seam(plan, box) == is_moved
            assert num_slices_seeing(plan, box) == 1 + is_moved


def test_shares_that_slices_see() -> None:
    plan = plan_slices(448, 448, SlicingConfig())
    assert plan.grid == (2, 2)
    assert seen_shares(plan, (10, 214, 30, 234)) == [0.5, 0.5, 0, 0]
    assert seen_shares(plan, (214, 214, 234, 234)) == [0.25] * 4
    assert num_slices_seeing(plan, (214, 214, 234, 234)) == 4
    assert seen_shares(plan, (10, 206, 30, 226)) == pytest.approx([0.9, 0.1, 0, 0])
    assert num_slices_seeing(plan, (10, 206, 30, 226)) == 1
    assert not is_inside(plan, (10, 206, 30, 226)) and not is_on_seam(plan, (10, 206, 30, 226))
    # A hair's breadth inside is not yet inside: resizing blurs the edge.
    assert not is_inside(plan, (10, 203.5, 30, 223.5))
    assert is_inside(plan, (10, 200, 30, 220))


# All


def test_a_seed_makes_one_test() -> None:
    config = SlicingConfig()
    digest = pictures_digest(all_pictures([config]))
    assert digest == pictures_digest(all_pictures([config]))
    assert digest != pictures_digest(all_pictures([config], seed=1))
    assert len({picture.id for picture in all_pictures([config])}) == len(all_pictures([config]))


def test_a_limit_keeps_whole_groups() -> None:
    full = all_pictures([SlicingConfig()])
    few = all_pictures([SlicingConfig()], limit=2)
    assert {picture.set for picture in few} == {picture.set for picture in full}
    for name in {picture.set for picture in full}:
        chosen = [picture for picture in few if picture.set == name]
        names = {picture.group for picture in chosen}
        assert len(names) == 2
        assert chosen == [picture for picture in full if picture.set == name and picture.group in names]


def test_too_much_for_a_picture() -> None:
    with pytest.raises(PictureError, match="find no room"):
        draw_layout(random.Random(0), 40, radius=0.1)


def test_transposed_shapes_are_the_same_shapes() -> None:
    """A triangle on its side is another thing to recognise; copies shall differ in where things lie alone."""
    kinds = {kind for picture in copy_pictures(num=40) for kind, _ in looks(picture)}
    assert len(kinds) >= 3
    for kind in kinds:
        image = Image.new("RGB", (65, 65), "white")
        draw_shape(image, kind, "red", (32.5, 32.5), 20, COLORS["red"])
        drawn = np.asarray(image).astype(int)
        assert np.abs(drawn - drawn.transpose(1, 0, 2)).max() <= 40, kind  # of 255, of a smoothed edge
