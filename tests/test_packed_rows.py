"""Packed rows: what is kept apart, and what is refused because it would not be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_config
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from vlmslice.packed_rows import PackedRowsError, find_samples
from vlmslice.pointing import last_points

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
SIZE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LANGUAGE_MODELS = {
    "llama": lambda: LlamaForCausalLM(tiny_config().text_config),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE, head_dim=16)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SIZE)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZE, head_dim=16, sliding_window=3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2)),
}


def language_model(name: str):
    torch.manual_seed(0)
    return LANGUAGE_MODELS[name]().eval()


def test_samples_are_told_apart_by_positions_that_start_again():
    samples = find_samples(POSITIONS, None, None, None, language_model("llama"))
    assert samples.tolist() == [[0, 0, 0, 1, 1, 2, 2]]


def test_rows_of_one_sample_are_not_packed():
    model = language_model("llama")
    assert find_samples(None, None, None, None, model) is None
    assert find_samples(torch.arange(5).expand(2, 5), None, None, None, model) is None
    # Padding on the left, as `generate` has it: the mask tells.
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert find_samples((mask.cumsum(1) - 1).masked_fill(mask == 0, 1), mask, None, None, model) is None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_keep_samples_apart(name, implementation):
    model = language_model(name)
    model.set_attn_implementation(implementation)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=POSITIONS, use_cache=False).logits
        alone = [model(input_ids=part, use_cache=False).logits for part in ids.split([3, 2, 2], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-4)


def test_a_cache_is_refused():
    with pytest.raises(PackedRowsError, match="use_cache=True"):
        find_samples(POSITIONS, None, None, True, language_model("llama"))


def test_an_attention_mask_is_refused():
    with pytest.raises(PackedRowsError, match="attention_mask beside position_ids"):
        find_samples(POSITIONS, torch.ones_like(POSITIONS), None, None, language_model("llama"))


def test_a_language_model_with_a_running_state_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(PackedRowsError, match="MambaForCausalLM carries a state .*LengthSortedDataset"):
        find_samples(POSITIONS, None, None, None, model)


def test_flash_attention_takes_one_row():
    model = language_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert find_samples(POSITIONS, None, None, None, model) is not None
    with pytest.raises(PackedRowsError, match="2 packed rows apart.*per_device_train_batch_size=1"):
        find_samples(POSITIONS.repeat(2, 1), None, None, None, model)


parts_strategy = st.lists(st.lists(st.integers(98, 103), min_size=1, max_size=6), min_size=1, max_size=5)


@given(parts_strategy)
def test_last_points_do_not_cross_the_border_of_samples(parts):
    """Runs of location tokens (from 100 on) may touch the border on both sides."""
    row = torch.tensor([[number for part in parts for number in part]])
    samples = torch.tensor([[number for number, part in enumerate(parts) for _ in part]])
    got = last_points(row, 100, samples)
    alone = [last_points(torch.tensor([part]), 100) for part in parts]
    if got is None:
        assert all(points is None for points in alone)
        return
    expected = [
        torch.full((1, len(part), 3), -1) if points is None else points
        for part, points in zip(parts, alone, strict=True)
    ]
    assert torch.equal(got, torch.cat(expected, dim=1))
