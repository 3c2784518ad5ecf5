"""What an arm takes away from the inputs of a model, and that all the rest stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import CONNECTORS, chat, noise_image, tiny_model, tiny_processor, tiny_slicing

from vlmslice.counting_test.arms import Arm, ArmError, build_arms, check_arm, edit_inputs
from vlmslice.image_processing import VlmSliceImageProcessor
from vlmslice.inference import Assistant
from vlmslice.processing import VlmSliceProcessor
from vlmslice.sheets import find_overviews, lay_out_sheets
from vlmslice.slicing import SlicePlan
from vlmslice.slicing_policies import POLICIES

NO_OVERVIEW, NO_SCHEMA = Arm("adaptive", overview=False), Arm("adaptive", schema=False)
NEITHER = Arm("adaptive", overview=False, schema=False)


def encode_pictures(
    processor: VlmSliceProcessor, images: list[Image.Image], **slicing: Any
) -> tuple[Any, list[tuple[SlicePlan, ...]]]:
    inputs = processor.apply_chat_template(
        [chat("How many?", image) for image in images],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs=slicing,
    )
    plans = [(processor.image_processor.plan(image.height, image.width, **slicing),) for image in images]
    return inputs, plans


def texts(processor: VlmSliceProcessor, inputs: Any) -> list[str]:
    return [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


IMAGES = [noise_image(100, 200, seed=1), noise_image(40, 40, seed=2), noise_image(180, 90, seed=3)]


def test_names() -> None:
    arms = build_arms(["adaptive", "uhd"], ["no-overview", "no-overview,no-schema"])
    assert [arm.name for arm in arms] == [
        "adaptive",
        "adaptive, no overview",
        "adaptive, no overview, no schema",
        "uhd",
        "uhd, no overview",
        "uhd, no overview, no schema",
    ]
    assert build_arms([None]) == [Arm(None)] and Arm(None).name == "as it is"
    with pytest.raises(ArmError, match="did you mean 'no-schema'"):
        build_arms(["adaptive"], ["no-shema"])


@pytest.mark.parametrize("connector", CONNECTORS)
def test_without_schema_no_tag_and_no_place_is_left(connector: str) -> None:
    processor = tiny_processor(connector)
    inputs, plans = encode_pictures(processor, IMAGES)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    edited = edit_inputs(inputs, plans, NO_SCHEMA, processor)
    for name, value in before.items():
        assert torch.equal(inputs[name], value), "the inputs of the plain arm must stay"
    for text, plain in zip(texts(processor, edited), texts(processor, inputs), strict=True):
        tags = ("<|overview|>", "<|slice|>", "<|row|>")
        assert not any(tag in text for tag in tags)
        for tag in tags:
            plain = plain.replace(tag, "")
        assert text == plain
    assert (edited["canvas_boxes"][:, :2] == 0).all()
    sizes = before["canvas_boxes"][:, 2:] - before["canvas_boxes"][:, :2]
    assert torch.equal(edited["canvas_boxes"][:, 2:], sizes)
    for name in ("pixel_values", "target_sizes", "num_views"):
        assert torch.equal(edited[name], before[name])
    # No slice knows of its neighbour: each is a map by itself.
    slices_of_plans = sum(len(plan.views) for [plan] in plans)
    num_patches = edited["pixel_values"].shape[1]
    sheets = lay_out_sheets(edited["target_sizes"], num_patches, edited["canvas_boxes"], edited["num_views"])
    assert len(sheets) == slices_of_plans


@pytest.mark.parametrize("connector", CONNECTORS)
def test_without_overview_the_slices_are_left(connector: str) -> None:
    processor = tiny_processor(connector)
    inputs, plans = encode_pictures(processor, IMAGES)
    edited = edit_inputs(inputs, plans, NO_OVERVIEW, processor)
    assert edited["num_views"].tolist() == [len(plan.slices) for [plan] in plans]
    assert not find_overviews(edited["canvas_boxes"], edited["num_views"]).any()
    is_slice = ~find_overviews(inputs["canvas_boxes"], inputs["num_views"])
    assert 0 < is_slice.sum() < len(is_slice)
    for name in ("pixel_values", "target_sizes", "canvas_boxes"):
        assert torch.equal(edited[name], inputs[name][is_slice])
    for text, plain, [plan] in zip(texts(processor, edited), texts(processor, inputs), plans, strict=True):
        if plan.overview is not None and connector != "cross_attention":
            shown = "<|overview|>" + "<|image|>" * plan.overview.num_visual_tokens
            assert plain.count(shown) == 1
            plain = plain.replace(shown, "")
        assert text == plain


@pytest.mark.parametrize("arm", [NO_OVERVIEW, NO_SCHEMA, NEITHER], ids=lambda arm: arm.name)
@pytest.mark.parametrize("policy", POLICIES)
def test_models_answer_in_every_arm_of_every_policy(policy: str, arm: Arm) -> None:
    slicing = {"policy": policy, "max_visual_tokens": 2000}
    for connector in ("spatial_resampler", "cross_attention"):
        processor, model = tiny_processor(connector), tiny_model(connector)
        inputs, plans = encode_pictures(processor, IMAGES, **slicing)
        edited = edit_inputs(inputs, plans, arm, processor)
        logits = model(**{name: value for name, value in edited.items() if name != "plans"}).logits
        assert logits.isfinite().all()
        # A batch says what its samples say alone, one view and padding included.
        alone, plan = encode_pictures(processor, IMAGES[2:], **slicing)
        alone = edit_inputs(alone, plan, arm, processor)
        last = model(**{name: value for name, value in alone.items() if name != "plans"}).logits[0, -1]
        assert torch.allclose(logits[2, -1], last, atol=1e-3)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_arms_change_what_a_model_sees_of_slices_alone(connector: str) -> None:
    assistant = Assistant(tiny_model(connector), tiny_processor(connector))

    def logits(image: Image.Image, arm: Arm) -> torch.Tensor:
        inputs, plans = encode_pictures(assistant.processor, [image])
        edited = edit_inputs(inputs, plans, arm, assistant.processor)
        return assistant.model(**{name: value for name, value in edited.items() if name != "plans"}).logits[
            0, -1
        ]

    plain = Arm("adaptive")
    for arm in (NO_OVERVIEW, NO_SCHEMA):
        assert not torch.equal(logits(IMAGES[0], arm), logits(IMAGES[0], plain))
        assert torch.equal(logits(IMAGES[1], arm), logits(IMAGES[1], plain))  # one view


def test_assistants_ask_with_edited_inputs() -> None:
    processor = tiny_processor()
    assistant = Assistant(tiny_model(), processor)
    samples = [([image], "How many?") for image in IMAGES]
    seen = []

    def edit(inputs: Any, plans: list[tuple[SlicePlan, ...]]) -> Any:
        seen.append(plans)
        return edit_inputs(inputs, plans, NEITHER, processor)

    plain = assistant.ask_batch(samples, max_new_tokens=6)
    edited = assistant.ask_batch(samples, max_new_tokens=6, edit_inputs=edit)
    assert seen == [[answer.plans for answer in plain]]
    assert edited[0].text != plain[0].text and edited[1].text == plain[1].text


def test_an_arm_that_means_nothing_is_refused() -> None:
    slicing = tiny_slicing("cross_attention").to_dict()
    processor = VlmSliceProcessor(
        VlmSliceImageProcessor(**slicing), tiny_processor().tokenizer, one_placeholder=True
    )
    model = tiny_model("cross_attention", canvas_position=False)
    with pytest.raises(ArmError, match="never told where slices lie"):
        check_arm(NO_SCHEMA, model, processor)
    check_arm(NO_OVERVIEW, model, processor)
    check_arm(NO_SCHEMA, tiny_model("cross_attention"), processor)
    check_arm(NO_SCHEMA, tiny_model(), tiny_processor())
