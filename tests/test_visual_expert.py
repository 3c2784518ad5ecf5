import copy

import pytest
import torch
from tiny_models import answer, chat, encode, noise_image, tiny_config, tiny_model, tiny_processor
from transformers import AutoModelForImageTextToText, GemmaConfig, GPT2Config, LlamaConfig, Qwen3Config

from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.tokenization import build_byte_tokenizer
from vlmslice.training.freezing import freeze

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": len(build_byte_tokenizer()),
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# Gemma scales and ties its embeddings; Qwen3 normalises queries and keys.
LANGUAGE_MODELS = {
    "llama": LlamaConfig(**SIZES),
    "gemma": GemmaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, attention_bias=True),
}
CHATS = (
    chat("read", noise_image(100, 200)),
    chat("what is in these?", noise_image(70, 60, seed=1), noise_image(40, 300, seed=2)),
    chat("no picture here"),
)

every_language_model = pytest.mark.parametrize("language", LANGUAGE_MODELS)


def build(language: str = "llama", expert: bool = True, **options) -> VlmSliceForConditionalGeneration:
    """A model whose language weights are loud enough for its answers to differ; the experts are copies of them."""
    text = copy.deepcopy(LANGUAGE_MODELS[language])
    options = {"text_config": text, "visual_expert_interval": int(expert)} | options
    model = tiny_model(tie_word_embeddings=text.tie_word_embeddings, **options)
    if text.tie_word_embeddings:
        # Else an id would find its own embedding again, and be repeated for ever.
        model.get_input_embeddings().weight.data /= 50
    if model.visual_expert is not None:
        model.visual_expert.reset_parameters()
    return model


def inputs(*chosen: int) -> dict:
    return encode(tiny_processor(), *(CHATS[i] for i in chosen or range(len(CHATS))))


def logits(model, batch: dict, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **options).logits


def train(model, num_steps: int = 3) -> VlmSliceForConditionalGeneration:
    """With only the expert to train."""
    parts = {name for name, part in model.named_children() if list(part.parameters())}
    freeze(model, *(parts - {"visual_expert"}))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    batch = inputs()
    model.train()
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    return model.eval()


@every_language_model
class TestStart:
    def test_begins_as_the_model_without(self, language):
        with_expert, without = (logits(build(language, expert), inputs()) for expert in (True, False))
        assert without.std() > 0.1
        torch.testing.assert_close(with_expert, without, atol=1e-6, rtol=1e-6)

    def test_every_expert_is_used(self, language):
        """A copy that nothing runs would pass for a good start, too."""
        before, batch = logits(build(language), inputs(0)), inputs(0)
        for number in range(2):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp"):
                model = build(language)
                with torch.no_grad():
                    for parameter in model.visual_expert.layers[number][name].parameters():
                        parameter.mul_(-0.5)
                assert not torch.allclose(logits(model, batch), before, atol=1e-3), (number, name)


@every_language_model
class TestTrained:
    def test_text_alone_is_answered_as_before_bit_for_bit(self, language):
        model, without = train(build(language)), build(language, expert=False)
        text = inputs(2)
        assert torch.equal(logits(model, text), logits(without, text))
        assert torch.equal(logits(model, text), logits(without.language_model, text))
        assert answer(model, text) == answer(without, text)
        assert not torch.allclose(logits(model, inputs(0)), logits(without, inputs(0)), atol=1e-2)

    def test_text_before_an_image_and_beside_one_is_as_before(self, language):
        """Attention is causal: what stands before the first visual token knows nothing of it."""
        model, without, batch = train(build(language)), build(language, expert=False), inputs()
        is_visual = batch["input_ids"] == model.config.image_token_id
        before = (is_visual.cumsum(1) == 0) & batch["attention_mask"].bool()
        assert before[0].any() and before[2].any()
        difference = (logits(model, batch) - logits(without, batch)).abs().amax(-1)
        assert difference[before].max() < 2e-5
        assert difference[is_visual].min() > 1e-3

    def test_saved_is_loaded(self, language, tmp_path):
        model = train(build(language))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        assert loaded.config.visual_expert_interval == 1
        assert torch.equal(logits(loaded, inputs()), logits(model, inputs()))

    def test_batch_with_and_without_cache_is_single(self, language):
        model = train(build(language))
        batch = inputs()
        assert 0 in batch["attention_mask"][:, 0]
        answers = answer(model, batch)
        assert len({tuple(ids) for ids in answers}) == len(CHATS)
        assert answer(model, batch, use_cache=False) == answers
        for sample in range(len(CHATS)):
            assert answer(model, inputs(sample)) == [answers[sample]]
            single = logits(model, inputs(sample), logits_to_keep=1)
            torch.testing.assert_close(
                logits(model, batch, logits_to_keep=1)[sample], single[0], atol=2e-4, rtol=0
            )


