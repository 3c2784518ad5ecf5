import dataclasses

import numpy as np
import pytest
import torch
from tiny_models import CONNECTORS, chat, encode, noise_image, tiny_model, tiny_processor, tiny_slicing

from vlmslice.attention_map import AttentionError, AttentionMap, _group, _spell_pieces, attend, locate_tokens
from vlmslice.coverage import LAG
from vlmslice.inference import Assistant
from vlmslice.slicing import SlicePlan, SlicingConfig, plan_slices
from vlmslice.slicing_policies import POLICIES
from vlmslice.tokenization import build_byte_tokenizer

SIZES = [(100, 200), (200, 100), (60, 60), (40, 300), (333, 97)]


def plan_of(height: int, width: int, **options) -> SlicePlan:
    return plan_slices(height, width, tiny_slicing(**options))


def map_of(plan: SlicePlan, weights: np.ndarray, merge_size: int = 2) -> AttentionMap:
    boxes, views = locate_tokens(plan, merge_size, None)
    rows = np.atleast_2d(weights)
    text = "x" * len(rows)
    return AttentionMap(
        plan, "?", text, tuple(text), (False,) * len(rows), rows, 1 - rows.sum(1), boxes, views
    )


def one_hot(number: int, index: int) -> np.ndarray:
    return np.eye(number)[index]


@pytest.mark.parametrize("height,width", SIZES)
@pytest.mark.parametrize(
    "options", [{"tokens_per_view": 3}, *({"policy": policy} for policy in POLICIES)], ids=lambda o: str(o)
)
def test_boxes_tile_what_is_kept_of_each_view(height: int, width: int, options: dict) -> None:
    plan = plan_of(height, width, max_visual_tokens=4096, **options)
    boxes, views = locate_tokens(plan, 2, options.get("tokens_per_view"))
    assert len(boxes) == plan.num_visual_tokens
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert (areas > 0).all()
    for number, view in enumerate(plan.views):
        own = boxes[views == number]
        assert len(own) == view.num_visual_tokens
        if not len(own):  # `anyres` drops what is padded
            assert view.token_box is not None
            continue
        assert len({tuple(box) for box in own.round(6)}) == len(own)
        kept = np.array([*own.min(axis=0)[:2], *own.max(axis=0)[2:]])
        assert areas[views == number].sum() == pytest.approx((kept[2] - kept[0]) * (kept[3] - kept[1]))
        if view.token_box is None:
            assert np.allclose(kept, view.box)


def test_tokens_of_an_overlap_that_are_dropped_leave_no_gap() -> None:
    """Each place has as many tokens as it would have without overlap: heat of equal density is even."""
    plan = plan_of(300, 300, policy="overlap_dedup", max_visual_tokens=4096)
    boxes, views = locate_tokens(plan, 2, None)
    sliced = views > 0 if plan.overview else views >= 0
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * sliced
    heat = map_of(plan, areas).heat(areas, 300, 300)
    assert np.allclose(heat, 1)


