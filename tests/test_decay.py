"""Branches with a falling learning rate, off a trunk of the tiny recipe's stage `answer`."""

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmslice.training import Stage, TrainingError, run_stage
from vlmslice.training.decay import RotatedDataset, decay_stage

MATRICES = ("connector.", "language_model.model.layers.")
RATE = 3e-3


@pytest.fixture(scope="module", params=[(), MATRICES], ids=["adamw", "muon"])
def trunk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage, Path]:
    """A stage that ran 8 steps, and its folder, with a checkpoint of every step."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
    from recipes.tiny import tiny

    sys.path.pop(0)
    stage = tiny()[1]
    # Read in order, so that the samples of a step are the same in every run.
    arguments = {
        "max_steps": 8, "save_steps": 1, "save_total_limit": None, "logging_steps": 1, "disable_tqdm": True,
        "warmup_steps": 2, "learning_rate": RATE, "train_sampling_strategy": "sequential", "report_to": [],
    }  # fmt: skip
    stage = dataclasses.replace(stage, arguments=stage.arguments | arguments, muon=request.param)
    folder = tmp_path_factory.mktemp("trunk")
    run_stage(stage, folder, None)
    return stage, folder / "answer"


def shorten(stage: Stage, max_steps: int) -> Stage:
    return dataclasses.replace(stage, arguments=stage.arguments | {"max_steps": max_steps})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(got: Path, expected: Path) -> None:
    first, second = weights(got), weights(expected)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def logged(folder: Path, name: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def digests(folder: Path) -> dict[Path, str]:
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_branch_and_trunk(trunk: tuple[Stage, Path], tmp_path: Path) -> None:
    stage, done = trunk
    # As after an interruption at step 4.
    interrupted = tmp_path / "answer"
    for step in range(1, 5):
        shutil.copytree(done / f"checkpoint-{step}", interrupted / f"checkpoint-{step}")
    before = digests(interrupted)

    branch = decay_stage(shorten(stage, 4), interrupted / "checkpoint-4")
    final = run_stage(branch, tmp_path, None)
    folder = tmp_path / "decay"
    assert final == folder / "final"
    # The first step is at the checkpoint's rate, on the samples that come next: it is the trunk's own fifth step, which
    # it can only be with its weights and its optimizer's state.
    assert_same(folder / "checkpoint-1", done / "checkpoint-5")
    assert logged(folder, "loss")[0] == logged(done, "loss")[4]
    assert logged(folder, "learning_rate") == pytest.approx([RATE, 0.75 * RATE, 0.5 * RATE, 0.25 * RATE])
    optimizer = torch.load(folder / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert [group["lr"] for group in optimizer["param_groups"]] == [0.0] * len(optimizer["param_groups"])

    assert digests(interrupted) == before
    run_stage(stage, tmp_path, None)
    assert_same(interrupted / "final", done / "final")

    # A branch that was interrupted goes on as if it had not been.
    reference = tmp_path / "reference"
    shutil.copytree(folder / "final", reference)
    for path in (folder / "final", folder / "checkpoint-4", folder / "checkpoint-3"):
        shutil.rmtree(path)
    assert_same(run_stage(branch, tmp_path, None), reference)


def test_factors_of_the_learning_rate_fall_alike(trunk: tuple[Stage, Path], tmp_path: Path) -> None:
    """The tiny recipe trains its vision encoder at 0.3 of the rate."""
    stage, done = trunk
    run_stage(decay_stage(shorten(stage, 4), done / "checkpoint-6", "1-sqrt"), tmp_path, None)
    for step, factor in ((1, 0.5), (3, 1 - 0.75**0.5)):
        state = torch.load(tmp_path / "decay" / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        rates = {round(group["lr"] / RATE, 6) for group in state["param_groups"]}
        assert rates == {round(factor, 6), round(0.3 * factor, 6)}


def test_new_data_begin_at_their_first_sample(trunk: tuple[Stage, Path]) -> None:
    stage, done = trunk
    first = stage.step_batch_size * 4
    assert decay_stage(stage, done / "checkpoint-4").dataset[0] == stage.dataset[first]
    assert decay_stage(stage, done / "checkpoint-4", new_data=True).dataset is stage.dataset


def test_another_decay_in_the_same_folder_is_refused(trunk: tuple[Stage, Path], tmp_path: Path) -> None:
    stage, done = trunk
    for step, resume in ((4, True), (6, False)):
        run_stage(decay_stage(shorten(stage, 1), done / f"checkpoint-{step}"), tmp_path, None, resume=resume)
    with pytest.raises(
        TrainingError, match="checkpoint-6, expected .*checkpoint-4; give another --output-dir"
    ):
        run_stage(decay_stage(shorten(stage, 1), done / "checkpoint-4"), tmp_path, None)


def test_other_parameters_are_refused(trunk: tuple[Stage, Path], tmp_path: Path) -> None:
    stage, done = trunk
    other = dataclasses.replace(stage, muon=() if stage.muon else MATRICES)
    with pytest.raises(TrainingError, match="decay with the recipe, model and options of the trunk"):
        run_stage(decay_stage(shorten(other, 2), done / "checkpoint-4"), tmp_path, None)


def test_a_finished_decay_is_no_trunk(trunk: tuple[Stage, Path], tmp_path: Path) -> None:
    stage, done = trunk
    run_stage(decay_stage(shorten(stage, 1), done / "checkpoint-4"), tmp_path, None)
    again = decay_stage(shorten(stage, 1), tmp_path / "decay" / "checkpoint-1")
    with pytest.raises(TrainingError, match="learning rate of 0 already"):
        run_stage(again, tmp_path / "again", None)


def test_errors_name_the_remedy(trunk: tuple[Stage, Path], tmp_path: Path) -> None:
    stage, done = trunk
    with pytest.raises(TrainingError, match="unknown shape of a decay 'liner'; did you mean 'linear'"):
        decay_stage(stage, done / "checkpoint-4", "liner")
    with pytest.raises(TrainingError, match="add --max-steps N"):
        decay_stage(shorten(stage, -1), done / "checkpoint-4")
    with pytest.raises(TrainingError, match="no whole checkpoint; expected RUN/STAGE/checkpoint-N"):
        decay_stage(stage, done / "checkpoint-999")
    with pytest.raises(TrainingError, match="which DeepSpeed cuts up"):
        deepspeed = dataclasses.replace(stage, arguments=stage.arguments | {"deepspeed": "zero2.json"})
        decay_stage(deepspeed, done / "checkpoint-4")


def test_rotated_dataset() -> None:
    rotated = RotatedDataset(range(5), 7)
    assert [rotated[i] for i in range(len(rotated))] == [2, 3, 4, 0, 1]
    with pytest.raises(IndexError, match="^sample 5 of 5$"):
        rotated[5]
