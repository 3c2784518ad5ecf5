import hashlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

import vlmslice
from vlmslice.data.dense import collate_crops
from vlmslice.data.mixture import MixedDataset, ShuffledDataset
from vlmslice.data.samples import TaskConfig
from vlmslice.data.sources import ConversationMixture, Source
from vlmslice.data.tasks import Curriculum, TaskDataset
from vlmslice.training import Stage, TrainingError, run_stage
from vlmslice.training.record import RECORD_FILE, describe, write_record


class Model(torch.nn.Linear):
    def forward(self, x):
        return {"loss": super().forward(x).pow(2).mean()}


def build(width: int, previous: Path | None) -> Model:
    return Model(width, 1)


def save(model: torch.nn.Module, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "model.pt")


def collate(samples: list) -> dict[str, torch.Tensor]:
    return {"x": torch.stack([sample[0] for sample in samples])}


def make_stage(**arguments) -> Stage:
    fixed = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 2,
        "seed": 5,
        "report_to": [],
        "disable_tqdm": True,
    }
    return Stage(
        name="only",
        model=partial(build, 3),
        dataset=TensorDataset(torch.arange(36.0).reshape(12, 3)),
        collator=collate,
        arguments=fixed | arguments,
        save=save,
        learning_rates={"weight": 0.1},
        muon=("layers.",),
    )


def read(path: Path) -> dict:
    return json.loads((path / RECORD_FILE).read_text())


def test_record_of_a_stage(tmp_path: Path) -> None:
    final = run_stage(make_stage(learning_rate=1e-3), tmp_path, None, recipe="mine")
    record = read(final)
    assert record == read(tmp_path / "only")
    assert record["recipe"] == "mine" and record["stage"] == "only" and record["seed"] == 5
    assert record["learning_rates"] == {"weight": 0.1} and record["muon"] == ["layers."]
    assert record["samples_per_step"] == 6 and record["num_processes"] == 1
    assert record["model"] == {"function": f"{__name__}.build", "width": 3}
    assert record["dataset"]["class"].endswith("TensorDataset") and record["dataset"]["length"] == 12
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["versions"]["vlmslice"] == vlmslice.__version__
    # What differs from transformers' defaults, and nothing else.
    arguments = record["training_arguments"]
    assert arguments["learning_rate"] == 1e-3 and arguments["gradient_accumulation_steps"] == 3
    assert not {"adam_beta1", "weight_decay", "accelerator_config", "hub_token"} & arguments.keys()
    assert len(arguments) < 15


def test_record_exists_as_soon_as_the_stage_starts(tmp_path: Path) -> None:
    def fail(samples: list) -> dict:
        assert read(tmp_path / "only")["stage"] == "only"
        raise RuntimeError("first batch")

    stage = make_stage()
    stage.collator = fail
    with pytest.raises(RuntimeError, match="first batch"):
        run_stage(stage, tmp_path, None)


def test_resumed_with_other_settings(tmp_path: Path) -> None:
    write_record(tmp_path, {"seed": 1, "rate": (1, 2)})
    write_record(tmp_path, {"seed": 1, "rate": (1, 2)}, tmp_path / "checkpoint-4")
    assert read(tmp_path) == {"seed": 1, "rate": [1, 2]}
    write_record(tmp_path, {"seed": 2, "rate": [1, 2]}, tmp_path / "checkpoint-4")
    write_record(tmp_path, {"seed": 2, "rate": [9]}, tmp_path / "checkpoint-8")
    earlier = [{"until_step": 4, "seed": 1}, {"until_step": 8, "rate": [1, 2]}]
    assert read(tmp_path) == {"seed": 2, "rate": [9], "earlier": earlier}
    write_record(tmp_path, {"seed": 3})  # begun anew
    assert read(tmp_path) == {"seed": 3}


def test_files_are_named_with_their_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    path.write_text((json.dumps(line) + "\n") * 4)
    described = describe(ConversationMixture([Source(path, 0.5)], seed=3))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert described["sources"][0]["path"] == {"file": str(path), "sha256": digest}
    assert described["sources"][0]["weight"] == 0.5
    assert described["seed"] == 3 and described["length"] == 2


def test_datasets_are_described_to_their_depth() -> None:
    steps = [Curriculum(40, TaskConfig(max_count=3), {"read": 0.5, "count": 0.5})]
    tasks = TaskDataset(steps, fonts=None, seed=7, group=4, name="wide")  # type: ignore[arg-type]
    described = describe(MixedDataset([(tasks, 0.75), (ShuffledDataset(range(9), 2), 0.25)], 80, 4, seed=1))
    assert described["num_samples"] == described["length"] == 80 and described["seed"] == 1
    (rendered, first_share), (shuffled, second_share) = described["sources"]
    assert (first_share, second_share) == (0.75, 0.25)
    assert rendered["class"] == "vlmslice.data.tasks.TaskDataset" and rendered["name"] == "wide"
    assert rendered["steps"][0]["weights"] == {"read": 0.5, "count": 0.5}
    assert rendered["steps"][0]["config"]["max_count"] == 3
    assert shuffled["dataset"] == list(range(9)) and shuffled["seed"] == 2
    json.dumps(described)


def test_small_values() -> None:
    assert describe(collate_crops) == "vlmslice.data.dense.collate_crops"
    assert describe({"b": {2, 1}, "a": (1.5, None)}) == {"b": [1, 2], "a": [1.5, None]}
    assert describe(torch.nn.Linear(1, 1)) == "torch.nn.modules.linear.Linear"
    assert describe(list(range(5000))) == {"length": 5000, "begins": [0, 1, 2]}


def test_commit_is_that_of_the_checkout() -> None:
    from vlmslice.training.record import _git_commit

    root = Path(vlmslice.__file__).parents[1]
    found = _git_commit()
    assert bool(found) == (root / ".git").exists()
    if found:
        assert len(found["git_commit"]) == 40 and isinstance(found["git_changed"], bool)


def test_folder_of_another_start_is_refused(tmp_path: Path) -> None:
    run_stage(make_stage(), tmp_path, None)
    stage = make_stage()
    stage.starts_at = tmp_path / "other" / "checkpoint-1"
    with pytest.raises(TrainingError, match="holds a stage that started at None, expected .*checkpoint-1"):
        run_stage(stage, tmp_path, None)
