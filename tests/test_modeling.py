import copy
import json
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny_models import (
    CONNECTORS,
    answer,
    chat,
    encode,
    noise_image,
    tiny_config,
    tiny_model,
    tiny_processor,
)
from torch.nn import functional as F
from transformers import GPT2Config

from vlmslice.data.dense import CELLS_PER_SIDE, HEADS, UNKNOWN
from vlmslice.dense_reader import dense_loss
from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.sheets import find_overviews
from vlmslice.tokenization import build_byte_tokenizer
from vlmslice.vision_encoder import VlmSliceVisionConfig

VOCABULARY = len(build_byte_tokenizer())

all_connectors = pytest.mark.parametrize("connector", CONNECTORS)

# Two images of one sample, no image, many views, one view, a tower of slices.
CHATS = (
    chat("read the line", noise_image(100, 200)),
    chat("what?", noise_image(70, 60, seed=1), noise_image(40, 300, seed=2)),
    chat("no picture here, only words"),
    chat("x", noise_image(24, 30, seed=3)),
    chat("read", noise_image(330, 50, seed=4)),
)


@cache
def shared_model(connector: str = "spatial_resampler") -> VlmSliceForConditionalGeneration:
    """For tests that change nothing in it."""
    return tiny_model(connector)


@cache
def shared_inputs(connector: str = "spatial_resampler", *chosen: int) -> dict[str, torch.Tensor]:
    return encode(tiny_processor(connector), *(CHATS[i] for i in chosen or range(len(CHATS))))


@cache
def batched_answers(connector: str) -> list[list[int]]:
    return answer(shared_model(connector), shared_inputs(connector))


def logits(model: VlmSliceForConditionalGeneration, inputs: dict, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **options).logits


