from pathlib import Path

import pytest
import torch
from tiny_models import CONNECTORS, tiny_model

from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.training import TrainingError
from vlmslice.training.parts import PARTS, find_prefixes, learning_rates_of, load_for_training


@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_parameter_belongs_to_one_part(connector: str) -> None:
    model = tiny_model(connector, dense_loss_weight=1.0)
    for name, _ in model.named_parameters():
        parts = [part for part, prefixes in PARTS.items() if name.startswith(prefixes)]
        assert len(parts) == 1, name


def test_bf16_weights_are_trained_in_fp32(tmp_path: Path) -> None:
    saved = tiny_model().to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    model = load_for_training(tmp_path, {"vision_encoder": 0.0, "language_model": 0.5})
    weights = dict(saved.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, weights[name].float()), name
        assert parameter.requires_grad != name.startswith("vision_encoder.")
    assert isinstance(model, VlmSliceForConditionalGeneration)


def test_factors_by_prefix() -> None:
    factors = {"vision_encoder": 0.1, "connector": 1.0, "language_model": 0.0}
    assert learning_rates_of(factors) == {"vision_encoder.": 0.1, "dense_head.": 0.1}


def test_errors_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no part 'language_modle'; did you mean 'language_model'"):
        find_prefixes(["connector", "language_modle"])
    with pytest.raises(TrainingError, match="no part of the model is chosen"):
        find_prefixes([])
    with pytest.raises(TrainingError, match="factor of connector is -1; expected 0, which freezes it"):
        load_for_training(tmp_path, {"connector": -1})
    with pytest.raises(TrainingError, match="nothing would be learnt"):
        load_for_training(tmp_path, {"connector": 0, "language_model": 0})
