"""Packed rows as the model sees them: several samples side by side, told apart by position ids that start again.

transformers' masks keep such samples apart if there is neither an attention mask nor a cache
(`masking_utils.find_packed_sequence_indices`). Where it would not, the samples would silently read one another; those
cases are refused here.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices

from vlmslice.errors import VlmSliceError

_MASKED_ATTENTIONS = ("eager", "sdpa", "flex_attention")


class PackedRowsError(VlmSliceError, ValueError):
    """The samples of a packed row could not be kept apart."""


def find_samples(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    past_key_values: object | None,
    use_cache: bool | None,
    language_model: PreTrainedModel,
) -> torch.Tensor | None:
    """Which sample of its row each position belongs to.

    Args:
        position_ids: `int64[B, L]`, from 0 in every sample; 0 1 2 0 1 0 1 are three samples.
        attention_mask, past_key_values, use_cache: as the language model is to get them.
        language_model: the one that is to run.

    Returns:
        `int64[B, L]`, 0 0 0 1 1 2 2 of the row above; None if no row holds more than one sample.

    Raises:
        PackedRowsError: this language model, or these arguments, would let the samples see one another.
    """
    if position_ids is None or position_ids.ndim != 2 or past_key_values is not None:
        return None
    if attention_mask is not None:
        if _restarts_inside(position_ids, attention_mask):
            raise PackedRowsError(
                "got an attention_mask beside position_ids that start again within a row, expected none, as with it "
                "the samples of a row would see one another; pass the output of PackingCollator unchanged"
            )
        return None
    samples = find_packed_sequence_indices(position_ids)
    if samples is None:
        return None
    if use_cache:
        raise PackedRowsError(
            "got use_cache=True with position_ids that start again within a row, expected False; generate from one "
            "sample per row"
        )
    if language_model._is_stateful:
        raise PackedRowsError(
            f"{type(language_model).__name__} carries a state from each position to the next, over the border of "
            "packed samples; expected a language model of attention layers; train this one with "
            "LengthSortedDataset instead"
        )
    implementation = language_model.config._attn_implementation
    is_flash = str(implementation).startswith("flash_attention")
    if implementation not in _MASKED_ATTENTIONS and not (is_flash and len(position_ids) == 1):
        raise PackedRowsError(
            f"attention implementation {implementation!r} does not keep the samples of {len(position_ids)} packed rows "
            f"apart; expected one of {', '.join(_MASKED_ATTENTIONS)}"
            + (", or one row per batch (per_device_train_batch_size=1)" if is_flash else "")
            + "; call model.set_attn_implementation({'text_config': 'sdpa'})"
        )
    return samples


def _restarts_inside(position_ids: torch.Tensor, attention_mask: torch.Tensor) -> bool:
    """Whether positions start again between two ids that are no padding."""
    if position_ids.shape != attention_mask.shape:
        return False
    attended = attention_mask.bool()
    return bool(((position_ids.diff() != 1) & attended[:, 1:] & attended[:, :-1]).any())