class TestAgreement:
    """One prompt, one answer, whichever way it is computed."""

    @all_connectors
    def test_answers_are_no_constants(self, connector):
        answers = batched_answers(connector)
        assert len({tuple(ids) for ids in answers}) == len(CHATS)
        assert all(len(set(ids)) >= 4 for ids in answers)

    @all_connectors
    def test_batch_is_left_padded_and_mixed(self, connector):
        inputs = shared_inputs(connector)
        assert 0 in inputs["attention_mask"][:, 0] and inputs["attention_mask"][:, -1].all()
        assert inputs["num_views"].unique().numel() > 2
        assert inputs["target_sizes"].unique(dim=0).shape[0] > 1

    @all_connectors
    @pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
    @pytest.mark.parametrize("sample", range(len(CHATS)))
    def test_single_is_batched(self, connector, sample, use_cache):
        single = answer(shared_model(connector), shared_inputs(connector, sample), use_cache=use_cache)
        assert single == [batched_answers(connector)[sample]]

    def test_placeholder_is_no_answer(self):
        """Without a cache, a generated placeholder would be one too many for the images at the next step."""
        model, inputs = tiny_model(), shared_inputs()
        placeholder = model.config.image_token_id
        with torch.no_grad():
            model.language_model.lm_head.weight[placeholder] *= 20
        cached = answer(model, inputs)
        assert cached == answer(model, inputs, use_cache=False)
        assert not any(placeholder in ids for ids in cached)
        model.generation_config.suppress_tokens = None
        assert any(placeholder in ids for ids in answer(model, inputs))

    @all_connectors
    def test_uncached_is_cached(self, connector):
        uncached = answer(shared_model(connector), shared_inputs(connector), use_cache=False)
        assert uncached == batched_answers(connector)

    def test_static_cache_is_dynamic_cache(self):
        static = answer(shared_model(), shared_inputs(), cache_implementation="static")
        assert static == batched_answers("spatial_resampler")

    def test_order_of_samples_is_free(self):
        order = [3, 1, 4, 0, 2]
        answers = answer(shared_model(), shared_inputs("spatial_resampler", *order))
        assert answers == [batched_answers("spatial_resampler")[i] for i in order]

    def test_logits_of_a_batch_are_those_of_its_samples(self):
        """Greedy tokens could agree by luck; largest difference seen 1e-5, of logits up to 21."""
        batched = logits(shared_model(), shared_inputs(), logits_to_keep=1)
        for sample in range(len(CHATS)):
            single = logits(shared_model(), shared_inputs("spatial_resampler", sample), logits_to_keep=1)
            torch.testing.assert_close(batched[sample], single[0], atol=2e-4, rtol=0)

    @all_connectors
    @pytest.mark.parametrize("way", ["set", "load"])
    def test_eager_attention_answers_as_sdpa(self, connector, way, tmp_path):
        if way == "load":
            shared_model(connector).save_pretrained(tmp_path)
            model = VlmSliceForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
        else:
            model = copy.deepcopy(shared_model(connector))
            model.set_attn_implementation("eager")
        assert shared_model(connector).language_model.config._attn_implementation == "sdpa"
        assert model.language_model.config._attn_implementation == "eager"
        assert answer(model, shared_inputs(connector)) == batched_answers(connector)

    @all_connectors
    def test_beams_keep_views_with_their_images(self, connector):
        batched = answer(shared_model(connector), shared_inputs(connector), num_beams=3)
        for sample in range(len(CHATS)):
            single = answer(shared_model(connector), shared_inputs(connector, sample), num_beams=3)
            assert single == [batched[sample]]

    @all_connectors
    def test_several_answers_to_one_prompt(self, connector):
        """The most likely token only: each of the three answers must be the greedy one."""
        sampled = answer(
            shared_model(connector),
            shared_inputs(connector),
            do_sample=True,
            top_k=1,
            num_return_sequences=3,
        )
        assert sampled == [ids for ids in batched_answers(connector) for _ in range(3)]

    def test_language_model_with_absolute_positions(self):
        """GPT-2 learns a vector per position, so left padding moves nothing only if positions skip it."""
        text = GPT2Config(
            n_embd=32, n_layer=2, n_head=2, n_positions=128, vocab_size=VOCABULARY, bos_token_id=None,
            eos_token_id=None, pad_token_id=256,
        )  # fmt: skip
        torch.manual_seed(0)
        model = VlmSliceForConditionalGeneration(tiny_config(text_config=text)).eval()
        with torch.no_grad():
            for parameter in model.language_model.parameters():
                parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)
        batched = answer(model, shared_inputs())
        assert len({tuple(ids) for ids in batched}) == len(CHATS)
        for sample in range(len(CHATS)):
            assert answer(model, shared_inputs("spatial_resampler", sample)) == [batched[sample]]


