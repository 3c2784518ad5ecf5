import numpy as np
import pytest
from PIL import Image
from test_attention_map import map_of, one_hot, plan_of

from vlmslice.attention_drawing import draw_attention, draw_frames, draw_heat

WHITE = Image.new("RGB", (200, 100), "white")


def is_warm(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture).astype(int)
    return pixels[..., 0] - pixels[..., 2] > 60


def test_heat_is_on_its_token() -> None:
    plan = plan_of(100, 200)
    attention = map_of(plan, one_hot(plan.num_visual_tokens, plan.num_visual_tokens - 1))
    warm = is_warm(draw_heat(WHITE, attention, attention.weights[0]))
    top, left, _, _ = attention.boxes[-1]
    assert warm[int(top) + 6 : 94, int(left) + 6 : 194].all()
    assert not warm[: int(top) - 25].any() and not warm[:, : int(left) - 25].any()


def test_weight_on_nothing_leaves_the_image_cold() -> None:
    plan = plan_of(100, 200)
    weights = 1e-4 * one_hot(plan.num_visual_tokens, 3)
    assert not is_warm(draw_heat(WHITE, map_of(plan, weights), weights)).any()
    assert not is_warm(draw_heat(WHITE, map_of(plan, weights), np.zeros_like(weights))).any()


@pytest.mark.parametrize("height,width", [(100, 200), (300, 40), (40, 300)])
def test_any_shape_can_be_drawn(height: int, width: int) -> None:
    plan = plan_of(height, width)
    num = plan.num_visual_tokens
    attention = map_of(plan, np.stack([one_hot(num, i % num) for i in range(5)]))
    image = Image.new("RGB", (width, height), "white")
    by_word, by_character = draw_attention(image, attention), draw_attention(image, attention, "character")
    assert by_character.width == by_word.width <= 1000
    assert len(draw_frames(image, attention, "character")) == 5
    assert is_warm(by_word).any() and is_warm(by_character).any()


def test_frames_mark_one_label_after_the_other() -> None:
    plan = plan_of(100, 200)
    num = plan.num_visual_tokens
    attention = map_of(plan, np.stack([one_hot(num, 0), one_hot(num, num - 1)]))
    frames = draw_frames(WHITE, attention, "character")
    marked = [np.argwhere(is_warm(frame)[:36]).mean(axis=0)[1] for frame in frames]
    heated = [np.argwhere(is_warm(frame)[44:]).mean(axis=0) for frame in frames]
    assert marked[0] < marked[1]
    assert (heated[0] < heated[1]).all()
