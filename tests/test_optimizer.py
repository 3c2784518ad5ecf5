"""MuonAdamW: each part against torch's own, and a stage that goes on from a checkpoint as if never stopped."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlmslice.training import Stage, TrainingError, run_stage
from vlmslice.training.optimizer import MuonAdamW, find_matrices

RATES = {"lr": 0.02, "weight_decay": 0.1}


class Model(nn.Module):
    """A layer for Muon, and a head for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.head(torch.tanh(self.body(x))).square().mean()}


def optimizer_of(model: Model) -> MuonAdamW:
    matrices = list(find_matrices(model, ("body.",)))
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    groups = [{"params": others, "is_matrix": False}, {"params": matrices, "is_matrix": True}]
    return MuonAdamW(groups, **RATES)


def take_steps(model: Model, optimizers: list[torch.optim.Optimizer], numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        model(torch.randn(5, 6, generator=generator))["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9
        model.zero_grad()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_only_weights_of_linear_layers_are_matrices() -> None:
    model = Model()
    model.body[1].weight.requires_grad_(False)
    assert [id(p) for p in find_matrices(model, ("body.",))] == [id(model.body[0].weight)]
    assert len(list(find_matrices(Model(), ("body.", "head")))) == 3


def test_parts_agree_with_torch() -> None:
    model, reference = Model(), Model()
    ours = optimizer_of(model)
    matrices = [reference.body[0].weight, reference.body[1].weight]
    others = [reference.body[0].bias, reference.body[1].bias, *reference.head.parameters()]
    parts = [
        torch.optim.Muon(matrices, **RATES, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, **RATES),
    ]
    take_steps(reference, parts, range(4))
    for number in range(4):
        take_steps(model, [ours], range(number, number + 1))
        ours.param_groups[1]["lr"] *= 0.9  # that of AdamW; take_steps changes the first group's
    torch.testing.assert_close(weights(model), weights(reference))


def test_state_dict_goes_on_bit_exact() -> None:
    whole = Model()
    take_steps(whole, [optimizer_of(whole)], range(6))

    first, second = Model(), Model()
    before, after = optimizer_of(first), optimizer_of(second)
    take_steps(first, [before], range(3))
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    take_steps(second, [after], range(3, 6))
    assert torch.equal(weights(second), weights(whole))


def stage(**arguments) -> Stage:
    return Stage(
        name="fit",
        model=lambda previous: Model(),
        dataset=[{"x": torch.randn(6, generator=torch.Generator().manual_seed(i))} for i in range(32)],
        collator=lambda samples: {"x": torch.stack([s["x"] for s in samples])},
        arguments={
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.02,
            "weight_decay": 0.1,
            "max_steps": 8,
            "save_steps": 3,
            "seed": 0,
        }
        | arguments,
        save=lambda model, folder: save_file(model.state_dict(), folder / "model.safetensors"),
        learning_rates={"head.": 0.5},
        muon=("body.",),
    )


def test_stage_resumes_bit_exact(tmp_path: Path) -> None:
    run = partial(run_stage, run_dir=tmp_path, previous=None)
    final = run(stage())
    whole = load_file(final / "model.safetensors")
    for name in ("final", "checkpoint-6", "checkpoint-8"):
        path = tmp_path / "fit" / name
        if path.exists():
            path.rename(tmp_path / name)
    assert (tmp_path / "fit" / "checkpoint-3").exists()
    resumed = load_file(run(stage()) / "model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    start = Model().state_dict()
    assert not any(torch.equal(start[name], whole[name]) for name in whole)


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="Muon, which DeepSpeed would cut up.*--adamw"):
        run_stage(stage(deepspeed="zero2.json"), tmp_path, None)