class TestImagesMatter:
    @all_connectors
    def test_image_changes_the_answer(self, connector):
        processor, model = tiny_processor(connector), shared_model(connector)
        answers = [
            answer(model, encode(processor, chat("read", noise_image(100, 200, seed))))[0]
            for seed in range(4)
        ]
        assert len({tuple(ids) for ids in answers}) == 4

    @all_connectors
    def test_order_of_images_matters(self, connector):
        processor, model = tiny_processor(connector), shared_model(connector)
        one, two = noise_image(70, 60, seed=1), noise_image(70, 60, seed=2)
        there = logits(model, encode(processor, chat("compare", one, two)))
        back = logits(model, encode(processor, chat("compare", two, one)))
        assert (there - back)[0, -1].abs().max() > 0.1

    @all_connectors
    def test_every_view_reaches_the_answer(self, connector):
        model, inputs = shared_model(connector), dict(shared_inputs(connector, 0))
        before = logits(model, inputs)
        for view in range(len(inputs["pixel_values"])):
            pixel_values = inputs["pixel_values"].clone()
            pixel_values[view, 0] += 1.0
            assert (logits(model, inputs | {"pixel_values": pixel_values}) - before).abs().max() > 1e-2

    def test_overview_is_the_first_view_of_a_cut_image(self):
        """An image that is not cut has one view, which is its slice."""
        small, large = [0, 0, 2, 2], [0, 0, 4, 2]
        boxes = torch.tensor([large, large, small, small, small, large, small])
        marks = find_overviews(boxes, torch.tensor([1, 3, 1, 2]))
        assert marks.tolist() == [False, True, False, False, False, True, False]
        assert not find_overviews(torch.tensor([small, small]), torch.tensor([2])).any()

    def test_placeholder_embedding_is_replaced(self):
        """What the embedding table holds for the placeholder itself must not matter."""
        model, inputs = tiny_model(), shared_inputs()
        before = logits(model, inputs)
        with torch.no_grad():
            model.get_input_embeddings().weight[model.config.image_token_id] += 100.0
        assert torch.equal(logits(model, inputs), before)

    def test_visual_tokens_stand_where_their_placeholders_are(self):
        """Causal attention: a change in image k of a prompt shows from its first placeholder on, and not before."""
        model, inputs = shared_model(), dict(shared_inputs("spatial_resampler", 1))
        features = model.get_image_features(
            **{k: inputs[k] for k in ("pixel_values", "target_sizes", "canvas_boxes", "num_views")}
        )
        places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
        before = logits(model, inputs)
        first = 0
        for image, tokens in enumerate(features.pooler_output):
            pixel_values = inputs["pixel_values"].clone()
            pixel_values[inputs["num_views"][:image].sum()] += 1.0
            changed = (logits(model, inputs | {"pixel_values": pixel_values}) - before)[0].abs().amax(
                -1
            ) > 1e-3
            assert int(changed.nonzero()[0]) == int(places[first])
            first += len(tokens)
        assert first == len(places)

    def test_text_alone_is_the_language_model_alone(self):
        model, inputs = shared_model(), shared_inputs("spatial_resampler", 2)
        assert "pixel_values" not in inputs
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, model.language_model(**inputs).logits)

    @all_connectors
    def test_image_features_follow_the_plans(self, connector):
        processor, inputs = tiny_processor(connector), shared_inputs(connector)
        features = shared_model(connector).get_image_features(
            **{k: inputs[k] for k in ("pixel_values", "target_sizes", "canvas_boxes", "num_views")}
        )
        images = [block["image"] for c in CHATS for block in c[0]["content"] if block["type"] == "image"]
        plans = [processor.image_processor.plan(image.height, image.width) for image in images]
        expected = [(plan.num_visual_tokens, 32) for plan in plans]
        assert [tuple(tokens.shape) for tokens in features.pooler_output] == expected
        assert features.last_hidden_state.shape == (*inputs["pixel_values"].shape[:2], 32)


