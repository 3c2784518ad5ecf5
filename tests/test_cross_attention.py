"""The connector `cross_attention`; how its answers agree, in any batch and with any cache, is in test_modeling.py."""

import copy

import pytest
import torch
from tiny_models import answer, chat, encode, noise_image, tiny_config, tiny_model, tiny_processor
from transformers import GPT2Config

from vlmslice.cross_attention import GatedCrossAttention, find_decoder_layers
from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.training.freezing import freeze

CHATS = (
    chat("read", noise_image(100, 200)),
    chat("what?", noise_image(70, 60, seed=1), noise_image(40, 300, seed=2)),
    chat("no picture here"),
)


def build(**options) -> VlmSliceForConditionalGeneration:
    return tiny_model("cross_attention", **options)


def inputs() -> dict:
    return encode(tiny_processor("cross_attention"), *CHATS)


def logits(model, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


class TestStart:
    def test_closed_gates_are_exactly_the_language_model_alone(self):
        """Left out of the prompt, the image is there as a number only."""
        model, batch = build(cross_attention_gate=0.0), inputs()
        other = dict(batch, pixel_values=batch["pixel_values"] + 1)
        assert torch.equal(logits(model, batch), logits(model, other))
        embeds = model.get_input_embeddings()(batch["input_ids"])
        mask = batch["input_ids"] == model.config.image_token_id
        numbers = model.cross_attention.number_images(2, embeds)
        embeds[mask] = numbers[[0, 0, 1]]
        with torch.no_grad():
            alone = model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
        assert torch.equal(logits(model, batch), alone.logits)

    def test_closed_gates_learn(self):
        model, batch = build(cross_attention_gate=0.0).train(), inputs()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(layer.gate.grad.abs() > 0 for layer in model.cross_attention.layers)

    def test_interval(self):
        model = build(text={"num_hidden_layers": 5}, cross_attention_interval=2)
        assert list(model.cross_attention.chosen) == [1, 3] and len(model.cross_attention.layers) == 2

    def test_heads_of_first_fit_add_nothing_either(self):
        options = {"cross_attention_gate": 0.0, "location_token_id": 100}
        without, batch = build(**options), inputs()
        model = build(first_fit_layers=[0, 1], **options)
        model.load_state_dict(without.state_dict(), strict=False)
        assert torch.equal(logits(model, batch), logits(without, batch))


@pytest.fixture(scope="module")
def adapted() -> VlmSliceForConditionalGeneration:
    """Gates that began at 0 and were opened by training, with a frozen language model."""
    model = build(cross_attention_gate=0.0)
    freeze(model, "vision_encoder", "language_model")
    return train(model, num_steps=40)


def train(model, num_steps: int):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    batch = inputs()
    model.train()
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    return model.eval()


class TestAdapter:
    """Trained beside a language model that stays as it is."""

    def test_gradients_reach_gates_first_and_then_the_rest(self):
        model, batch = build(cross_attention_gate=0.0).train(), inputs()
        freeze(model, "vision_encoder", "language_model")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        of_the_gates = {f"cross_attention.layers.{i}.gate" for i in range(2)}
        reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == of_the_gates
        train(model, num_steps=1)
        model.zero_grad()
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()} == trained
        assert {name.split(".")[0] for name in trained} == {"connector", "canvas_position", "cross_attention"}

    def test_gates_have_opened(self, adapted):
        assert all(layer.gate.abs() > 0.1 for layer in adapted.cross_attention.layers)
        batch = inputs()
        other = dict(batch, pixel_values=batch["pixel_values"] + 1)
        assert (logits(adapted, batch) - logits(adapted, other)).abs()[:2, -1].max() > 1e-2

    def test_text_alone_is_answered_as_before_bit_for_bit(self, adapted):
        text, alone = encode(tiny_processor("cross_attention"), CHATS[2]), build().language_model
        assert torch.equal(logits(adapted, text), logits(alone, text))

    def test_batch_with_and_without_cache_is_single(self, adapted):
        answers = answer(adapted, inputs())
        assert len({tuple(ids) for ids in answers}) == len(CHATS)
        assert answer(adapted, inputs(), use_cache=False) == answers
        for sample, chat_of_sample in enumerate(CHATS):
            single = encode(tiny_processor("cross_attention"), chat_of_sample)
            assert answer(adapted, single) == [answers[sample]]

    def test_saved_is_loaded(self, adapted, tmp_path):
        adapted.save_pretrained(tmp_path)
        loaded = VlmSliceForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert torch.equal(logits(loaded, inputs()), logits(adapted, inputs()))


