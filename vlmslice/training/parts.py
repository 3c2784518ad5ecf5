"""The three parts of a model by the names of their weights: what learns, how fast, and what stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from vlmslice.errors import suggestion
from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.training.stage import TrainingError

PARTS: dict[str, tuple[str, ...]] = {
    "vision_encoder": ("vision_encoder.", "dense_head."),
    "connector": ("connector.", "canvas_position.", "cross_attention."),
    "language_model": ("language_model.",),
    "visual_expert": ("visual_expert.",),
}
"""Beginnings of the parameter names of each part; every parameter of a model belongs to one."""


def find_prefixes(parts: Iterable[str]) -> tuple[str, ...]:
    """Beginnings of the parameter names of `parts`.

    Raises:
        TrainingError: there is no part of some name, or none at all is given.
    """
    names = list(parts)
    for name in names:
        if name not in PARTS:
            hint = suggestion(name, PARTS) or f"; expected some of {', '.join(PARTS)}"
            raise TrainingError(f"a model has no part {name!r}{hint}")
    if not names:
        raise TrainingError(f"no part of the model is chosen; expected some of {', '.join(PARTS)}")
    return tuple(prefix for name in names for prefix in PARTS[name])


def learning_rates_of(factors: Mapping[str, float]) -> dict[str, float]:
    """Factors by part -> factors by parameter-name prefix, as `Stage.learning_rates` takes them.

    Parts of factor 1 and frozen ones (0) are left out.
    """
    return {
        prefix: factor
        for part, factor in factors.items()
        for prefix in find_prefixes([part])
        if factor not in (0, 1)
    }


def load_for_training(folder: Path, factors: Mapping[str, float]) -> VlmSliceForConditionalGeneration:
    """A saved model in fp32, whatever it is saved in; the parts whose factor is 0 are frozen.

    In bf16 most steps of fine-tuning would be rounded away: its neighbours lie 0.4 % apart, and a step of AdamW moves a
    weight by the learning rate.

    Raises:
        TrainingError: a factor is below 0, or all are 0.
    """
    for part, factor in factors.items():
        if factor < 0:
            raise TrainingError(f"the factor of {part} is {factor}; expected 0, which freezes it, or more")
    if not any(factors.values()):
        raise TrainingError(
            "every part has the factor 0, so nothing would be learnt; give one of them another"
        )
    model = VlmSliceForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    for part, factor in factors.items():
        if not factor:
            for parameter in parameters_of(model, find_prefixes([part])):
                parameter.requires_grad_(False)
    return model


def parameters_of(model: nn.Module, prefixes: tuple[str, ...]) -> Iterator[nn.Parameter]:
    """Parameters whose names begin with one of `prefixes`."""
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            yield parameter