@pytest.mark.parametrize(
    "connector,policy",
    [*((connector, "adaptive") for connector in CONNECTORS), *(("cross_attention", p) for p in POLICIES)],
)
def test_boxes_are_where_the_model_takes_its_tokens_to_lie(connector: str, policy: str) -> None:
    """The canvas places of `ImageFeatures`, which the model embeds, are an oracle of their own."""
    model, processor = tiny_model(connector), tiny_processor(connector)
    options = {"policy": policy, "max_visual_tokens": 4096}
    inputs = dict(
        processor.apply_chat_template(
            [chat("?", noise_image(100, 200))], tokenize=True, return_dict=True, processor_kwargs=options
        )
    )
    views = ("pixel_values", "target_sizes", "canvas_boxes", "num_views", "token_boxes")
    with torch.no_grad():
        features = model.get_image_features(**{name: inputs[name] for name in views if name in inputs})
    per_view = {"tokens_per_view": 3} if connector == "resampler" else {}
    plan = plan_of(100, 200, **options, **per_view)
    boxes, _ = locate_tokens(plan, 2, model.config.slicing["tokens_per_view"])
    is_sharp = features.can_point[0].numpy()
    assert len(boxes) == len(is_sharp)
    middles = np.stack([boxes[:, [0, 2]].mean(axis=1), boxes[:, [1, 3]].mean(axis=1)], axis=1)
    expected = [plan.to_image(row, col) for row, col in features.places[0].tolist()]
    assert np.allclose(middles[is_sharp], np.array(expected)[is_sharp], atol=1e-3)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_weights_and_nothing_sum_to_one_and_are_those_of_the_step(connector: str) -> None:
    model = tiny_model(connector)
    assistant, image = Assistant(model, tiny_processor(connector)), noise_image(100, 200)
    found = attend(assistant, image, "what?", max_new_tokens=4, layers=[0, 1], heads=None)
    assert found.weights.shape == (4, found.plan.num_visual_tokens)
    assert np.allclose(found.weights.sum(axis=1) + found.nothing, 1, atol=1e-5)
    assert (found.weights > 0).all() and (found.nothing > 0).all()
    assert found.answer == assistant.ask([image], "what?", max_new_tokens=4).text

    # Each row is the attention of the last id of the sequence so far, from which the token is predicted.
    inputs = encode(assistant.processor, chat("what?", image))
    model.set_attn_implementation({"text_config": "eager"})
    for row in found.weights:
        with torch.no_grad():
            output = model(**inputs, output_attentions=True)
        attentions = output.attentions if model.cross_attention is None else output.cross_attentions
        last = torch.stack([layer[0, :, -1] for layer in attentions]).mean(dim=(0, 1))
        is_visual = inputs["input_ids"][0] == model.config.image_token_id
        own = last[:-1] if model.cross_attention is not None else last[is_visual]
        assert np.allclose(own.numpy(), row, atol=1e-5)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], output.logits[:, -1:].argmax(-1)], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])


def test_weights_under_a_coverage_penalty_are_those_that_chose_the_answer(monkeypatch) -> None:
    """Held back by nothing that counts, they are those of one run; held back, what was read lights up less."""
    image, length = noise_image(100, 200), 6 * LAG
    monkeypatch.setattr("vlmslice.coverage.SHARP", 0.0)  # nobody has taught it where to look

    def look(penalty: float) -> tuple[str, np.ndarray]:
        model = tiny_model("cross_attention", cross_attention_gate=1.0, coverage_penalty=penalty)
        assistant = Assistant(model, tiny_processor("cross_attention"))
        found = attend(assistant, image, "what?", max_new_tokens=length)
        assert found.answer == assistant.ask([image], "what?", max_new_tokens=length).text
        return found.answer, found.weights

    (answer, weights), (almost_same, almost), (_, held_back) = look(0.0), look(1e-4), look(20.0)
    assert almost_same == answer and np.allclose(almost, weights, atol=1e-4)
    assert np.allclose(held_back[: LAG + 1], weights[: LAG + 1], atol=1e-5)
    # Weights spread over all tokens cover all of them in the end, and more so the ones looked at most.
    assert held_back.sum(axis=0).max() < weights.sum(axis=0).max()


def test_attention_implementation_is_left_as_it_was() -> None:
    model = tiny_model("pixel_unshuffle")
    attend(Assistant(model, tiny_processor("pixel_unshuffle")), noise_image(60, 60), "?", max_new_tokens=2)
    assert model.language_model.config._attn_implementation == "sdpa"


def test_outputs_hold_no_weights_unasked() -> None:
    model = tiny_model("cross_attention")
    with torch.no_grad():
        output = model(**encode(tiny_processor("cross_attention"), chat("?", noise_image(60, 60))))
    assert output.cross_attentions is None


