"""LoRA on chosen parts of a model: small matrices learn beside the large ones, and are added to them at the end.

The weight W of a linear layer becomes W + alpha / rank * B A, with A and B of `rank` rows and columns (Hu et al., 2021,
https://arxiv.org/abs/2106.09685). peft does the work; chosen here is where.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.training.parts import find_prefixes
from vlmslice.training.stage import TrainingError

ADAPTER = "adapter"
"""Folder of the adapter, inside the folder of the merged model."""


def find_linear_layers(model: PreTrainedModel, parts: Iterable[str]) -> list[str]:
    """Names of the linear layers of `parts`, without the output head.

    Left out are layers that only inherit from `nn.Linear`, such as the convolutions of the stem.

    Raises:
        TrainingError: there is no such part, or it has no linear layer.
    """
    names = list(parts)
    prefixes = find_prefixes(names)
    head = model.get_output_embeddings()
    layers = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and name.startswith(prefixes)
    ]
    if not layers:
        raise TrainingError(f"there are no linear layers in {', '.join(names)}; choose other parts for LoRA")
    return layers


def add_lora(
    model: VlmSliceForConditionalGeneration,
    parts: Iterable[str] = ("language_model",),
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
) -> PeftModel:
    """The model with LoRA on the linear layers of `parts`; everything else is frozen.

    Args:
        model: is changed in place.
        parts: some of `parts.PARTS`.
        rank: of each update.
        alpha: `alpha / rank` scales the updates.
        dropout: of what goes into the updates.

    Raises:
        TrainingError: see `find_linear_layers`; or the rank is below 1.
    """
    if rank < 1:
        raise TrainingError(f"the rank of LoRA is {rank}; expected 1 or more, such as 16")
    return get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=find_linear_layers(model, parts),
        ),
    )


def merge_lora(model: PeftModel, folder: Path) -> nn.Module:
    """Saves the adapter under `folder / "adapter"` and returns the model with the updates added to its weights.

    Loaded onto the model it was trained on, the adapter gives the merged model again:
    `PeftModel.from_pretrained(base, folder / "adapter")`.
    """
    model.save_pretrained(folder / ADAPTER)
    with torch.no_grad():
        return model.merge_and_unload(safe_merge=True)
