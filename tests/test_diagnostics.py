"""Diagnostics: figures against what the optimizer did, and warnings that name the part."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import nn
from torch.utils.data import Dataset

from vlmslice.training import Stage, run_stage
from vlmslice.training.diagnostics import Diagnostics, _sample, effective_rank, part_of, trained_parts

NUM_SAMPLES = 64


class TestEffectiveRank:
    def test_known_matrices(self) -> None:
        assert effective_rank(torch.eye(5)) == pytest.approx(5)
        assert effective_rank(torch.ones(7, 3)) == pytest.approx(1)
        assert effective_rank(torch.zeros(4, 4)) == 0
        # Singular values 3 and 1: shares 3/4 and 1/4.
        expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
        assert effective_rank(torch.tensor([[3.0, 0, 0], [0, 1.0, 0]])) == pytest.approx(expected)

    def test_neither_scale_nor_rotation_matters(self) -> None:
        rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
        rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
        assert effective_rank(100 * rows @ rotation) == pytest.approx(effective_rank(rows), rel=1e-4)


def test_parts() -> None:
    model = tiny_model("cross_attention")
    model.language_model.requires_grad_(False)
    assert set(trained_parts(model)) == {
        "vision_encoder",
        "connector",
        "canvas_position",
        "cross_attention",
    }
    assert part_of("base_model.model.connector.output.weight") == "connector"


class TwoParts(nn.Module):
    """A regression whose part `lost` has no influence on the loss unless `uses_lost`."""

    def __init__(self, uses_lost: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.kept, self.lost = nn.Linear(3, 2), nn.Linear(3, 2)
        self.uses_lost = uses_lost

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.kept(x) + self.uses_lost * self.lost(x) - y).square().mean()}


class Points(Dataset):
    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.randn(3, generator=torch.Generator().manual_seed(index))
        return {"x": x, "y": x[:2]}


def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def save(model: nn.Module, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "model.pt")


def train(folder: Path, model: nn.Module, diagnostics_steps: int | None = 1, **options) -> list[dict]:
    """Logged figures of a few steps."""
    arguments = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "disable_tqdm": True,
    }
    stage = Stage(
        name="points",
        model=lambda previous: model,
        dataset=Points(),
        collator=collate,
        arguments=arguments | {key: value for key, value in options.items() if key != "learning_rates"},
        save=save,
        learning_rates=options.get("learning_rates", {}),
        diagnostics_steps=diagnostics_steps,
    )
    run_stage(stage, folder, None)
    history = json.loads((folder / "points" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


class TestFigures:
    def test_are_those_of_the_step(self, tmp_path: Path) -> None:
        """SGD's update is rate x gradient; the weights before and after lie in the checkpoints."""
        figures = train(tmp_path, TwoParts(uses_lost=True))[3]
        before, after = (
            load_file(tmp_path / "points" / f"checkpoint-{step}" / "model.safetensors") for step in (3, 4)
        )
        for part in ("kept", "lost"):
            weights = torch.cat([before[f"{part}.{name}"].flatten() for name in ("weight", "bias")])
            updated = torch.cat([after[f"{part}.{name}"].flatten() for name in ("weight", "bias")])
            update = (updated - weights).norm()
            assert figures[f"{part}/update_ratio"] == pytest.approx(float(update / weights.norm()), rel=1e-3)
            assert figures[f"{part}/grad_norm"] == pytest.approx(float(update) / 1e-2, rel=1e-3)

    def test_every_so_many_steps(self, tmp_path: Path) -> None:
        logged = train(tmp_path, TwoParts(uses_lost=True), diagnostics_steps=3)
        assert [entry["step"] for entry in logged if "kept/grad_norm" in entry] == [3, 6]

    def test_never(self, tmp_path: Path) -> None:
        logged = train(tmp_path, TwoParts(), diagnostics_steps=0)
        assert not [name for entry in logged for name in entry if "/" in name]

    def test_large_weight_is_sampled_in_all_columns(self) -> None:
        columns = torch.arange(1024).repeat(1024, 1)
        sample = _sample(columns)
        assert len(sample) <= 2**16
        assert len(sample.unique()) == 1024


class TestWarnings:
    def test_part_without_gradient_is_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        train(tmp_path, TwoParts(uses_lost=False))
        warnings = [record.getMessage() for record in caplog.records if "diagnostics" in record.name]
        assert [w for w in warnings if "part 'lost' gets no gradient" in w and "step 3" in w]
        assert not [w for w in warnings if "kept" in w]
        assert len(warnings) == len(set(warnings)) == 2  # once for its gradient, once for its update

    def test_part_that_stands_still_is_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        train(tmp_path, TwoParts(uses_lost=True), learning_rates={"lost.": 1e-9})
        warnings = [record.getMessage() for record in caplog.records if "diagnostics" in record.name]
        assert len(warnings) == 1
        assert "part 'lost' has stopped learning" in warnings[0]

    def test_parts_that_learn_are_not(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        train(tmp_path, TwoParts(uses_lost=True))
        assert not [record for record in caplog.records if "diagnostics" in record.name]

    def test_collapse_of_visual_tokens(self, caplog: pytest.LogCaptureFixture) -> None:
        diagnostics = Diagnostics()
        for step, rank in enumerate([9.0, 8.0, 1.05, 1.04, 4.0, 1.7, 1.5, 4.0, 1.1, 1.1, 1.1, 1.1]):
            diagnostics._figures = {"connector/effective_rank": rank}
            diagnostics._warn_of_problems(step)
        # Three in a row below 1 + (9 - 1) / 10, once.
        [warning] = [record.getMessage() for record in caplog.records]
        assert warning.startswith("step 10: part 'connector' gives visual tokens that have become alike")
