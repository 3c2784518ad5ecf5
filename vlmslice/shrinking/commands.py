"""What `vlmslice prune` and `vlmslice quantise` do: load, shrink, save, and measure both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlmslice.config import VlmSliceConfig
from vlmslice.errors import VlmSliceError
from vlmslice.model_files import ModelError, find_model, find_weights
from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.processing import VlmSliceProcessor
from vlmslice.shrinking.comparison import Measurement, measure
from vlmslice.shrinking.pruning import layer_groups, model_config, prune, rendered_batches
from vlmslice.shrinking.quantisation import PARTS, quantise


class ShrinkingError(VlmSliceError, ValueError):
    """A model cannot be read or written as asked."""


def prune_folder(
    source: str | Path | None, target: Path, num_layers: int, num_samples: int, num_check: int
) -> tuple[list[tuple[range, float, bool]], tuple[Measurement, Measurement]]:
    """Prunes a saved model into another folder.

    Args:
        source: Folder of the model, by default the bundled one.
        target: Folder that does not exist yet, or is empty.
        num_layers: How many language layers to remove.
        num_samples: Rendered samples to measure influence on.
        num_check: See `comparison.measure`.

    Returns:
        Of each group of layers its indices, its influence and whether it is removed; and the model before and after.

    Raises:
        PruningError: So many layers cannot be removed.
        ShrinkingError: There are no fonts to render samples with, or `target` is in use.
    """
    # Influence is measured in fp32, in which CPUs compute; what is left is saved as it was.
    model, processor, path = _load(source, target, torch.float32)
    try:
        batches = rendered_batches(processor, num_samples)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise ShrinkingError(f"samples to measure influence on cannot be rendered: {error}") from error
    pruned, removed, influence = prune(model, num_layers, batches)
    saved_dtype = VlmSliceConfig.from_pretrained(path, local_files_only=True).dtype
    _save(pruned.to(saved_dtype or torch.float32), processor, target)  # type: ignore[arg-type]
    groups = layer_groups(model_config(model))
    table = [(group, value, group[0] in removed) for group, value in zip(groups, influence, strict=True)]
    return table, (measure(path, num_check), measure(target, num_check))


def quantise_folder(
    source: str | Path | None, target: Path, parts: Sequence[str] | None, num_check: int
) -> tuple[Measurement, Measurement]:
    """Quantises a saved model into another folder; returns the model before and after.

    Args:
        source: Folder of the model, by default the bundled one.
        target: Folder that does not exist yet, or is empty.
        parts: Some of `quantisation.PARTS`, by default all.
        num_check: See `comparison.measure`.

    Raises:
        QuantisationError: The model cannot be quantised so.
        ShrinkingError: `target` is in use.
    """
    model, processor, path = _load(source, target, "auto")
    _save(quantise(model, parts or PARTS), processor, target)
    return measure(path, num_check), measure(target, num_check)


def _load(
    source: str | Path | None, target: Path, dtype: torch.dtype | str
) -> tuple[VlmSliceForConditionalGeneration, VlmSliceProcessor, Path]:
    """Model, processor, and their folder, after a look at where they will go."""
    path = find_model(source)
    find_weights(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ShrinkingError(
            f"{str(target)!r} is in use, expected a new folder to save to; choose another with -o"
        )
    try:
        processor = VlmSliceProcessor.from_pretrained(path, local_files_only=True)
        model = VlmSliceForConditionalGeneration.from_pretrained(
            path, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"model {str(path)!r} cannot be loaded: {error}; save or download it again"
        ) from error
    return model.eval(), processor, path


def _save(model: Any, processor: VlmSliceProcessor, target: Path) -> None:
    try:
        model.save_pretrained(target)
        processor.save_pretrained(target)
    except OSError as error:
        raise ShrinkingError(
            f"the model cannot be saved to {str(target)!r}: {error.strerror or error}; choose another folder with -o"
        ) from error
