import pytest
from tiny_models import tiny_model

from vlmslice.training import TrainingError
from vlmslice.training.freezing import PartSize, format_parts, freeze, measure_parts


def trained_parts(model) -> set[str]:
    return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_frozen_parts_and_no_others():
    model = tiny_model(visual_expert_interval=1)
    freeze(model, "vision_encoder", "language_model")
    assert trained_parts(model) == {"connector", "canvas_position", "visual_expert"}
    assert not any(p.requires_grad for p in model.language_model.parameters())


def test_what_was_frozen_before_is_forgotten():
    model = tiny_model("cross_attention")
    freeze(model, "language_model", "cross_attention")
    freeze(model, "vision_encoder")
    assert trained_parts(model) == {"connector", "canvas_position", "language_model", "cross_attention"}
    freeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_pieces():
    model = tiny_model()
    freeze(model, "vision_encoder", "language_model.model.layers.0", but=["vision_encoder.vit.blocks.1"])
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("vision_encoder.", "language_model.model.layers.0."))
        assert parameter.requires_grad == (not frozen or name.startswith("vision_encoder.vit.blocks.1."))


def test_sizes():
    model = tiny_model()
    sizes = freeze(model, "vision_encoder", but=["vision_encoder.vit.blocks.0"])
    assert sizes == measure_parts(model)
    assert sum(size.num_parameters for size in sizes.values()) == model.num_parameters()
    assert sum(size.num_trained for size in sizes.values()) == model.num_parameters(only_trainable=True)
    block = sum(p.numel() for p in model.vision_encoder.vit.blocks[0].parameters())
    assert sizes["vision_encoder"] == PartSize(
        block, sum(p.numel() for p in model.vision_encoder.parameters())
    )


def test_tied_embeddings_count_once_and_freeze_with_either():
    model = tiny_model(tie_word_embeddings=True, text={"tie_word_embeddings": True})
    assert model.language_model.lm_head.weight is model.get_input_embeddings().weight
    sizes = freeze(model, "language_model.lm_head")
    assert not model.get_input_embeddings().weight.requires_grad
    assert sum(size.num_parameters for size in sizes.values()) == model.num_parameters()


def test_line():
    sizes = {
        "canvas_position": PartSize(9_999, 9_999),
        "connector": PartSize(250_400, 250_400),
        "language_model": PartSize(0, 134_500_000),
    }
    expected = "canvas_position 9999 of 9999, connector 250k of 250k, language_model 0 of 134.5M"
    assert format_parts(sizes) == expected


@pytest.mark.parametrize(
    ("frozen", "but", "message"),
    [
        (["vision_encodr"], [], "^the model has no part 'vision_encodr', expected one of .*; did you mean 'vision_enc"),
        (["visual_expert"], [], "^the model has no part 'visual_expert', expected one of vision_encoder, connector, "),
        (["vision_encoder.mixr"], [], "no part 'vision_encoder.mixr', .*, or a piece of one"),
        (["vision_encoder.vitt"], [], "did you mean 'vision_encoder.vit'[?]$"),
        (["vision_encoder"], ["vision_encoder.x"], "no part 'vision_encoder.x'"),
        (["vision_encoder"], ["connector"], "^but='connector' lies in none of the frozen parts .vision_encoder."),
    ],
)  # fmt: skip
def test_unknown_part(frozen, but, message):
    model = tiny_model()
    model.connector.requires_grad_(False)
    with pytest.raises(TrainingError, match=message):
        freeze(model, *frozen, but=but)
    assert not any(p.requires_grad for p in model.connector.parameters()), "a refused call changes nothing"