class TestMismatch:
    def inputs(self, *chosen: int) -> dict[str, torch.Tensor]:
        return dict(shared_inputs("spatial_resampler", *chosen))

    def test_too_few_placeholders(self):
        inputs = self.inputs(0)
        row = inputs["input_ids"][0]
        place = (row == shared_model().config.image_token_id).nonzero()[0]
        row = row.clone()
        row[place] = ord("x")
        num_tokens = int((inputs["input_ids"] == shared_model().config.image_token_id).sum())
        with pytest.raises(
            ValueError,
            match=f"^sample 0 has {num_tokens - 1} placeholders in its prompt but its images give {num_tokens} visual "
            "tokens; build both with one VlmSliceProcessor call and keep images in the order of the prompts$",
        ):
            shared_model()(**inputs | {"input_ids": row[None]})

    def test_no_image_for_placeholders(self):
        """Text with placeholders and the images of no one: the sample after the last image is named."""
        inputs, extra = self.inputs(0, 0), self.inputs(0)
        views = {k: extra[k] for k in ("pixel_values", "target_sizes", "canvas_boxes", "num_views")}
        with pytest.raises(ValueError, match="^sample 1 has .* but its images give 0 visual tokens"):
            shared_model()(**inputs | views)

    def test_swapped_images_with_the_right_sum(self):
        """The sum over the batch agrees; checked by sums, each would answer about the other's image."""
        right, swapped = self.inputs(0, 4), self.inputs(4, 0)
        views = {k: swapped[k] for k in ("pixel_values", "target_sizes", "canvas_boxes", "num_views")}
        model = shared_model()
        assert (right["input_ids"] == model.config.image_token_id).sum() == (
            swapped["input_ids"] == model.config.image_token_id
        ).sum()
        with pytest.raises(ValueError, match="^sample 0 has"):
            model(**right | views)
        with pytest.raises(ValueError, match="^sample 0 has"):
            model.generate(**right | views, max_new_tokens=1)

    def test_image_left_over(self):
        inputs, more = self.inputs(2), self.inputs(0, 3)
        views = {k: more[k] for k in ("pixel_values", "target_sizes", "canvas_boxes", "num_views")}
        with pytest.raises(
            ValueError,
            match=r"^2 images \(\d+ visual tokens\) are left over after the last sample's placeholders; build prompts",
        ):
            shared_model()(**inputs | views)

    def test_num_views_of_other_images(self):
        inputs = self.inputs(0)
        num_views = inputs["num_views"] + 1
        with pytest.raises(
            ValueError,
            match=f"^num_views adds up to {int(num_views)} views but pixel_values holds {int(num_views) - 1}; pass",
        ):
            shared_model()(**inputs | {"num_views": num_views})

    def test_pixels_without_ids(self):
        inputs = self.inputs(0)
        embeds = shared_model().get_input_embeddings()(inputs.pop("input_ids"))
        with pytest.raises(ValueError, match="^got pixel_values without input_ids, expected the ids whose"):
            shared_model()(inputs_embeds=embeds, **inputs)

    def test_embeddings_alone(self):
        inputs = self.inputs(2)
        ids = inputs.pop("input_ids")
        model = shared_model()
        embeds = model.get_input_embeddings()(ids)
        with_embeds = model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=6, do_sample=False)
        assert with_embeds.tolist() == [batched_answers("spatial_resampler")[2][:6]]

    def test_merge_size_of_another_processor(self):
        """Patches merged by another size would give other tokens than the prompt was built for."""
        config = shared_model().config.slicing | {"merge_size": 1}
        model = VlmSliceForConditionalGeneration(tiny_config(slicing=config)).eval()
        with pytest.raises(
            ValueError, match="^sample 0 has .* placeholders in its prompt but its images give"
        ):
            model(**self.inputs(0))

    @given(data=st.data())
    @settings(max_examples=40)
    def test_every_wrong_split_is_refused(self, data):
        """Placeholders moved between samples are found, wherever an image boundary is not a sample boundary."""
        tokens = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
        counts = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
        model = shared_model()
        ids = torch.full((len(counts), 12), ord("a"))
        for row, count in zip(ids, counts, strict=True):
            row[:count] = model.config.image_token_id
        boundaries = {sum(tokens[:i]) for i in range(len(tokens) + 1)}
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        if set(ends) <= boundaries and ends[-1] == sum(tokens):
            assert model.get_placeholder_mask(ids, tokens).sum() == sum(tokens)
        else:
            with pytest.raises(ValueError, match="placeholders"):
                model.get_placeholder_mask(ids, tokens)


