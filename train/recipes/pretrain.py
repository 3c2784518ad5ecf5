"""A composed model in one command: its connector learns first, then the whole model; rendered or your own data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from recipes.align import align
from recipes.nano import BROAD
from recipes.sft import EVALUATION, build_model, save_model
from vlmslice.data.collator import VlmSliceCollator
from vlmslice.data.mixture import MixedDataset, ShuffledDataset
from vlmslice.data.sources import ConversationMixture, Source
from vlmslice.data.task_conversations import TaskConversations
from vlmslice.data.tasks import TaskDataset
from vlmslice.model_files import read_max_length
from vlmslice.training import Stage, TrainingError
from vlmslice.training.parts import learning_rates_of


def build_whole(factors: dict[str, float], previous: Path | None) -> nn.Module:
    """The model of the stage before, with everything to be trained whose factor is not 0."""
    assert previous is not None  # it is never the first stage
    return build_model(previous, factors, None)


def with_data(
    stage: Stage, data: Sequence[Source], eval_data: Sequence[Source], rendered: float, max_length: int | None
) -> Stage:
    """A stage on rendered tasks, with a share of 1 - `rendered` of your conversations among them."""
    collator = VlmSliceCollator(stage.collator.processor, max_length=max_length)
    if data:
        sources = [(ShuffledDataset(ConversationMixture(data)), 1 - rendered)]
        if rendered:
            sources.append((TaskConversations(stage.dataset), rendered))
        mixed = MixedDataset(sources, len(stage.dataset), group=stage.step_batch_size)
        stage = dataclasses.replace(stage, dataset=mixed, collator=collator)
    if eval_data:
        # Rendered samples are a batch of another kind; one collator serves a stage.
        if not data:
            stage = dataclasses.replace(stage, dataset=TaskConversations(stage.dataset), collator=collator)
        stage = dataclasses.replace(
            stage, eval_dataset=ConversationMixture(eval_data), arguments=stage.arguments | EVALUATION
        )
    return stage


def pretrain(
    model: Path,
    data: Sequence[Source] = (),
    eval_data: Sequence[Source] = (),
    *,
    rendered: float = 0.5,
    vision_encoder: float = 0.1,
    connector: float = 1.0,
    language_model: float = 1.0,
) -> list[Stage]:
    """Trains the connector of a composed model (stage `align`), then all of it (stage `whole`).

    Pictures are rendered: lines, paragraphs and shapes first, then all that the bundled model learns. With `--data`,
    half of the batches are your conversations.

    Options: `rendered` is the share of rendered batches beside `--data`, 0 for none; `vision_encoder`, `connector` and
    `language_model` are factors on the learning rate in the stage `whole`, and 0 freezes a part.

    Command: `python train/train.py --recipe pretrain --model FOLDER --output-dir runs/pretrain`, on what
    `vlmslice compose` saved.
    Hardware: as `align`. Not run at full length.
    """
    if not 0 <= rendered < 1:
        raise TrainingError(f"rendered is {rendered}; expected a share of 0 or more, and below 1")
    [first] = align(model)
    factors = {"vision_encoder": vision_encoder, "connector": connector, "language_model": language_model}
    processor = first.collator.processor
    whole = dataclasses.replace(
        first,
        name="whole",
        model=partial(build_whole, factors),
        dataset=TaskDataset(BROAD, first.dataset.fonts, group=first.step_batch_size, name="whole"),
        arguments=first.arguments | {"learning_rate": 3e-4, "max_steps": 20_000},
        save=partial(save_model, processor, "float32"),
        learning_rates=learning_rates_of(factors),
    )
    max_length = read_max_length(model)
    return [with_data(stage, data, eval_data, rendered, max_length) for stage in (first, whole)]
