"""Steps that would spoil the weights: decided from the figures of all processes, and without a trace in weights."""

import copy
import logging
import math

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from vlmslice.training import GuardConfig, guards
from vlmslice.training.guards import DivergenceError, StepGuard
from vlmslice.training.optimizer import MuonAdamW
from vlmslice.training.trainer import StageTrainer

CPU = torch.device("cpu")


def ask(guard: StepGuard, loss: float, norm: float = 1.0, step: int = 1) -> bool:
    guard.add_loss(torch.tensor(loss))
    return guard.admits(norm, step)


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_skipped_and_told(fault: float, caplog) -> None:
    guard = StepGuard(GuardConfig(), CPU)
    assert ask(guard, 2.0)
    assert not ask(guard, fault, step=7)
    assert f"step 7: the loss is {fault} on rank 0; the step is skipped" in caplog.text
    assert not ask(guard, 2.0, fault)
    assert guard.counts.skipped == 2 and guard.counts.steps == 3


def test_a_fault_in_one_accumulated_batch_is_one_of_the_step() -> None:
    guard = StepGuard(GuardConfig(), CPU)
    guard.add_loss(torch.tensor(math.nan))
    assert not ask(guard, 1.0)
    assert ask(guard, 1.0)  # and is forgotten with it


def test_any_process_can_stop_the_step_of_all(monkeypatch, caplog) -> None:
    monkeypatch.setattr(guards, "_gather", lambda values, device: [values, [1.0, 1.0], [math.nan, 1.0]])
    assert not ask(StepGuard(GuardConfig(), CPU), 1.0)
    assert "the loss is nan on rank 2" in caplog.text


def test_too_many_in_a_row_end_the_run() -> None:
    guard = StepGuard(GuardConfig(max_in_a_row=3), CPU)
    for fault in (math.nan, math.nan, 1.0, math.nan, math.nan):
        ask(guard, fault)
    with pytest.raises(
        DivergenceError, match="3 steps in a row were skipped, max_in_a_row is 3; at step 9 the loss"
    ):
        ask(guard, math.nan, step=9)


def test_too_large_a_share_ends_the_run() -> None:
    guard = StepGuard(GuardConfig(max_share=0.25, min_steps=8), CPU)
    for step in range(1, 9):  # 2 of 8
        ask(guard, math.nan if step % 4 == 0 else 1.0, step=step)
    with pytest.raises(DivergenceError, match="3 of 9 steps were skipped, max_share is 0.25"):
        ask(guard, math.nan)


@pytest.mark.parametrize("skip_spikes", [False, True])
def test_spikes_are_told_and_skipped_on_demand(skip_spikes: bool, caplog) -> None:
    guard = StepGuard(GuardConfig(spike_factor=4.0, window=8, skip_spikes=skip_spikes), CPU)
    for loss in (100.0, 2.0, 2.2):  # the median of 2 is enough
        assert ask(guard, loss)
    assert not caplog.records
    assert ask(guard, 2.0 * 4) and not caplog.records  # at the limit
    assert ask(guard, 30.0, step=5) == (not skip_spikes)
    assert "step 5: the loss is 30, " in caplog.text and ("skipped" in caplog.text) == skip_spikes
    assert ask(guard, 2.0, 100.0) == (not skip_spikes)
    assert "the gradient norm is 100, 100.0 times its median 1" in caplog.text
    assert guard.counts.spikes == 2 and guard.counts.skipped == 2 * skip_spikes


def test_resumed_guard_decides_like_the_first() -> None:
    config = GuardConfig(spike_factor=3.0, window=4, skip_spikes=True)
    losses = [3.0, 2.5, 9.1, 2.0, 7.4, 2.2, math.nan, 1.9, 8.0, 1.0]
    guard = StepGuard(config, CPU)
    expected = [ask(guard, loss) for loss in losses]
    assert expected.count(False) >= 3
    first, second = StepGuard(config, CPU), StepGuard(config, CPU)
    got = [ask(first, loss) for loss in losses[:5]]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    got += [ask(second, loss) for loss in losses[5:]]
    assert got == expected
    assert second.state_dict() == guard.state_dict()


class Faulty(nn.Module):
    """A line; the loss of a batch that holds 3 is no number, or else only its gradient is."""

    def __init__(self, fault: str):
        super().__init__()
        self.line = nn.Linear(4, 4)
        self.fault = fault

    def forward(self, x, labels=None):
        loss = (self.line(x) - 1).pow(2).mean()
        if (x == 3).any():
            # The gradient of the root is infinite at zero, the root itself is not.
            loss = loss + (loss * math.nan if self.fault == "loss" else (self.line.weight * 0).sqrt().sum())
        return {"loss": loss}


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("muon", [(), ("line",)])
def test_skipped_step_leaves_weights_and_optimizer_as_they_were(tmp_path, fault, muon, caplog) -> None:
    """A run with faulty batches, against one in which the optimizer is asked for nothing at these steps."""
    bad = {3, 4}
    data = [{"x": torch.full((4,), 3.0 if i in bad else i / 10 + 4)} for i in range(8)]
    model = Faulty(fault)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=8, per_device_train_batch_size=1,
        train_sampling_strategy="sequential", save_strategy="no", learning_rate=0.1, weight_decay=0.1,
        logging_steps=8, disable_tqdm=True, optim="adamw_torch", remove_unused_columns=False,
    )  # fmt: skip
    trainer = StageTrainer(model=model, args=arguments, train_dataset=data, muon=muon)
    seen = []

    step = trainer.create_optimizer().step

    def watched(*args, **kwargs):
        before = (
            [p.detach().clone() for p in model.parameters()],
            copy.deepcopy(trainer.optimizer.state_dict()["state"]),
        )
        step(*args, **kwargs)
        after = [p.detach().clone() for p in model.parameters()], trainer.optimizer.state_dict()["state"]
        seen.append(_same(before, after))

    trainer.optimizer.step = watched
    assert isinstance(trainer.optimizer, MuonAdamW) == bool(muon)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert [index for index, is_same in enumerate(seen) if is_same] == sorted(bad)
    assert trainer.state.global_step == 8
    assert trainer.guard.counts.skipped == 2 and "skipped_steps" in trainer.state.log_history[-2]
    assert all(p.isfinite().all() for p in model.parameters())


def _same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right
