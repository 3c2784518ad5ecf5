from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import CONNECTORS, chat, encode, noise_image, tiny_model, tiny_processor

from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.training import TrainingError
from vlmslice.training.lora import add_lora, find_linear_layers, merge_lora
from vlmslice.training.parts import PARTS


@pytest.mark.parametrize("connector", CONNECTORS)
def test_merged_equals_adapter_and_base_is_unchanged(connector: str, tmp_path: Path) -> None:
    base = tiny_model(connector)
    base.save_pretrained(tmp_path / "base")
    inputs = encode(tiny_processor(connector), chat("What is this?", noise_image(100, 200)))
    with torch.no_grad():
        before = base(**inputs).logits
        model = add_lora(base, PARTS, rank=4)
        assert torch.equal(model(**inputs).logits, before)  # B starts at zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        adapted = model(**inputs).logits
        assert (adapted - before).abs().max() > 0.1
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, before)
        merged = merge_lora(model, tmp_path)
        assert not isinstance(merged, PeftModel)
        merged.save_pretrained(tmp_path)

        largest = adapted.abs().max().item()
        saved = VlmSliceForConditionalGeneration.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(saved(**inputs).logits, adapted, atol=1e-5 * largest, rtol=0)
        again = VlmSliceForConditionalGeneration.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**inputs).logits, adapted, atol=1e-5 * largest, rtol=0)


def test_only_the_updates_of_the_chosen_parts_learn() -> None:
    model = add_lora(tiny_model("cross_attention"), ["language_model"], rank=4)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning and all("lora_" in name and ".language_model." in name for name in learning)


def test_linear_layers_of_parts() -> None:
    model = tiny_model("cross_attention")
    parts = [part for part in PARTS if part != "visual_expert"]  # this model has none
    of_parts = {part: find_linear_layers(model, [part]) for part in parts}
    assert sorted(sum(of_parts.values(), [])) == sorted(find_linear_layers(model, PARTS))
    assert "language_model.model.layers.0.self_attn.q_proj" in of_parts["language_model"]
    assert "cross_attention.layers.0.key" in of_parts["connector"]
    assert not any("lm_head" in name for name in of_parts["language_model"])


def test_errors_name_the_remedy() -> None:
    with pytest.raises(TrainingError, match="the rank of LoRA is 0; expected 1 or more"):
        add_lora(tiny_model(), rank=0)
    with pytest.raises(TrainingError, match="no part 'conector'; did you mean 'connector'"):
        add_lora(tiny_model(), ["conector"])