class TestGradients:
    def test_reach_what_trains_and_nothing_else(self):
        model, batch = build().train(), inputs()
        freeze(model, "vision_encoder", "language_model")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        assert reached == {"connector", "canvas_position", "visual_expert"}
        *_, last = model.visual_expert.layers
        unused = set(last["o_proj"].parameters()) | set(last["mlp"].parameters())
        unused |= set(last["q_proj"].parameters())
        for name, parameter in model.visual_expert.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.any() or parameter in unused, name

    def test_language_weights_learn_from_text_positions_only(self):
        """The language model's MLP of the last layer sees no visual token, so these change nothing in its gradient."""
        model, batch = build().train(), inputs(0)
        seen = []
        model.language_model.model.layers[-1].mlp.gate_proj.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].shape)
        )
        model(**batch)
        num_text = int((batch["input_ids"] != model.config.image_token_id).sum())
        assert seen == [(1, num_text, 32)]

    def test_batch_of_texts_gives_gradients_of_zero(self):
        """So that all processes have gradients for the same weights, whatever their samples."""
        model, batch = build().train(), inputs(2)
        freeze(model, "language_model")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        for name, parameter in model.visual_expert.named_parameters():
            assert parameter.grad is not None and not parameter.grad.any(), name

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_changes_nothing(self, reentrant):
        gradients = []
        for checkpointing in (False, True):
            model, batch = build().train(), inputs()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model(**batch, labels=batch["input_ids"]).loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


class TestBuilding:
    def test_saved_without_and_loaded_with_an_expert_begins_as_it_was(self, tmp_path):
        """The weights that are missing are copied, not left to chance."""
        without = build(expert=False)
        without.save_pretrained(tmp_path)
        model = VlmSliceForConditionalGeneration.from_pretrained(tmp_path, visual_expert_interval=1).eval()
        torch.testing.assert_close(logits(model, inputs()), logits(without, inputs()), atol=1e-6, rtol=1e-6)

    def test_interval(self):
        model = build(text_config=LlamaConfig(**SIZES | {"num_hidden_layers": 5}), visual_expert_interval=2)
        assert list(model.visual_expert.chosen) == [1, 3] and len(model.visual_expert.layers) == 2

    def test_names_of_the_language_weights_stay(self):
        names = {name for name, _ in build().named_parameters()}
        assert {name for name, _ in build(expert=False).named_parameters()} < names
        assert "visual_expert.layers.0.mlp.gate_proj.weight" in names

    def test_copy_has_its_own_experts(self):
        model, batch = build(), inputs()
        before = logits(model, batch)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.visual_expert.parameters():
                parameter.zero_()
        assert not torch.allclose(logits(twin, batch), before, atol=1e-2)
        assert torch.equal(logits(model, batch), before)

    def test_other_connectors(self):
        for connector in ("resampler", "pixel_unshuffle"):
            model = tiny_model(connector, visual_expert_interval=1)
            batch = encode(tiny_processor(connector), *CHATS)
            before = logits(model, batch)
            with torch.no_grad():
                for parameter in model.visual_expert.parameters():
                    parameter.mul_(0.5)
            assert not torch.allclose(logits(model, batch), before)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"connector": "cross_attention"}, "visual_expert_interval is 1 with connector 'cross_attention', whose"),
            ({"visual_expert_interval": 3}, "visual_expert_interval is 3, expected 1 to the 2 layers"),
            ({"text_config": GPT2Config(n_embd=32, n_layer=2, n_head=2)}, "GPT2Block holds ln_1, attn, .*, expected"),
        ],
    )  # fmt: skip
    def test_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            VlmSliceForConditionalGeneration(tiny_config(**{"visual_expert_interval": 1} | options))
