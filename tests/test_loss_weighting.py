"""Loss weighting against a plain loop; and training steps that do not depend on rows, accumulation or processes."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_packing import PLAN, SAMPLES, collators, packs_of
from test_training import environment, free_port
from tiny_models import tiny_model
from transformers import TrainingArguments

from vlmslice.data.collator import IGNORED
from vlmslice.loss_weighting import (
    WEIGHTINGS,
    WeightingCollator,
    WeightingError,
    weigh_answers,
    weighted_loss,
)
from vlmslice.training.trainer import StageTrainer

LABELS = torch.tensor([[IGNORED, 3, IGNORED, 1, 0], [IGNORED, IGNORED, IGNORED, IGNORED, 2]])
WEIGHT = {"per_token": lambda n: 1, "per_sample": lambda n: 1 / n, "square_root": lambda n: 1 / math.sqrt(n)}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_loss_is_that_of_the_formula(weighting):
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    log_probs = logits.log_softmax(-1)
    total, divisor = 0.0, 0.0
    for row, labels in enumerate(LABELS.tolist()):
        answer = [(i, label) for i, label in enumerate(labels) if label != IGNORED]
        weight = WEIGHT[weighting](len(answer))
        total += weight * sum(-float(log_probs[row, i - 1, label]) for i, label in answer)
        divisor += weight * len(answer)
    loss = weighted_loss(logits, LABELS, weigh_answers(LABELS, weighting))
    assert float(loss) == pytest.approx(total / divisor, rel=1e-6)


def test_per_token_is_the_loss_without_weights():
    model = tiny_model()
    single, _ = collators("spatial_resampler", "per_token")
    batch = single(SAMPLES)
    weighted = model(**batch).loss.item()
    del batch["loss_weights"]
    assert weighted == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_a_misspelt_weighting_is_named():
    with pytest.raises(WeightingError, match="'per_tokens', expected .*did you mean 'per_token'"):
        WeightingCollator(lambda samples: {}, "per_tokens")


STEP = 0.01


def train_one_step(data: list, collator, folder: Path, batch_size: int, num_accumulations: int) -> dict:
    """Weights after one step of plain gradient descent."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=num_accumulations,
        learning_rate=STEP,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )
    model = tiny_model()
    StageTrainer(model=model, args=arguments, train_dataset=data, data_collator=collator).train()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_step(got: dict, expected: dict) -> None:
    start = dict(tiny_model().named_parameters())
    moved = max((expected[name] - start[name]).norm() for name in expected)
    assert moved > STEP
    for name in expected:
        assert (got[name] - expected[name]).norm() < 1e-5 * moved, name


@pytest.fixture(scope="module")
def separate_step() -> dict:
    """The same by hand, from all samples in one padded batch."""
    model = tiny_model()
    single, _ = collators("spatial_resampler", "square_root")
    model(**single(SAMPLES)).loss.backward()
    return {
        name: (parameter if parameter.grad is None else parameter - STEP * parameter.grad).detach()
        for name, parameter in model.named_parameters()
    }


def test_a_step_of_accumulated_samples_or_rows_is_that_of_all_samples_at_once(separate_step, tmp_path):
    single, packing = collators("spatial_resampler", "square_root")
    assert_same_step(train_one_step(SAMPLES, single, tmp_path, 2, 3), separate_step)
    assert_same_step(train_one_step(packs_of(SAMPLES, PLAN), packing, tmp_path, 1, 2), separate_step)


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from test_loss_weighting import train_one_step
from test_packing import SAMPLES, collators, packs_of
from vlmslice.process_group import leave_process_group

_, packing = collators("spatial_resampler", "square_root")
# Two rows each, of unlike numbers of samples and answer ids, accumulated.
packs = packs_of(SAMPLES, [[0, 3], [1], [2, 5], [4]])
weights = train_one_step(packs, packing, Path(sys.argv[1]), 1, 2)
torch.save(weights, f"{sys.argv[1]}/weights.pt")
leave_process_group()
"""


@pytest.mark.slow
def test_a_step_of_packed_rows_on_two_processes_is_that_of_one(separate_step, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(script), str(tmp_path)]
    tests = str(Path(__file__).parent)
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([variables["PYTHONPATH"], tests])
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_step(torch.load(tmp_path / "weights.pt", weights_only=True), separate_step)
