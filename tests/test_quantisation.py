"""Int8 weights: the bound of every weight, what is saved and loaded, and what is refused."""

import json
from copy import deepcopy
from pathlib import Path

import hypothesis.extra.numpy as numpy_strategies
import numpy as np
import pytest
import torch
from conftest import Vlmslice, assert_user_error
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import answer, chat, encode, noise_image, tiny_model, tiny_processor
from transformers import AutoModelForImageTextToText

from vlmslice import VlmSliceForConditionalGeneration
from vlmslice.conv_stem import MatrixConv2d
from vlmslice.shrinking.pruning import PruningError, remove_layers
from vlmslice.shrinking.quantisation import (
    PARTS,
    Int8Linear,
    Int8MatrixConv2d,
    QuantisationError,
    find_quantisable,
    hold_int8,
    quantise,
    quantise_matrix,
)
from vlmslice.vision_encoder import VlmSliceVisionConfig

matrices = numpy_strategies.arrays(
    np.float32,
    numpy_strategies.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-16384, 16384, width=32) | st.floats(-(2.0**-10), 2.0**-10, width=32),
)


def restore(weight_int8: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return weight_int8.double() * scale.double()[:, None]


@given(matrices)
def test_no_weight_moves_by_more_than_half_a_step(array: np.ndarray) -> None:
    weight = torch.from_numpy(array)
    weight_int8, scale = quantise_matrix(weight)
    assert weight_int8.dtype == torch.int8 and scale.dtype == torch.bfloat16
    assert weight_int8.shape == weight.shape and scale.shape == weight.shape[:1]
    error = (restore(weight_int8, scale) - weight.double()).abs()
    assert (error <= scale.double()[:, None] / 2 * (1 + 1e-6)).all()


@given(matrices)
def test_quantised_twice_is_quantised_once(array: np.ndarray) -> None:
    weight_int8, scale = quantise_matrix(torch.from_numpy(array))
    again_int8, again_scale = quantise_matrix(restore(weight_int8, scale).float())
    assert torch.equal(again_int8, weight_int8) and torch.equal(again_scale, scale)


def test_a_row_uses_all_steps_whatever_the_others_hold() -> None:
    weight_int8, _ = quantise_matrix(torch.tensor([[1e-4, -5e-5], [3.0, -1000.0], [0.0, 0.0]]))
    assert weight_int8[0, 0] == 127 and weight_int8[0, 1] in (-63, -64)
    assert weight_int8[1].tolist() == [0, -127] and weight_int8[2].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("layer", "int8", "shape"),
    [
        (torch.nn.Linear(12, 7), Int8Linear, (5, 12)),
        (torch.nn.Linear(12, 7, bias=False), Int8Linear, (5, 12)),
        (MatrixConv2d(3, 8, 3, dilation=2), Int8MatrixConv2d, (2, 6, 4, 3)),
    ],
)
def test_layers_compute_with_the_restored_weight(layer: torch.nn.Module, int8: type, shape: tuple) -> None:
    plain, x = deepcopy(layer), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight_int8, scale = quantise_matrix(layer.weight)
    with torch.no_grad():
        plain.weight.copy_(restore(weight_int8, scale))
    hold_int8(layer, weight_int8, scale.float())
    assert type(layer) is int8
    assert torch.equal(layer.weight, plain.weight)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)


def conv_model(**options) -> VlmSliceForConditionalGeneration:
    """With the stem of the bundled model, wide enough for its matrices to outweigh the rest."""
    vision = VlmSliceVisionConfig(
        hidden_size=64,
        stem="conv",
        canvas_dilations=[1, 2],
        timm_kwargs={"depth": 2, "num_heads": 2, "global_pool": "", "pos_embed_grid_size": (4, 4)},
    )
    return tiny_model("cross_attention", vision_config=vision, first_fit_layers=[1], **options)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return encode(tiny_processor("cross_attention"), chat("What is this?", noise_image(60, 120)))