class TestLoading:
    @all_connectors
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_round_trip(self, connector, tied, tmp_path):
        model = tiny_model(connector, text={"tie_word_embeddings": tied})
        model.save_pretrained(tmp_path)
        loaded, report = VlmSliceForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert not loaded.training
        inputs = shared_inputs(connector)
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))
        assert answer(loaded, inputs) == answer(model, inputs)
        shared = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
        assert shared == tied
        with safe_open(tmp_path / "model.safetensors", "pt") as weights:
            heads = [name for name in weights.keys() if "lm_head" in name]  # noqa: SIM118 - no mapping
        assert bool(heads) == (not tied)

    def test_config_on_disk_names_the_class(self, tmp_path):
        shared_model().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["model_type"] == "vlmslice"
        assert config["architectures"] == ["VlmSliceForConditionalGeneration"]
        assert config["slicing"] == shared_model().config.slicing

    @pytest.mark.parametrize("connector", CONNECTORS)
    def test_bfloat16(self, connector, tmp_path):
        shared_model(connector).save_pretrained(tmp_path)
        model = VlmSliceForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        inputs = shared_inputs(connector)
        assert logits(model, inputs).dtype == torch.bfloat16
        assert len(answer(model, inputs)) == len(CHATS)

    def test_device_map(self, tmp_path):
        """transformers refuses "auto" for models that do not say which modules must stay on one device."""
        shared_model().save_pretrained(tmp_path)
        model = VlmSliceForConditionalGeneration.from_pretrained(tmp_path, device_map="auto")
        assert answer(model, shared_inputs()) == batched_answers("spatial_resampler")

    def test_rotary_vision_encoder(self, tmp_path):
        """timm keeps rotary tables out of the checkpoint: loading has to compute them."""
        vision = VlmSliceVisionConfig(
            architecture="vit_small_patch16_dinov3",
            hidden_size=32,
            timm_kwargs={"depth": 2, "embed_dim": 32, "num_heads": 2},
        )
        model = tiny_model(vision_config=vision)
        model.save_pretrained(tmp_path)
        loaded = VlmSliceForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded, shared_inputs()), logits(model, shared_inputs()))

    def test_canvas_mixer(self, tmp_path):
        """Trained, it changes what the model says of a picture, alone as in a batch; a fresh one is no-op."""
        vision = {"hidden_size": 32, "timm_kwargs": shared_model().config.vision_config.timm_kwargs}
        without = tiny_model(vision_config=VlmSliceVisionConfig(**vision))
        without.save_pretrained(tmp_path / "without")
        config = VlmSliceVisionConfig(**vision, canvas_dilations=[1, 2])
        model = VlmSliceForConditionalGeneration.from_pretrained(tmp_path / "without", vision_config=config)
        inputs = shared_inputs()
        assert torch.equal(logits(model, inputs), logits(without, inputs))
        torch.manual_seed(0)
        for parameter in model.vision_encoder.mixer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        assert not torch.allclose(logits(model, inputs), logits(without, inputs), atol=1e-2)
        model.save_pretrained(tmp_path / "with")
        loaded = VlmSliceForConditionalGeneration.from_pretrained(tmp_path / "with")
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))
        assert answer(loaded, inputs) == [
            found
            for index in range(len(CHATS))
            for found in answer(loaded, shared_inputs("spatial_resampler", index))
        ]

    def test_dense_head_that_the_checkpoint_lacks(self, tmp_path):
        shared_model().save_pretrained(tmp_path)
        loaded = VlmSliceForConditionalGeneration.from_pretrained(tmp_path, dense_loss_weight=0.5)
        weight = loaded.dense_head.projection.weight
        assert 0.05 < weight.std() < 0.2  # uniform in +-32**-0.5
        assert answer(loaded, shared_inputs()) == batched_answers("spatial_resampler")

    def test_own_modules_start_alike_from_config_and_checkpoint(self, tmp_path):
        """A connector that the checkpoint lacks gets its own initialisation, not uninitialised memory."""
        donor = tiny_model("pixel_unshuffle")
        donor.save_pretrained(tmp_path)
        loaded = VlmSliceForConditionalGeneration.from_pretrained(tmp_path, connector="spatial_resampler")
        assert torch.equal(loaded.connector.attention.sharpness, torch.full((4,), 3.0))
        assert loaded.connector.attention.offsets[0].tolist() == [-0.5, -0.5]
        assert not loaded.connector.attention.query.weight.any()
        assert len(answer(loaded, shared_inputs())) == len(CHATS)

    def test_more_tokens(self):
        model = tiny_model()
        model.resize_token_embeddings(VOCABULARY + 40)
        assert model.config.text_config.vocab_size == VOCABULARY + 40
        inputs = shared_inputs()
        assert logits(model, inputs).shape[-1] == VOCABULARY + 40
        assert model(**inputs, labels=inputs["input_ids"]).loss.isfinite()
        assert torch.equal(logits(model, inputs)[..., :VOCABULARY], logits(shared_model(), inputs))


