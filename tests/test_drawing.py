import numpy as np
import pytest
from PIL import Image

from vlmslice.drawing import _LINE, _POINT, draw_plan
from vlmslice.slicing import SlicingConfig, plan_slices


def draw(height: int, width: int, **options) -> tuple[Image.Image, Image.Image]:
    image = Image.new("RGB", (width, height), (60, 120, 180))
    return image, draw_plan(image, plan_slices(height, width, SlicingConfig(**options)))


@pytest.mark.parametrize(
    "height,width",
    [(1, 1), (10, 600), (93, 814), (600, 800), (1800, 900), (4000, 30), (2000, 3000), (1, 5000)],
)
def test_any_shape_can_be_drawn(height: int, width: int) -> None:
    image, picture = draw(height, width)
    assert picture.mode == "RGB"
    assert max(picture.size) <= 2600
    assert image.getpixel((0, 0)) == (60, 120, 180)  # the image itself is not drawn on


def test_grid_lines_lie_on_the_slices() -> None:
    image = Image.new("RGB", (800, 600), "white")
    plan = plan_slices(600, 800, SlicingConfig())
    picture = np.asarray(draw_plan(image, plan)).astype(int)
    is_line = (picture == _LINE).all(-1)
    top, left = 16 + 44, 16  # margin and caption; an image of 800 px keeps its size
    for view in plan.slices:
        box_top, box_left, bottom, right = view.box
        assert is_line[top + box_top, left + box_left : left + right].all()
        assert is_line[top + bottom - 1, left + box_left : left + right].all()
        assert is_line[top + box_top : top + bottom, left + box_left].all()
        assert is_line[top + box_top : top + bottom, left + right - 1].all()
    middle = plan.slices[0].box[2] // 2
    assert is_line[top + middle, left : left + 800].sum() == 2 * 2 * plan.grid[1]


def test_overview_is_shown_as_the_encoder_gets_it() -> None:
    image = Image.effect_noise((900, 600), 80).convert("RGB")
    plan = plan_slices(600, 900, SlicingConfig(overview_resolution=160))
    assert plan.overview is not None
    picture = np.asarray(draw_plan(image, plan))
    height, width = plan.overview.size
    shown = picture[-16 - height : -16, 16 : 16 + width]
    expected = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    assert np.array_equal(shown[1:-1, 1:-1], expected[1:-1, 1:-1])


def test_one_view_has_no_overview() -> None:
    image, picture = draw(200, 200)
    assert picture.height == 16 + 44 + 480 + 16  # caption and the image, enlarged for the eye


def test_points_are_dots_at_their_places() -> None:
    image = Image.new("RGB", (800, 600), "white")
    picture = draw_plan(image, plan_slices(600, 800), points=[(100.0, 300.0), (599.0, 0.0)])
    for y, x in [(100, 300), (595, 2)]:
        assert picture.getpixel((16 + x, 16 + 44 + y)) == _POINT
    assert picture.getpixel((16 + 320, 16 + 44 + 100)) == (255, 255, 255)


def test_plan_of_another_image() -> None:
    with pytest.raises(ValueError, match="for an image of 20 x 30 px .* got one of 30 x 20"):
        draw_plan(Image.new("RGB", (20, 30)), plan_slices(20, 30))
