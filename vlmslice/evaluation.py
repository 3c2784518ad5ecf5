"""Evaluation on rendered pictures that training never saw: held-out fonts, held-out words, a seed of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jiwer
from tqdm import tqdm

from vlmslice.data.fonts import FontLibrary
from vlmslice.data.tasks import Curriculum, TaskConfig, TaskDataset, TaskSample
from vlmslice.inference import Assistant

EVALUATION_SEED = 20_261_122

EVALUATION_CONFIG = TaskConfig(megapixels=(0.05, 4.0), num_words=(1, 6), max_count=10, split="eval")


@dataclass(frozen=True)
class Prediction:
    """One answered sample, as it is written to JSONL."""

    task: str
    height: int
    width: int
    question: str
    answer: str
    prediction: str
    num_visual_tokens: int
    seconds: float


def evaluation_samples(task: str, num_samples: int) -> Iterable[TaskSample]:
    """The first `num_samples` frozen samples of a task, drawn with fonts of the "eval" split."""
    steps = [Curriculum(num_samples, EVALUATION_CONFIG, {task: 1.0})]
    dataset = TaskDataset(steps, FontLibrary("eval"), EVALUATION_SEED, group=1, name=f"evaluation-{task}")
    return (dataset[i] for i in range(num_samples))


def predict(
    assistant: Assistant, samples: Iterable[TaskSample], total: int | None = None
) -> list[Prediction]:
    """Answers samples one by one, as a user's question would be answered.

    Args:
        total: number of samples, for the progress bar.
    """
    predictions = []
    for sample in tqdm(samples, total=total, unit="image"):
        image = sample.scene.image
        answer = assistant.ask([image], sample.question, max_new_tokens=80)
        predictions.append(
            Prediction(
                sample.task,
                image.height,
                image.width,
                sample.question,
                sample.answer,
                answer.text,
                answer.num_visual_tokens,
                sum(answer.seconds.values()),
            )
        )
    return predictions


def character_error_rate(predictions: list[Prediction]) -> float:
    """Edits divided by characters of the truth, over all samples together (jiwer)."""
    return jiwer.cer([p.answer for p in predictions], [p.prediction for p in predictions])


def exact_share(predictions: list[Prediction]) -> float:
    """Share of answers equal to the truth, apart from spaces round them."""
    return sum(p.answer == p.prediction.strip() for p in predictions) / len(predictions)


METRICS: dict[str, tuple[str, Callable[[list[Prediction]], float]]] = {
    "read": ("character error rate", character_error_rate),
    "count": ("exact share", exact_share),
    "chart": ("exact share", exact_share),
}