def dense_labels(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    views, patches = inputs["pixel_values"].shape[:2]
    generator = torch.Generator().manual_seed(0)
    return {
        f"label_{name}": torch.randint(classes, (views, patches, CELLS_PER_SIDE**2), generator=generator)
        for name, classes in HEADS.items()
    }


class TestTraining:
    def test_loss_is_the_cross_entropy_of_the_next_token(self):
        inputs = shared_inputs()
        labels = inputs["input_ids"].clone()
        labels[inputs["attention_mask"] == 0] = -100
        labels[:, :-4] = -100
        outputs = shared_model()(**inputs, labels=labels)
        expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(outputs.loss, expected)
        torch.testing.assert_close(outputs.metrics["language_loss"], expected)

    def test_dense_loss_is_added_by_its_weight(self):
        inputs = shared_inputs()
        labels = dense_labels(inputs)
        language, dense = {}, {}
        for weight in (0.25, 0.5):
            model = tiny_model(dense_loss_weight=weight)
            outputs = model(**inputs, **labels, labels=inputs["input_ids"])
            language[weight] = outputs.metrics["language_loss"]
            dense[weight] = (outputs.loss - language[weight]).detach()
            assert {f"{name}_right" for name in HEADS} < outputs.metrics.keys()
        assert language[0.25] == language[0.5]
        torch.testing.assert_close(dense[0.5], 2 * dense[0.25], rtol=1e-3, atol=1e-3)
        assert dense[0.25] > 0

    def test_dense_labels_of_padding_do_not_count(self):
        model, inputs = tiny_model(dense_loss_weight=1.0), shared_inputs()
        labels = dense_labels(inputs)
        before = model(**inputs, **labels, labels=inputs["input_ids"]).loss
        valid = torch.arange(inputs["pixel_values"].shape[1]) < inputs["target_sizes"].prod(1, keepdim=True)
        assert not valid.all()
        for label in labels.values():
            label[~valid] = 1
        assert model(**inputs, **labels, labels=inputs["input_ids"]).loss == before

    def test_cells_of_which_nobody_knows_do_not_count(self):
        """And where nobody knows of any, there is no dense loss."""
        model, inputs = tiny_model(dense_loss_weight=1.0), shared_inputs()
        labels = dense_labels(inputs)
        half = {name: label.clone() for name, label in labels.items()}
        for label in half.values():
            label[:, 1::2] = UNKNOWN
        logits_of_names = model.dense_head(
            model.get_image_features(
                **{k: inputs[k] for k in ("pixel_values", "target_sizes", "canvas_boxes", "num_views")}
            ).last_hidden_state
        )
        valid = torch.arange(inputs["pixel_values"].shape[1]) < inputs["target_sizes"].prod(1, keepdim=True)
        short = {name.removeprefix("label_"): label for name, label in half.items()}
        got, _ = dense_loss(logits_of_names, short, valid)
        expected, _ = dense_loss(
            {name: x[:, ::2] for name, x in logits_of_names.items()},
            {name: label[:, ::2] for name, label in short.items()},
            valid[:, ::2],
        )
        torch.testing.assert_close(got, expected)
        nothing = {name: torch.full_like(label, UNKNOWN) for name, label in labels.items()}
        outputs = model(**inputs, **nothing, labels=inputs["input_ids"])
        assert outputs.auxiliary_loss == 0
        outputs.loss.backward()
        assert model.dense_head.projection.weight.grad.eq(0).all()

    @all_connectors
    def test_every_parameter_learns(self, connector):
        model, inputs = tiny_model(connector).train(), shared_inputs(connector)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

    @all_connectors
    def test_checkpointing_recomputes_encoder_and_language_model(self, connector):
        inputs = shared_inputs(connector)
        gradients, runs = [], []
        for checkpointing in (False, True):
            model = tiny_model(connector).train()
            if checkpointing:
                model.activation_checkpointing_enable()
            num_runs = {"vision": 0, "language": 0}

            def count(kind, num_runs=num_runs):
                def hook(*_):
                    num_runs[kind] += 1

                return hook

            model.vision_encoder.vit.blocks[0].register_forward_pre_hook(count("vision"))
            model.language_model.model.layers[0].mlp.register_forward_pre_hook(count("language"))
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
            runs.append(num_runs)
        assert runs == [{"vision": 1, "language": 1}, {"vision": 2, "language": 2}]
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, msg=name)

    def test_checkpointing_ends(self):
        model, inputs = tiny_model().train(), shared_inputs()
        model.activation_checkpointing_enable()
        assert model.vision_encoder.gradient_checkpointing
        model(**inputs)
        assert model.vision_encoder.vit.grad_checkpointing
        model.eval()
        with torch.no_grad():
            model(**inputs)
        assert not model.vision_encoder.vit.grad_checkpointing
        model.train().activation_checkpointing_disable()
        model(**inputs)
        assert not model.vision_encoder.vit.grad_checkpointing

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_lora_leaves_the_vision_encoder_alone(self, checkpointing, tmp_path):
        inputs = shared_inputs()
        base = tiny_model()
        if checkpointing:
            base.activation_checkpointing_enable()
        torch.manual_seed(0)
        model = get_peft_model(
            base, LoraConfig(r=2, target_modules="all-linear", exclude_modules=r".*vision_encoder\..*")
        ).train()
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in name for name in trained)
        assert not any("vision_encoder" in name for name in trained)
        assert any("connector" in name for name in trained)
        assert any("language_model" in name for name in trained)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        named = dict(model.named_parameters())
        assert all(torch.equal(named[name], value) for name, value in before.items())
        assert any(
            not torch.equal(named[name], value) for name, value in trained.items() if "language" in name
        )
        assert any(
            not torch.equal(named[name], value) for name, value in trained.items() if "connector" in name
        )
        model.eval()
        with torch.no_grad():
            after = model(**inputs).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, after)
            merged = loaded.merge_and_unload()
            torch.testing.assert_close(merged(**inputs).logits, after, atol=1e-2, rtol=1e-3)

    def test_one_step_lowers_the_loss(self):
        model, inputs = tiny_model().train(), shared_inputs()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        losses = []
        for _ in range(2):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] < losses[0]


