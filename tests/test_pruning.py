"""Depth pruning: what is measured, what stays consistent, and what is refused."""

import pytest
import torch
from conftest import Vlmslice, assert_user_error
from tiny_models import answer, chat, encode, noise_image, tiny_model, tiny_processor

from vlmslice import VlmSliceForConditionalGeneration
from vlmslice.shrinking.pruning import (
    PruningError,
    choose_groups,
    layer_groups,
    measure_influence,
    prune,
    remove_layers,
    rendered_batches,
)

NUM_LAYERS = 4


def deep_model(connector: str = "cross_attention", **options) -> VlmSliceForConditionalGeneration:
    if connector == "cross_attention":
        options.setdefault("first_fit_layers", [1, 3] if "cross_attention_interval" not in options else [])
    model = tiny_model(connector, text={"num_hidden_layers": NUM_LAYERS}, **options)
    if model.cross_attention is not None:
        # Heads of first fit find nothing as they are initialised; these must tell one another apart.
        torch.manual_seed(5)
        for head in model.cross_attention.first_fit.values():
            torch.nn.init.normal_(head.output.weight, std=0.2)
            torch.nn.init.zeros_(head.threshold)
    return model


def make_identity(model: VlmSliceForConditionalGeneration, layer: int) -> None:
    """A layer that adds nothing, with all that stands in front of it."""
    block = model.language_model.model.layers[layer]
    torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    torch.nn.init.zeros_(block.mlp.down_proj.weight)
    if model.cross_attention is not None and layer in model.cross_attention.chosen:
        number = model.cross_attention.chosen.index(layer)
        torch.nn.init.zeros_(model.cross_attention.layers[number].gate)
        if str(number) in model.cross_attention.first_fit:
            torch.nn.init.zeros_(model.cross_attention.first_fit[str(number)].output.weight)


def inputs_of(connector: str) -> dict[str, torch.Tensor]:
    chats = [chat("What is this?", noise_image(60, 120)), chat("How many?", noise_image(100, 90, seed=1))]
    return encode(tiny_processor(connector), *chats)


