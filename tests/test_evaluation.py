"""Frozen samples are frozen, the scores are the metrics' own, and a model is scored on what `ask` answers."""

import pytest
from tiny_models import tiny_model, tiny_processor

from vlmslice.data.tasks import TASKS
from vlmslice.data.text import words
from vlmslice.evaluation import METRICS, Prediction, evaluation_samples, predict
from vlmslice.inference import Assistant


def prediction(answer: str, text: str) -> Prediction:
    return Prediction("read", 10, 20, "Read this.", answer, text, 4, 0.1)


class TestMetrics:
    def test_every_task_has_one(self):
        assert METRICS.keys() == TASKS.keys()

    def test_character_errors_are_shared_over_all_characters(self):
        """One error in 4 characters and none in 12: 1 in 16, not the mean of the two lines."""
        name, rate = METRICS["read"]
        assert name == "character error rate"
        assert rate([prediction("word", "ward"), prediction("twelve chars", "twelve chars")]) == 1 / 16

    @pytest.mark.parametrize("task", ["count", "chart"])
    def test_exact_share(self, task):
        name, share = METRICS[task]
        assert name == "exact share"
        answers = [("7", "7"), ("7", " 7\n"), ("7", "17"), ("Red", "red")]
        assert share([prediction(*pair) for pair in answers]) == 0.5


class TestSamples:
    @pytest.mark.parametrize("task", list(TASKS))
    def test_frozen_and_never_trained_on(self, task):
        first, again = list(evaluation_samples(task, 3)), list(evaluation_samples(task, 3))
        for one, other in zip(first, again, strict=True):
            assert one.task == task
            assert (one.question, one.answer) == (other.question, other.answer)
            assert one.scene.image.tobytes() == other.scene.image.tobytes()
            assert 0.04e6 <= one.scene.image.height * one.scene.image.width <= 4.1e6

    def test_the_number_asked_for_changes_no_sample(self):
        [few] = evaluation_samples("read", 1)
        many = next(iter(evaluation_samples("read", 50)))
        assert (few.question, few.answer) == (many.question, many.answer)

    def test_words_are_held_out(self):
        trained = {word for word in words("train") if len(word) > 3}
        for sample in evaluation_samples("read", 20):
            assert not trained & set(sample.answer.lower().split())


def test_a_model_is_scored_on_what_ask_answers():
    assistant = Assistant(tiny_model(), tiny_processor())
    samples = list(evaluation_samples("count", 2))
    predictions = predict(assistant, samples)
    for sample, made in zip(samples, predictions, strict=True):
        image = sample.scene.image
        said = assistant.ask([image], sample.question, max_new_tokens=80)
        assert (made.task, made.height, made.width) == ("count", image.height, image.width)
        assert (made.question, made.answer) == (sample.question, sample.answer)
        assert (made.prediction, made.num_visual_tokens) == (said.text, said.num_visual_tokens)
        assert made.seconds > 0