class TestMemory:
    def test_text_alone_is_the_language_model_alone(self):
        """Even in a batch with images: where nothing is, nothing is found."""
        model, batch = build(), inputs()
        with torch.no_grad():
            alone = model.language_model(
                input_ids=batch["input_ids"][2:], attention_mask=batch["attention_mask"][2:]
            ).logits[0]
        real = batch["attention_mask"][2].bool()
        torch.testing.assert_close(logits(model, batch)[2][real], alone[real], atol=1e-4, rtol=0)

    def test_memory_of_one_batch_does_not_reach_the_next(self):
        model = build()
        text = encode(tiny_processor("cross_attention"), CHATS[2])
        before = logits(model, text)
        logits(model, inputs())
        assert torch.equal(logits(model, text), before)

    def test_prompt_holds_one_placeholder_for_an_image(self):
        batch = inputs()
        counts = (batch["input_ids"] == tiny_config().image_token_id).sum(dim=1)
        assert counts.tolist() == [1, 2, 0]

    def test_other_processor_is_refused(self):
        batch = encode(tiny_processor(), CHATS[0])
        with pytest.raises(
            ValueError, match="^the prompts hold .* placeholders for 1 images, expected one for each"
        ):
            build()(**batch)

    def test_processor_keeps_its_placeholders(self, tmp_path):
        processor = tiny_processor("cross_attention")
        processor.save_pretrained(tmp_path)
        loaded = type(processor).from_pretrained(tmp_path)
        assert loaded.one_placeholder
        assert encode(loaded, *CHATS)["input_ids"].equal(inputs()["input_ids"])

    def test_gradient_checkpointing_changes_nothing(self):
        gradients = []
        for checkpointing in (False, True):
            model, batch = build().train(), inputs()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model(**batch, labels=batch["input_ids"]).loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)

    def test_copy_looks_with_its_own_layers(self):
        model, batch = build(), inputs()
        before = logits(model, batch)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for layer in twin.cross_attention.layers:
                layer.gate.zero_()
        assert not torch.equal(logits(twin, batch), before)
        assert torch.equal(logits(model, batch), before)


class TestAttention:
    def test_kernel_and_plain_products_agree(self):
        torch.manual_seed(0)
        layer = GatedCrossAttention(32, 4, 8, 1.0)
        hidden, keys, values = torch.randn(2, 5, 32), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
        mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
        mask[1, ..., 2:6] = False
        fused, none = layer(hidden, keys, values, mask)
        plain, weights = layer(hidden, keys, values, mask, with_weights=True)
        assert none is None
        torch.testing.assert_close(fused, plain)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
        assert not weights[1, ..., 2:6].any()


class TestLanguageModels:
    def test_layers_of_another_language_model(self):
        text = GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=600)
        model = VlmSliceForConditionalGeneration(
            tiny_config("cross_attention", text_config=text, cross_attention_gate=1.0)
        )
        assert len(model.cross_attention.layers) == 3
        assert find_decoder_layers(model.language_model) is model.language_model.transformer.h
        batch = inputs()
        other = dict(batch, pixel_values=batch["pixel_values"] + 1)
        assert not torch.equal(logits(model, batch), logits(model, other))

    def test_language_model_without_layers_is_refused(self):
        model = build().language_model
        model.config.num_hidden_layers = 7
        with pytest.raises(ValueError, match="^LlamaForCausalLM has no list of 7 layers, expected one"):
            find_decoder_layers(model)
