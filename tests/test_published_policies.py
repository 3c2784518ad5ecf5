"""The published policies against their models' own processors: tokens and pixels; and overlap, which none of these has.

The processors are called in `policy_oracles.py`, which can also print what was tried.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from policy_oracles import (
    EDGE_SIZES,
    LLAVA_NEXT_GRIDS,
    PIXEL_ORACLES,
    PLAN_ORACLES,
    RAW,
    SIDE,
    drawn_sizes,
    our_views,
    pinpoints,
    settings_of,
)
from test_image_processing import gradient, noise, page
from tiny_models import chat, noise_image, tiny_model, tiny_slicing
from transformers import LlavaNextProcessor

from vlmslice.data.sight import find_sight
from vlmslice.image_processing import VlmSliceImageProcessor
from vlmslice.image_processing_pil import VlmSliceImageProcessorPil
from vlmslice.processing import VlmSliceProcessor
from vlmslice.sheets import find_overviews, lay_out_sheets
from vlmslice.slicing import SlicingConfig, SlicingError, plan_slices
from vlmslice.slicing_policies import POLICIES
from vlmslice.tokenization import build_byte_tokenizer

any_policy = pytest.mark.parametrize("policy", POLICIES)
sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


# --- transformers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("oracle", PLAN_ORACLES, ids=lambda oracle: oracle.name)
def test_plans_equal_transformers(oracle):
    for size in drawn_sizes(2500 if oracle.name != "MiniCPM-V 4.6, 16x" else 20_000):
        assert oracle.agrees(*size), size


def test_anyres_counts_tokens_as_the_processor_of_llava_next():
    """The whole number that it writes placeholders for, but for the newlines of rows."""
    asked = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints(LLAVA_NEXT_GRIDS, 336)),
        patch_size=14,
        num_additional_image_tokens=0,
    )
    asked._get_unpadded_features = lambda *args: LlavaNextProcessor._get_unpadded_features(asked, *args)
    config = settings_of("anyres", scale_resolution=336, merge_size=1, max_slice_nums=4)
    for height, width in drawn_sizes(1000):
        plan = plan_slices(height, width, config)
        _, newlines = asked._get_unpadded_features(height, width, 24, 24, *plan.grid)
        theirs = LlavaNextProcessor._get_number_of_features(asked, height, width, 336, 336)
        assert plan.num_visual_tokens == theirs - newlines, (height, width)


@pytest.mark.parametrize("policy", PIXEL_ORACLES)
@pytest.mark.parametrize("picture", [page, gradient, noise])
@pytest.mark.parametrize("size", [(448, 448), (37, 501), (700, 333), (480, 640), (200, 150), (9, 700)])
def test_pixels_equal_transformers(policy, picture, size):
    """Exact where torchvision resizes in our order, which is the cheaper one; else bytes are rounded between the axes.

    Measured over these: on average 0.4 of 255 levels at most.
    """
    views, config = PIXEL_ORACLES[policy]
    image = picture(*size)
    theirs = list(views(image))
    for processor_class in (VlmSliceImageProcessor, VlmSliceImageProcessorPil):
        ours = our_views(image, config, processor_class)
        assert [view.shape for view in ours] == [view.shape for view in theirs]
        apart = [np.abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        assert max(view.mean() for view in apart) < 0.5
        assert max(view.max() for view in apart) <= 30


def test_pixels_can_be_equal_to_the_bit():
    """On a size where the order of the axes is the same."""
    for policy in ("internvl", "anyres", "pad"):
        views, config = PIXEL_ORACLES[policy]
        image = page(448, 448)
        for a, b in zip(our_views(image, config), views(image), strict=True):
            np.testing.assert_array_equal(a, b)


def test_idefics3_resizes_once_where_transformers_does_twice():
    """On an image that needs no resizing its slices are equal to the bit; elsewhere theirs are softer."""
    oracle = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 3 * SIDE}, max_image_size={"longest_edge": SIDE}, resample=3
    )
    image = page(3 * SIDE, 3 * SIDE)
    *theirs, _ = oracle(image, return_tensors="np", **RAW)["pixel_values"][0]
    _, *ours = our_views(image, settings_of("idefics3", max_slice_nums=9))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_padding_costs_no_memory(tmp_path):
    """A square of 30,000 px would be 2.7 GB."""
    for size in ((2, 30_000), (30_000, 2)):
        for processor_class in (VlmSliceImageProcessor, VlmSliceImageProcessorPil):
            [view] = our_views(page(*size), settings_of("pad"), processor_class)
            middle = view[:, 100:124, 100:124]
            assert middle.std() > 0 and view[0, 0, 0] == int(0.48 * 255)


# --- overlap ------------------------------------------------------------------------------------------------------

OVERLAP = SlicingConfig("overlap", 512, max_visual_tokens=10**9)


@pytest.mark.parametrize(
    ("size", "num_tiles"),
    # The first two are OpenAI's own examples, of 765 and 1105 tokens at 85 and 170 a tile.
    [
        ((1024, 1024), 4),
        ((4096, 2048), 6),
        ((512, 512), 1),
        ((513, 300), 1),
        ((768, 768), 4),
        ((300, 2000), 4),
    ],
)
def test_overlap_has_as_many_tiles_as_documented(size, num_tiles):
    assert len(plan_slices(*size, OVERLAP).slices) == num_tiles


def test_overlap_of_the_published_pilot():
    """768 px: four tiles of 512 px that share half of their side, so that the middle is in all of them."""
    plan = plan_slices(768, 768, OVERLAP)
    assert [view.box for view in plan.slices] == [
        (0, 0, 512, 512),
        (0, 256, 512, 768),
        (256, 0, 768, 512),
        (256, 256, 768, 768),
    ]
    once = plan_slices(768, 768, replace(OVERLAP, policy="overlap_dedup"))
    assert [view.token_box for view in once.slices] == [
        (0, 0, 12, 12),
        (0, 4, 12, 16),
        (4, 0, 16, 12),
        (4, 4, 16, 16),
    ]
    assert sum(view.num_visual_tokens for view in once.slices) == 24 * 24


def tokens_on_canvas(plan, merge_size: int) -> np.ndarray:
    """How many visual tokens of slices show each block of the canvas."""
    boxes = np.array(plan.canvas_boxes[-len(plan.slices) :]) // merge_size
    seen = np.zeros(boxes.max(axis=0)[2:], dtype=int)
    for (top, left, bottom, right), view in zip(boxes, plan.slices, strict=True):
        box = view.token_box or (0, 0, bottom - top, right - left)
        seen[top + box[0] : top + box[2], left + box[1] : left + box[3]] += 1
    return seen


@given(size=sizes, max_slice_nums=st.integers(1, 12), merge_size=st.sampled_from([1, 2, 4]))
def test_deduplication_hands_every_place_on_once(size, max_slice_nums, merge_size):
    options = {"merge_size": merge_size, "max_slice_nums": max_slice_nums}
    twice = plan_slices(*size, settings_of("overlap", **options))
    once = plan_slices(*size, settings_of("overlap_dedup", **options))
    assert len(twice.slices) <= max_slice_nums
    assert (tokens_on_canvas(once, merge_size) == 1).all()
    assert (tokens_on_canvas(twice, merge_size) >= 1).all()
    assert once.canvas_boxes == twice.canvas_boxes
    shown = sum(
        (bottom - top) * (right - left) for top, left, bottom, right in (v.received_box for v in once.slices)
    )
    assert shown == pytest.approx(size[0] * size[1])
    assert once.num_visual_tokens == sum(view.num_visual_tokens for view in once.views)
    for plan in (twice, once):
        turned = plan_slices(*size[::-1], settings_of(plan.policy, **options))
        assert (turned.grid[::-1], turned.num_visual_tokens) == (plan.grid, plan.num_visual_tokens)


def test_learned_queries_cannot_be_deduplicated():
    with pytest.raises(SlicingError, match="overlap_dedup.*expected a token for each block"):
        plan_slices(500, 500, settings_of("overlap_dedup", tokens_per_view=16))


# --- all policies -------------------------------------------------------------------------------------------------


@any_policy
@given(size=sizes, place=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_coordinates_of_views_canvas_and_image_agree(policy, size, place):
    plan = plan_slices(*size, settings_of(policy, max_slice_nums=9))
    boxes = plan.canvas_boxes
    for view, (top, left, bottom, right) in zip(plan.views, boxes, strict=True):
        y, x = place[0] * view.size[0], place[1] * view.size[1]
        in_image = view.to_image(y, x)
        assert view.to_view(*in_image) == pytest.approx((y, x), abs=1e-6)
        assert view.box_to_view(view.box) == pytest.approx((0, 0, *view.size), abs=1e-6)
        assert view.box_to_image((0, 0, *view.size)) == pytest.approx(view.box, abs=1e-6)
        if view is plan.overview:
            continue
        on_canvas = (top + place[0] * (bottom - top), left + place[1] * (right - left))
        assert plan.to_canvas(*in_image) == pytest.approx(on_canvas, abs=1e-6)
        assert plan.to_image(*on_canvas) == pytest.approx(in_image, abs=1e-6)
    assert 0 <= plan.padded < 1 and plan.detail > 0


@any_policy
@given(size=sizes, place=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)))
def test_every_point_is_seen_by_a_token(policy, size, place):
    """By the block that holds it; LLaVA-NeXT rounds what it keeps, and may drop the rim: then by one beside it."""
    config = settings_of(policy, max_slice_nums=9)
    plan = plan_slices(*size, config)
    point = (place[0] * size[0], place[1] * size[1])

    def token_grid(view):
        return view.patch_grid[0] // 2, view.patch_grid[1] // 2

    if not any(view.num_visual_tokens for view in plan.slices):
        assert policy == "anyres"  # an image of a line: it keeps nothing of it
        return
    token, _ = find_sight(plan, point, token_grid)
    for view in plan.views:
        if token < view.num_visual_tokens:
            break
        token -= view.num_visual_tokens
    rows, cols = token_grid(view)
    top, left, _, right = view.token_box or (0, 0, rows, cols)
    row, col = top + token // (right - left), left + token % (right - left)
    y, x = view.to_view(min(point[0], size[0] - 1), min(point[1], size[1] - 1))
    block = 28
    rim = 1e-6 if policy != "anyres" else 1.01 * block
    assert row * block - rim <= y <= (row + 1) * block + rim
    assert col * block - rim <= x <= (col + 1) * block + rim


@any_policy
@given(size=sizes)
def test_sheets_hold_every_patch_once(policy, size):
    plan = plan_slices(*size, settings_of(policy, max_slice_nums=9))
    grids = torch.tensor([view.patch_grid for view in plan.views])
    longest = int(grids.prod(dim=1).max())
    boxes, number = torch.tensor(plan.canvas_boxes), torch.tensor([len(plan.views)])
    sheets = lay_out_sheets(grids, longest, boxes, number)
    held = torch.cat([sheet.patches.flatten() for sheet in sheets])
    assert len(held) == len(held.unique()) == int(grids.prod(dim=1).sum())
    assert find_overviews(boxes, number).tolist() == [view is plan.overview for view in plan.views]


@any_policy
@pytest.mark.parametrize("connector", ["pixel_unshuffle", "cross_attention", "spatial_resampler"])
def test_a_model_takes_every_policy(policy, connector):
    """Alone and in a batch of several sizes; and the answer begins alike."""
    slicing = replace(tiny_slicing(connector), policy=policy, max_visual_tokens=10_000)
    processor = VlmSliceProcessor(
        VlmSliceImageProcessor(**slicing.to_dict()),
        build_byte_tokenizer(),
        one_placeholder=connector == "cross_attention",
    )
    model = tiny_model(connector)
    chats = [chat("what?", noise_image(*size, seed=i)) for i, size in enumerate([(100, 90), (60, 250)])]

    def encode(some):
        return processor.apply_chat_template(
            some, add_generation_prompt=True, tokenize=True, return_dict=True
        )

    def first_logits(some):
        inputs = encode(some)
        with torch.no_grad():
            return model(**inputs).logits[:, -1], model.generate(**inputs, max_new_tokens=3, num_beams=2)

    batch, answers = first_logits(chats)
    for index, single in enumerate(chats):
        alone, answer = first_logits([single])
        torch.testing.assert_close(batch[index : index + 1], alone, atol=2e-4, rtol=1e-3)
        assert torch.equal(answer[0, -3:], answers[index, -3:])


def test_deduplicated_tokens_are_those_of_the_slices():
    """Nothing but the number of tokens changes: views are encoded alike, and what is kept stands in order."""
    model, image = tiny_model("pixel_unshuffle"), noise_image(96, 96)
    tokens, plans = {}, {}
    for policy in ("overlap", "overlap_dedup"):
        slicing = replace(tiny_slicing("pixel_unshuffle"), policy=policy)
        outputs = VlmSliceImageProcessor(**slicing.to_dict())(image)
        [plans[policy]] = outputs.pop("plans")
        with torch.no_grad():
            [tokens[policy]] = model.get_image_features(**outputs).pooler_output
    assert len(tokens["overlap_dedup"]) == plans["overlap_dedup"].num_visual_tokens
    per_view = tokens["overlap"].split([view.num_visual_tokens for view in plans["overlap"].views])
    kept = []
    for view, of_view in zip(plans["overlap_dedup"].views, per_view, strict=True):
        rows, cols = (side // 2 for side in view.patch_grid)
        top, left, bottom, right = view.token_box or (0, 0, rows, cols)
        kept.append(of_view.view(rows, cols, -1)[top:bottom, left:right].flatten(0, 1))
    assert len(per_view) == 5 and len(tokens["overlap"]) > len(tokens["overlap_dedup"])
    assert torch.equal(tokens["overlap_dedup"], torch.cat(kept))


@any_policy
def test_hostile_sizes_make_a_plan_or_an_error(policy):
    for size in EDGE_SIZES:
        try:
            plan = plan_slices(*size, replace(SlicingConfig(), policy=policy))
        except SlicingError:
            continue
        assert plan.num_visual_tokens <= 2048 and math.isfinite(plan.distortion)