@pytest.mark.parametrize("height,width", SIZES)
def test_planted_attention_lights_its_token_and_nothing_else(height: int, width: int) -> None:
    plan = plan_of(height, width)
    for index in (0, plan.num_visual_tokens // 2, plan.num_visual_tokens - 1):
        attention = map_of(plan, one_hot(plan.num_visual_tokens, index))
        heat = attention.heat(attention.weights[0], height, width)
        top, left, bottom, right = attention.boxes[index]
        inside = heat[int(np.floor(top)) : int(np.ceil(bottom)), int(np.floor(left)) : int(np.ceil(right))]
        assert heat.sum() == pytest.approx(1)
        assert inside.sum() == pytest.approx(1)
        assert heat[int((top + bottom) / 2), int((left + right) / 2)] > 0


@pytest.mark.parametrize("height,width", SIZES)
def test_heat_keeps_the_weight_at_any_resolution(height: int, width: int) -> None:
    plan = plan_of(height, width)
    weights = np.random.default_rng(0).random(plan.num_visual_tokens)
    attention = map_of(plan, weights / weights.sum() / 2)
    for size in [(height, width), (37, 53), (1, 1), (height * 2, width)]:
        assert attention.heat(attention.weights[0], *size).sum() == pytest.approx(0.5)


def test_heat_beyond_the_image_is_cut_off() -> None:
    plan = plan_of(60, 60)
    padded = dataclasses.replace(plan.slices[0], box=(-60, 0, 120, 60))
    attention = map_of(dataclasses.replace(plan, slices=(padded,)), np.full(plan.num_visual_tokens, 1.0))
    share = attention.heat(attention.weights[0], 60, 60).sum() / plan.num_visual_tokens
    assert share == pytest.approx(1 / 3)


@pytest.mark.parametrize("height,width", SIZES)
def test_map_of_the_transposed_image_is_the_transposed_map(height: int, width: int) -> None:
    plan, turned = plan_of(height, width), plan_of(width, height)
    weights = np.random.default_rng(1).random(plan.num_visual_tokens)
    boxes, _ = locate_tokens(plan, 2, None)
    turned_boxes, _ = locate_tokens(turned, 2, None)
    place = {tuple(box): index for index, box in reversed(list(enumerate(boxes[:, [1, 0, 3, 2]].round(6))))}
    moved = np.array([weights[place[tuple(box)]] for box in turned_boxes.round(6)])
    heat = map_of(plan, weights).heat(weights, height, width)
    assert np.allclose(map_of(turned, moved).heat(moved, width, height), heat.T)


def test_map_of_the_flipped_weights_is_the_flipped_map() -> None:
    """Slices of equal sides: flipping the weights of each row of tokens flips the picture."""
    plan = plan_slices(256, 512, SlicingConfig(policy="uhd", scale_resolution=128, patch_size=16))
    weights = np.random.default_rng(2).random(plan.num_visual_tokens)
    attention = map_of(plan, weights)
    flipped = attention.boxes[:, [0, 3, 2, 1]] * (1, -1, 1, -1) + (0, 512, 0, 512)
    turned = dataclasses.replace(attention, boxes=flipped)
    assert np.allclose(turned.heat(weights, 256, 512), attention.heat(weights, 256, 512)[:, ::-1])


def test_words_characters_and_points() -> None:
    tokenizer = build_byte_tokenizer()
    ids = tokenizer("Né x", add_special_tokens=False).input_ids
    pieces, is_location = _spell_pieces(tokenizer, [1007, 1009, 1002, 1003, *ids], 1000)
    assert pieces == ("7", "9", "2", "3", "N", "", "é", " ", "x")
    assert is_location == (True,) * 4 + (False,) * 5
    words = _group(pieces, is_location, by_word=True)
    assert words == [("point 1", (0, 1)), ("point 2", (2, 3)), ("Né", (4, 5, 6)), ("x", (8,))]
    characters = _group(pieces, is_location, by_word=False)
    assert characters[2:] == [("N", (4,)), ("é", (5, 6)), ("x", (8,))]


def test_words_of_subword_tokens() -> None:
    assert _group((" Hel", "lo", " you", "\n", "."), (False,) * 5, by_word=True) == [
        ("Hello", (0, 1)), ("you", (2,)), (".", (4,)),
    ]  # fmt: skip


def test_part_is_the_mean_of_its_tokens() -> None:
    plan = plan_of(60, 60)
    num = plan.num_visual_tokens
    attention = map_of(plan, np.stack([one_hot(num, 0), one_hot(num, 1)]))
    [part] = attention.parts()
    assert part.label == "xx" and part.weights[:3].tolist() == [0.5, 0.5, 0.0]
    assert [part.tokens for part in attention.parts("character")] == [(0,), (1,)]
    with pytest.raises(AttentionError, match="expected 'word' or 'character'"):
        attention.parts("letter")


@pytest.mark.parametrize(
    "options,message",
    [({"layers": [9]}, "no layer 9"), ({"heads": [4]}, "no head 4"), ({"heads": []}, "no head to look at")],
)
def test_unknown_layers_and_heads(options: dict, message: str) -> None:
    assistant = Assistant(tiny_model("cross_attention"), tiny_processor("cross_attention"))
    with pytest.raises(AttentionError, match=message):
        attend(assistant, noise_image(60, 60), "?", max_new_tokens=2, **options)
