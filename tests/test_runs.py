"""`vlmslice runs`: what it tells of a run that is finished, interrupted or only begun."""

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import Vlmslice, assert_user_error

from vlmslice.training.checkpoints import MANIFEST
from vlmslice.training.runs import find_runs, run_lines

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run, `tiny`."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(ROOT / "train" / "train.py"), "--recipe", "tiny", "--max-steps", "6"]
    settings = ["--set", "logging_steps=2", "--set", "save_steps=4", "--set", "disable_tqdm=true"]
    done = subprocess.run(
        [*command, *settings, "--output-dir", str(folder / "tiny")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return shutil.copytree(finished / "tiny", tmp_path / "tiny")


def history_of(stage: Path) -> list[dict]:
    return json.loads((stage / "trainer_state.json").read_text())["log_history"]


def test_finished_run(finished: Path, vlmslice_command: Vlmslice) -> None:
    stages = json.loads(vlmslice_command("runs", finished, "--json").out)["stages"]
    assert [stage["stage"] for stage in stages] == ["eye", "answer"]  # as they were run, not by name
    for stage in stages:
        history = history_of(finished / "tiny" / stage["stage"])
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert len(losses) == 3
        assert (stage["step"], stage["max_steps"], stage["finished"]) == (6, 6, True)
        assert (stage["last_loss"], stage["best_loss"]) == (losses[-1], min(losses))
        assert stage["samples_per_second"] == history[2]["samples_per_second"]
        assert {"tokens_per_second", "flops_share"} <= set(stage["figures"])
        assert datetime.now().astimezone() - datetime.fromisoformat(stage["last_activity"]) < timedelta(
            hours=1
        )
    table = vlmslice_command("runs", finished).out
    assert table.count("6 / 6") == table.count(" finished") == 2
    assert table.count(str(finished / "tiny")) == 1
    assert "language_loss" in table


@pytest.mark.parametrize("place", [".", "tiny", "tiny/answer"])
def test_any_folder_will_do(finished: Path, place: str) -> None:
    names = [record.stage for record in find_runs(finished / place)]
    assert names == (["answer"] if place.endswith("answer") else ["eye", "answer"])


def test_stages_that_began_in_the_same_second(run: Path) -> None:
    """They are told in their order, whichever of them was written to last."""
    for path in sorted(run.glob("*/runs/*/events.out.tfevents.*")):
        name = path.name.split(".")
        path.rename(path.with_name(".".join([*name[:3], "1700000000", *name[4:]])))
    for stage in ("answer", "eye"):
        (run / stage / "trainer_state.json").touch()
        assert [record.stage for record in find_runs(run)] == ["eye", "answer"]


def test_all_processes_are_counted(finished: Path) -> None:
    """Tokens per sample are the same figure as in the log of one process, whatever the time."""
    entry = history_of(finished / "tiny" / "eye")[2]
    patches_per_sample = entry["tokens_per_second"] / entry["samples_per_second"]
    assert 4 < patches_per_sample <= 48  # of the recipe's `max_patches`
    assert 0 < entry["flops_share"] < 1.5


def test_interrupted_run(run: Path) -> None:
    """The newest whole checkpoint tells, and one that is not whole does not."""
    stage = run / "answer"
    shutil.rmtree(stage / "final")
    (stage / "trainer_state.json").unlink()
    (stage / "checkpoint-6" / MANIFEST).unlink()
    record = find_runs(run)[1]
    assert (record.step, record.max_steps, record.finished) == (4, 6, False)
    assert record.last_loss == [e["loss"] for e in history_of(stage / "checkpoint-4") if "loss" in e][-1]


def test_run_that_has_only_begun(run: Path) -> None:
    for path in (run / "answer").iterdir():
        if path.name != "runs":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    record = find_runs(run)[1]
    assert (record.stage, record.step, record.last_loss, record.finished) == ("answer", None, None, False)
    _, lines = run_lines([record], datetime.now(UTC))
    assert lines[0][2:6] == ["-", "-", "-", "-"]


def test_state_that_is_cut_off(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.truncate(run / "eye" / "trainer_state.json", 99)
    record = find_runs(run)[0]
    assert record.step == 6  # from the checkpoint
    assert "passing over" in caplog.text


def test_figures_that_are_no_numbers(run: Path, vlmslice_command: Vlmslice) -> None:
    path = run / "eye" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"][2] |= {"loss": float("nan"), "kind_right": float("nan")}
    path.write_text(json.dumps(state))
    first, _ = json.loads(vlmslice_command("runs", run, "--json").out, parse_constant=pytest.fail)["stages"]
    assert first["last_loss"] is None
    assert first["figures"]["kind_right"] is None
    assert first["best_loss"] == min(entry["loss"] for entry in state["log_history"][:2])


@pytest.mark.parametrize(
    ("ago", "words"), [(5, "5 s ago"), (150, "2 min ago"), (7200, "2 h ago"), (3 * 86_400, "3 d ago")]
)
def test_last_activity(finished: Path, ago: int, words: str) -> None:
    record = find_runs(finished)[0]
    assert run_lines([record], record.last_activity + timedelta(seconds=ago))[1][0][7] == words


def test_errors(tmp_path: Path, vlmslice_command: Vlmslice) -> None:
    assert_user_error(vlmslice_command("runs", tmp_path / "no"), "is no folder")
    assert_user_error(vlmslice_command("runs", tmp_path), "no run lies under", "trainer_state.json")


def test_answers_without_torch(finished: Path) -> None:
    code = (
        "import sys, vlmslice_command\n"
        f"sys.argv[1:] = ['runs', {str(finished)!r}]\n"
        "try: vlmslice_command.main()\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "print('slow:', sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("slow: []\n")