@pytest.mark.parametrize("connector", [*CONNECTORS, "first_fit"])
def test_training_on_text_alone_gives_every_weight_a_gradient(connector: str) -> None:
    """Zero for what sees; so processes whose batches hold no image keep in step with the others."""
    options = {}
    if connector == "first_fit":
        connector, options = "cross_attention", {"first_fit_layers": [1], "guide_loss_weight": 1.0}
    model = tiny_model(connector, **options)
    inputs = encode(tiny_processor(connector), chat("How many?"), chat("Two and two?"))
    assert "pixel_values" not in inputs
    expected = model(**inputs, labels=inputs["input_ids"]).loss  # in evaluation nothing is run but the text
    expected.backward()
    expected_gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    guide = {}
    if options:
        guide = {"guide_entries": torch.zeros(0, 4, dtype=torch.int64), "guide_shares": torch.zeros(0)}
    loss = model.train()(**inputs, labels=inputs["input_ids"], **guide).loss
    loss.backward()
    assert torch.equal(loss, expected)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = expected_gradients.get(name)
        assert torch.equal(parameter.grad, torch.zeros_like(parameter) if gradient is None else gradient), (
            name
        )


def test_batch_without_any_label_has_a_loss_of_zero() -> None:
    model = tiny_model().train()
    inputs = encode(tiny_processor(), chat("How many?", noise_image(60, 60)))
    loss = model(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
