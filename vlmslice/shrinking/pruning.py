"""Depth pruning: removes the language layers that change the hidden states least.

The influence of a layer is one minus the cosine similarity of the hidden states before and after it, averaged over ids
(block influence; ShortGPT, Men et al., 2024, https://arxiv.org/abs/2403.03853). A layer that only rescales them has
none. With the connector `cross_attention`, what looks at the image in front of a layer belongs to it: it is measured
with it and removed with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlmslice.config import VlmSliceConfig
from vlmslice.cross_attention import find_decoder_layers
from vlmslice.data.fonts import FontLibrary
from vlmslice.data.task_collator import TaskCollator
from vlmslice.data.tasks import Curriculum, TaskConfig, TaskDataset
from vlmslice.errors import VlmSliceError
from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.processing import VlmSliceProcessor

_BATCH_SIZE = 4


class PruningError(VlmSliceError, ValueError):
    """These layers cannot be removed."""


def prune(
    model: VlmSliceForConditionalGeneration, num_layers: int, batches: Iterable[Mapping[str, Any]]
) -> tuple[VlmSliceForConditionalGeneration, list[int], list[float]]:
    """Removes the `num_layers` language layers of least influence, measured once.

    Args:
        model: stays as it is.
        num_layers: how many to remove.
        batches: model inputs to measure on, see `rendered_batches`.

    Returns:
        The smaller model, the indices of the layers it lacks, and the influence of every group, see `layer_groups`.

    Raises:
        PruningError: so many layers cannot be removed.
    """
    config = model_config(model)
    groups = layer_groups(config)
    # What cannot be done is told before anything is measured.
    choose_groups(config, [0.0] * len(groups), num_layers)
    influence = measure_influence(model, batches)
    removed = [layer for group in choose_groups(config, influence, num_layers) for layer in group]
    return remove_layers(model, removed), removed, influence


def layer_groups(config: VlmSliceConfig) -> list[range]:
    """The language layers that can be removed, in groups that can only go together.

    Where every second layer looks at the image, two neighbours are a group: with one of them gone, the looking layers
    after it would stand in front of others than those they were trained with. 5 layers -> 0 1, 2 3; the fifth, behind
    the last that looks, is in none.
    """
    interval = config.cross_attention_interval if config.connector == "cross_attention" else 1
    num_groups = config.text_config.num_hidden_layers // interval
    return [range(first * interval, (first + 1) * interval) for first in range(num_groups)]


@torch.no_grad()
def measure_influence(
    model: VlmSliceForConditionalGeneration, batches: Iterable[Mapping[str, Any]]
) -> list[float]:
    """Influence of each of the `layer_groups`: the mean of `1 - cos(before, after)` over the ids of all batches.

    Args:
        model: with any number of language layers.
        batches: model inputs; ids that `attention_mask` hides do not count.

    Raises:
        PruningError: the language model has no list of layers.
    """
    groups = layer_groups(model_config(model))
    layers = _decoder_layers(model)
    before: dict[int, torch.Tensor] = {}
    sums = [0.0] * len(groups)
    valid = torch.ones((), dtype=torch.bool)
    num_ids = 0

    def take_before(number: int, args: tuple) -> None:
        before[number] = args[0]

    def take_after(number: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        change = 1 - F.cosine_similarity(before.pop(number).double(), hidden.double(), dim=-1)
        sums[number] += float(change[valid].sum())

    handles = []
    for number, group in enumerate(groups):
        # Ahead of the hook by which a looking layer changes what its layer gets.
        handles.append(
            layers[group[0]].register_forward_pre_hook(
                lambda module, args, number=number: take_before(number, args), prepend=True
            )
        )
        handles.append(
            layers[group[-1]].register_forward_hook(
                lambda module, args, output, number=number: take_after(number, output)
            )
        )
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            valid = batch["attention_mask"].bool()
            num_ids += int(valid.sum())
            model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return [total / num_ids for total in sums]


def choose_groups(config: VlmSliceConfig, influence: Sequence[float], num_layers: int) -> list[range]:
    """The groups of least influence that hold `num_layers` layers in all, by their place.

    The last layer with a head of first fit (see `first_fit`) stays, whatever its influence: answers point with it.

    Raises:
        PruningError: there is no such choice.
    """
    groups = layer_groups(config)
    total = config.text_config.num_hidden_layers
    size = len(groups[0])
    num_fixed = total - size * len(groups)
    most = size * (len(groups) - (0 if num_fixed else 1))
    if not 1 <= num_layers <= most or num_layers % size:
        raise PruningError(
            f"{num_layers} of the {total} language layers are to be removed, expected 1 to {most}"
            + (f" and a multiple of {size}, as one of {size} looks at the image" if size > 1 else "")
            + "; choose another number of layers"
        )
    chosen: list[int] = []
    for number in sorted(range(len(groups)), key=lambda number: influence[number]):
        if not set(config.first_fit_layers) - {*chosen, number} and number in config.first_fit_layers:
            continue
        chosen.append(number)
        if len(chosen) * size == num_layers:
            return [groups[number] for number in sorted(chosen)]
    raise PruningError(
        f"{num_layers} of the {total} language layers are to be removed, but the last with a head of first fit must "
        f"stay, as answers point with it; remove at most {num_layers - size}"
    )


def remove_layers(
    model: VlmSliceForConditionalGeneration, removed: Sequence[int]
) -> VlmSliceForConditionalGeneration:
    """A copy without some of the language layers, and without what looks at the image in front of them.

    The copy is built from a config with fewer layers, so the layers number themselves and their places in the
    key-value cache anew, and so do the looking layers, their heads of first fit and the layers that are guided.

    Args:
        model: stays as it is.
        removed: indices of layers, whole `layer_groups`.

    Raises:
        PruningError: they cannot be removed.
    """
    config = model_config(model)
    if getattr(config, "quantization_config", None) is not None:
        raise PruningError(
            "the model is quantised, expected one that is not; prune it first and quantise then"
        )
    total = config.text_config.num_hidden_layers
    gone = set(removed)
    if not gone <= set(range(total)) or len(gone) != len(removed):
        raise PruningError(
            f"layers {sorted(removed)} are to be removed, expected indices from 0 to {total - 1}, each once"
        )
    groups = layer_groups(config)
    numbers_gone = [number for number, group in enumerate(groups) if gone >= set(group)]
    if gone != {layer for number in numbers_gone for layer in groups[number]}:
        raise PruningError(
            f"layers {sorted(gone)} are to be removed, expected whole groups of "
            f"{' | '.join(' '.join(map(str, group)) for group in groups)}, as only the last of each looks at the image"
        )
    if len(gone) == total:
        raise PruningError(f"all {total} language layers are to be removed, but one must stay; remove fewer")
    if config.first_fit_layers and set(config.first_fit_layers) <= set(numbers_gone):
        pointing = [groups[number][-1] for number in config.first_fit_layers]
        raise PruningError(
            f"layers {sorted(gone)} are to be removed, and with them every head of first fit (layers {pointing}), but "
            "one must stay, as answers point with it; remove fewer"
        )
    kept = [layer for layer in range(total) if layer not in gone]
    kept_numbers = [number for number in range(len(groups)) if number not in numbers_gone]
    pruned = VlmSliceForConditionalGeneration(_shorten(config, kept, kept_numbers))
    layers = _decoder_layers(model)
    [name] = [name for name, module in model.named_modules() if module is layers]
    moves = {
        f"{name}.": {old: new for new, old in enumerate(kept)},
        "cross_attention.layers.": {old: new for new, old in enumerate(kept_numbers)},
        "cross_attention.first_fit.": {old: new for new, old in enumerate(kept_numbers)},
    }
    weights = {}
    for key, tensor in model.state_dict().items():
        moved = _renumber(key, moves)
        if moved is not None:
            weights[moved] = tensor.clone()
    # Assigned, not copied: every weight keeps its dtype, and tables that are not saved theirs.
    pruned.load_state_dict(weights, assign=True)
    pruned.tie_weights()
    pruned.generation_config = deepcopy(model.generation_config)
    return pruned.train(model.training)


def rendered_batches(processor: VlmSliceProcessor, num_samples: int) -> list[Mapping[str, Any]]:
    """Model inputs of rendered lines to read and shapes to count with their answers, as in training; always the same.

    Raises:
        FileNotFoundError: this machine has no fonts.
    """
    task = TaskConfig(megapixels=(0.03, 0.3))
    dataset = TaskDataset(
        [Curriculum(num_samples, task, {"read": 0.5, "count": 0.5})],
        FontLibrary("train"),
        group=_BATCH_SIZE,
        name="pruning",
    )
    collator = TaskCollator(processor, dense=(), guide=False, points=processor.location_token_id is not None)
    samples = [dataset[i] for i in range(num_samples)]
    batches: list[Mapping[str, Any]] = []
    for start in range(0, num_samples, _BATCH_SIZE):
        batch = dict(collator(samples[start : start + _BATCH_SIZE]))
        del batch["labels"]
        batches.append(batch)
    return batches


def model_config(model: VlmSliceForConditionalGeneration) -> VlmSliceConfig:
    """Its config, with the type that transformers does not tell."""
    assert isinstance(model.config, VlmSliceConfig)
    return model.config


def _shorten(config: VlmSliceConfig, kept: list[int], kept_numbers: list[int]) -> VlmSliceConfig:
    fields = config.to_dict()
    text, total = fields["text_config"], config.text_config.num_hidden_layers
    text[config.text_config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    # Such as `layer_types`: one entry for each layer.
    for name, value in text.items():
        if "layer" in name and isinstance(value, list) and len(value) == total:
            text[name] = [value[layer] for layer in kept]
    fields["first_fit_layers"] = [
        new for new, old in enumerate(kept_numbers) if old in config.first_fit_layers
    ]
    return VlmSliceConfig.from_dict(fields)


def _renumber(key: str, moves: dict[str, dict[int, int]]) -> str | None:
    """The new name of a weight; None if it is removed."""
    for prefix, numbers in moves.items():
        if key.startswith(prefix):
            number, _, rest = key.removeprefix(prefix).partition(".")
            new = numbers.get(int(number))
            return None if new is None else f"{prefix}{new}.{rest}"
    return key


def _decoder_layers(model: VlmSliceForConditionalGeneration) -> nn.ModuleList:
    try:
        return find_decoder_layers(model.language_model)
    except ValueError as error:
        raise PruningError(
            f"{type(model.language_model).__name__} has no list of layers to remove from"
        ) from error