@pytest.mark.parametrize("connector", ["cross_attention", "pixel_unshuffle"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_an_identity_has_no_influence_and_is_not_missed(connector: str, layer: int) -> None:
    model, inputs = deep_model(connector), inputs_of(connector)
    make_identity(model, layer)
    influence = measure_influence(model, [inputs])
    assert influence[layer] == pytest.approx(0, abs=1e-12)
    assert all(value > 1e-3 for number, value in enumerate(influence) if number != layer)
    pruned, removed, _ = prune(model, 1, [inputs])
    assert removed == [layer]
    with torch.no_grad():
        torch.testing.assert_close(pruned(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_influence_is_that_of_the_hidden_states() -> None:
    """Against transformers' own record of them, over ids that are no padding."""
    model, inputs = deep_model("pixel_unshuffle"), inputs_of("pixel_unshuffle")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    valid = inputs["attention_mask"].bool()
    assert not valid.all()  # the prompts are of unequal length
    influence = measure_influence(model, [inputs])
    for layer in range(NUM_LAYERS - 1):  # the last recorded state is behind the final norm
        cosine = torch.cosine_similarity(states[layer].double(), states[layer + 1].double(), dim=-1)
        assert influence[layer] == pytest.approx(float(1 - cosine[valid].mean()), abs=1e-6)


def test_what_looks_in_front_of_a_layer_counts_with_it() -> None:
    model, inputs = deep_model(), inputs_of("cross_attention")
    make_identity(model, 2)
    torch.nn.init.constant_(model.cross_attention.layers[2].gate, 0.6)
    assert measure_influence(model, [inputs])[2] > 1e-3


@pytest.mark.parametrize("removed", [[1], [0, 3], [0, 1, 2]])
def test_layers_are_renumbered_throughout(removed: list[int]) -> None:
    model, inputs = deep_model(), inputs_of("cross_attention")
    kept = [layer for layer in range(NUM_LAYERS) if layer not in removed]
    pruned = remove_layers(model, removed)
    blocks = pruned.language_model.model.layers
    assert pruned.config.text_config.num_hidden_layers == len(blocks) == len(kept)
    assert [block.self_attn.layer_idx for block in blocks] == list(range(len(kept)))
    assert pruned.config.first_fit_layers == [kept.index(layer) for layer in (1, 3) if layer in kept]
    assert list(pruned.cross_attention.first_fit) == [str(n) for n in pruned.config.first_fit_layers]
    assert len(pruned.cross_attention.layers) == len(kept)
    # The same as the whole model with the others made to do nothing.
    for layer in removed:
        make_identity(model, layer)
    with torch.no_grad():
        torch.testing.assert_close(pruned(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("connector", ["cross_attention", "resampler"])
def test_pruned_model_is_saved_and_answers_alike_with_and_without_cache(connector: str, tmp_path) -> None:
    pruned, inputs = remove_layers(deep_model(connector), [0, 2]), inputs_of(connector)
    pruned.save_pretrained(tmp_path)
    loaded = VlmSliceForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, pruned(**inputs).logits)
    with_cache = answer(loaded, inputs)
    assert with_cache == answer(loaded, inputs, use_cache=False)
    assert with_cache[0] != with_cache[1]


def test_tied_embeddings_stay_tied() -> None:
    model = tiny_model(text={"num_hidden_layers": NUM_LAYERS, "tie_word_embeddings": True})
    pruned = remove_layers(model, [1])
    assert pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight
    assert pruned.get_input_embeddings().weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()


def test_entries_by_layer_of_other_language_models_are_kept_in_step() -> None:
    from transformers import Qwen3Config

    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    model = tiny_model()
    config = model.config.__class__.from_dict(
        model.config.to_dict()
        | {
            "text_config": Qwen3Config(
                hidden_size=32, intermediate_size=64, num_hidden_layers=NUM_LAYERS, num_attention_heads=2,
                num_key_value_heads=1, head_dim=16, vocab_size=model.config.text_config.vocab_size,
                layer_types=types, use_sliding_window=True, sliding_window=4,
            ).to_dict()
        }
    )  # fmt: skip
    pruned = remove_layers(VlmSliceForConditionalGeneration(config), [0])
    assert pruned.config.text_config.layer_types == types[1:]


class TestGroups:
    """Where every second layer looks at the image."""

    def test_neighbours_go_together(self) -> None:
        model = deep_model(cross_attention_interval=2)
        inputs = inputs_of("cross_attention")
        assert layer_groups(model.config) == [range(0, 2), range(2, 4)]
        pruned = remove_layers(model, [0, 1])
        assert list(pruned.cross_attention.chosen) == [1]
        for layer in (0, 1):
            make_identity(model, layer)
        assert measure_influence(model, [inputs])[0] == pytest.approx(0, abs=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(pruned(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)

    def test_one_of_them_is_refused(self) -> None:
        model = deep_model(cross_attention_interval=2)
        with pytest.raises(PruningError, match=r"layers \[1\] .* whole groups of 0 1 \| 2 3"):
            remove_layers(model, [1])
        with pytest.raises(PruningError, match="expected 1 to 2 and a multiple of 2, as one of 2 looks"):
            choose_groups(model.config, [0.5, 0.1], 1)


def test_the_last_head_of_first_fit_stays() -> None:
    config = deep_model().config
    influence = [0.9, 0.2, 0.8, 0.1]  # layers 1 and 3 have such heads
    assert choose_groups(config, influence, 2) == [range(2, 3), range(3, 4)]
    config.first_fit_layers = [3]
    assert choose_groups(config, influence, 3) == [range(0, 1), range(1, 2), range(2, 3)]


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([0, 1, 2, 3], "all 4 language layers .* one must stay"),
        ([1, 3], "every head of first fit .* answers point with it"),
        ([4], "expected indices from 0 to 3, each once"),
        ([1, 1], "expected indices from 0 to 3, each once"),
    ],
)
def test_what_cannot_be_removed(removed: list[int], message: str) -> None:
    with pytest.raises(PruningError, match=message):
        remove_layers(deep_model(), removed)


def test_rendered_samples_are_always_the_same_and_hold_answers() -> None:
    processor = tiny_processor("cross_attention")
    first, second = rendered_batches(processor, 5), rendered_batches(processor, 5)
    assert [len(batch["input_ids"]) for batch in first] == [4, 1]
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    text = processor.tokenizer.decode(first[0]["input_ids"][0])
    assert text.partition("<|assistant|>")[2].partition("<|end|>")[0] and "labels" not in first[0]


class TestCommand:
    def test_before_and_after(self, vlmslice_command: Vlmslice, tmp_path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        deep_model().to(torch.bfloat16).save_pretrained(source)
        tiny_processor("cross_attention").save_pretrained(source)
        result = vlmslice_command("prune", source, "-o", target, "--layers", 2, "--samples", 2, "--check", 1)
        assert result.code == 0, result.err
        layers, _, figures = result.out.partition("\n\n")
        assert len(layers.splitlines()) == 1 + NUM_LAYERS and layers.count("removed") == 2
        rows = [line.split() for line in figures.splitlines()]
        assert rows[0] == ["before", "after"]
        assert {"parameters", "weights", "load", "read:", "count:"} <= {row[0] for row in rows[1:]}
        assert f"model saved to {target}" in result.err
        pruned = VlmSliceForConditionalGeneration.from_pretrained(target, dtype="auto")
        assert pruned.dtype == torch.bfloat16
        assert pruned.config.text_config.num_hidden_layers == 2
        asked = vlmslice_command(
            "ask", "demos/images/receipt_line.png", "What?", "--model", target, "--max-new-tokens", 2
        )
        assert asked.code == 0, asked.err

    def test_errors(self, vlmslice_command: Vlmslice, saved_model, tmp_path) -> None:
        assert_user_error(
            vlmslice_command("prune", saved_model, "-o", tmp_path / "out", "--layers", 2, "--samples", 1),
            "2 of the 2 language layers", "expected 1 to 1",
        )  # fmt: skip
        assert_user_error(
            vlmslice_command("prune", saved_model, "-o", saved_model, "--layers", 1), "is in use", "-o"
        )
        assert not (tmp_path / "out").exists()