def test_logits_are_close(inputs: dict[str, torch.Tensor]) -> None:
    model = conv_model()
    with torch.no_grad():
        before = model(**inputs).logits
        after = quantise(model)(**inputs).logits
    error = float((after - before).std() / before.std())
    assert 1e-5 < error < 0.05  # 7 bits of a Gaussian row leave 0.8 % of noise in each layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_as_it_was(
    inputs: dict[str, torch.Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    model = conv_model().to(dtype)
    names = set(find_quantisable(model, PARTS))
    plain_bytes = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    quantise(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name for name, tensor in saved.items() if tensor.dtype == torch.int8} == {
        f"{name}.weight_int8" for name in names
    }
    assert any(".stem." in name for name in names) and any(".mixer." in name for name in names)
    assert not any("embed_tokens" in name or "lm_head" in name for name in names)
    for folder_class in (VlmSliceForConditionalGeneration, AutoModelForImageTextToText):
        loaded = folder_class.from_pretrained(tmp_path, dtype=torch.float32)
        assert all(
            torch.equal(tensor, loaded.state_dict()[name].to(tensor.dtype)) for name, tensor in saved.items()
        )
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        assert answer(loaded, inputs) == answer(model, inputs)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(tensor.to(again[name].dtype), again[name]) for name, tensor in saved.items())
    if dtype == torch.bfloat16:
        int8_bytes = sum(t.nbytes for n, t in saved.items() if n.endswith((".weight_int8", ".weight_scale")))
        assert int8_bytes <= 0.55 * sum(plain_bytes[f"{name}.weight"] for name in names)


def test_dequantised_model_is_plain_and_quantises_to_the_same(inputs: dict[str, torch.Tensor]) -> None:
    model = quantise(conv_model())
    int8 = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**inputs).logits
        model.dequantize()
        assert model.state_dict().keys() == conv_model().state_dict().keys()
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-3, atol=1e-3)
    assert getattr(model.config, "quantization_config", None) is None
    again = quantise(model).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in int8.items())


def test_chosen_parts_only() -> None:
    model = quantise(conv_model(), ["language_model"])
    assert {n.split(".")[0] for n, m in model.named_modules() if isinstance(m, Int8Linear)} == {
        "language_model"
    }
    assert model.config.quantization_config.parts == ["language_model"]


def test_what_is_refused() -> None:
    with pytest.raises(QuantisationError, match="no part 'language_modle'; did you mean 'language_model'"):
        quantise(tiny_model(), ["language_modle"])
    with pytest.raises(QuantisationError, match="cross_attention of this model has no matrices"):
        quantise(tiny_model(), ["cross_attention"])
    model = tiny_model()
    with torch.no_grad():
        model.language_model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(QuantisationError, match=r"mlp.up_proj: 1 of 2048 weights are not finite"):
        quantise(model)
    model = quantise(tiny_model())
    with pytest.raises(QuantisationError, match="quantised already"):
        quantise(model)
    with pytest.raises(PruningError, match="prune it first and quantise then"):
        remove_layers(model, [0])


class TestCommand:
    def test_before_and_after(self, vlmslice_command: Vlmslice, saved_model: Path, tmp_path: Path) -> None:
        target = tmp_path / "target"
        result = vlmslice_command("quantise", saved_model, "-o", target, "--part", "connector", "--check", 0)
        assert result.code == 0, result.err
        rows = [line.split() for line in result.out.splitlines()]
        assert rows[0] == ["before", "after"] and rows[1][0] == "parameters" and rows[1][1] == rows[1][2]
        assert f"model saved to {target}" in result.err
        config = json.loads((target / "config.json").read_text())
        assert config["quantization_config"] == {"parts": ["connector"], "quant_method": "vlmslice-int8"}
        picture = tmp_path / "picture.png"
        noise_image(60, 120).save(picture)
        asked = vlmslice_command("ask", picture, "What?", "--model", target, "--max-new-tokens", 2)
        assert asked.code == 0, asked.err

    def test_errors(self, vlmslice_command: Vlmslice, saved_model: Path, tmp_path: Path) -> None:
        result = vlmslice_command("quantise", saved_model, "-o", tmp_path / "out", "--part", "eye")
        assert_user_error(result, "there is no part 'eye'", "expected some of vision_encoder")
