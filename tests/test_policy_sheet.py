import numpy as np
import pytest
from PIL import Image

from vlmslice import policy_sheet
from vlmslice.policy_sheet import describe, draw_policy_sheet, plan_all, sample_picture
from vlmslice.slicing import SlicePlan, SlicingConfig, SlicingError, View, plan_slices
from vlmslice.slicing_policies import POLICIES

CONFIG = SlicingConfig(overview_resolution=160)


def plan_of(*boxes: tuple[float, float, float, float]) -> SlicePlan:
    """A plan for 100 x 100 px that no policy makes (yet): any boxes, here in one row."""
    slices = tuple(View(box, (64, 64), (4, 4), 4) for box in boxes)
    overview = View((0, 0, 100, 100), (32, 32), (2, 2), 1) if len(boxes) > 1 else None
    return SlicePlan("any", (100, 100), (1, len(boxes)), overview, slices, 4 * len(boxes), "")


def draw_slices(plan: SlicePlan | SlicingError, bounds=(0, 0, 100, 100), scale: float = 1.0) -> np.ndarray:
    white = Image.new("RGB", (100, 100), "white")
    return np.asarray(policy_sheet._draw_slices(plan, white, (100, 100), bounds, scale)).astype(int)


@pytest.mark.parametrize(
    "height,width", [(1, 1), (1, 5000), (5000, 1), (480, 640), (100, 4000), (2400, 300), (4096, 4096)]
)
def test_any_size_can_be_drawn(height: int, width: int) -> None:
    sheet = draw_policy_sheet(height, width, CONFIG)
    assert sheet.mode == "RGB" and 400 < sheet.width < 4000 and 100 < sheet.height < 4000


def test_every_policy_is_there_with_a_plan_or_its_error() -> None:
    config = SlicingConfig(max_visual_tokens=300)
    found = plan_all(960, 1280, config)
    assert list(found) == list(POLICIES)
    assert {type(plan) for plan in found.values()} == {SlicePlan, SlicingError}
    for policy, plan in found.items():
        try:
            assert plan == plan_slices(960, 1280, SlicingConfig(policy=policy, max_visual_tokens=300))
        except SlicingError as error:
            assert str(plan) == str(error)


def test_grid_lies_on_the_slices() -> None:
    picture = draw_slices(plan_of((0, 0, 100, 40), (0, 40, 100, 100)))
    is_line = (picture == policy_sheet._LINE).all(-1)
    assert is_line[:, [0, 39, 40, 99]].all() and is_line[[0, 99]].all()
    assert not is_line[1:99, 1:39].any() and not is_line[1:99, 41:99].any()


def test_overlap_is_darker() -> None:
    picture = draw_slices(plan_of((0, 0, 100, 60), (0, 40, 100, 100)))
    once, twice = picture[50, 20], picture[50, 50]
    assert (picture[50, 80] == once).all()
    assert twice.sum() < once.sum() < 3 * 255


def test_beyond_the_image_is_grey() -> None:
    plan = plan_of((-50, 0, 150, 100))
    picture = draw_slices(plan, bounds=(-50, 0, 150, 100))
    assert picture.shape[:2] == (200, 100)
    outside, inside = picture[20, 50], picture[100, 50]
    assert (picture[180, 50] == outside).all()
    assert outside.sum() < inside.sum()
    narrow = draw_slices(plan_of((10, 10, 90, 90)), bounds=(-50, 0, 150, 100))
    assert (narrow[20, 50] == 255).all()  # no slice shows it


def test_no_more_than_a_margin_of_padding_is_drawn() -> None:
    plan = plan_of((-5000, 0, 5000, 100))
    assert policy_sheet._bounds(100, 100, {"any": plan}) == (-15, 0, 115, 100)
    assert policy_sheet._bounds(100, 100, {"any": plan_of((-5, 0, 100, 100))}) == (-5, 0, 100, 100)


def test_thumbnail_shows_padding_and_distortion() -> None:
    black = Image.new("RGB", (100, 100))
    padded = policy_sheet._whole(View((-100, 0, 200, 100), (96, 32), (6, 2), 12), black, (100, 100), 96)
    column = np.asarray(padded)[:, 16]
    assert padded.size == (32, 96)
    assert (column[10] == policy_sheet._BEYOND).all() and (column[48] == 0).all()
    squashed = policy_sheet._whole(View((0, 0, 100, 100), (32, 96), (2, 6), 12), black, (100, 100), 96)
    assert squashed.size == (96, 32) and (np.asarray(squashed)[16, 16] == 0).all()


def test_policy_without_a_plan_is_faint() -> None:
    picture = draw_slices(SlicingError("over the bound"))
    assert not (picture == policy_sheet._LINE).all(-1).any()


def test_figures_are_those_of_the_plan() -> None:
    plan = plan_slices(480, 720, CONFIG)
    lines = " | ".join(describe(plan))
    assert "2 x 3 slices" in lines and f"{plan.num_visual_tokens:,} visual tokens" in lines
    assert f"distortion {plan.distortion:.2f}" in lines and f"{100 * plan.detail:.0f} % of" in lines
    assert describe(plan_slices(100, 100, CONFIG))[0] == "one view"


def test_image_is_drawn_and_not_drawn_on() -> None:
    image = Image.new("RGB", (640, 480), (0, 0, 255))
    blue, default = draw_policy_sheet(480, 640, CONFIG, image), draw_policy_sheet(480, 640, CONFIG)
    assert blue.size == default.size and blue != default
    assert image.getcolors() == [(640 * 480, (0, 0, 255))]


def test_sample_picture_has_whole_round_discs() -> None:
    picture = sample_picture(300, 2400)
    assert picture.width == 900 and picture.height == round(900 / 8)


def test_no_image_without_pixels() -> None:
    with pytest.raises(SlicingError, match="0 x 5 px"):
        draw_policy_sheet(0, 5, CONFIG)
