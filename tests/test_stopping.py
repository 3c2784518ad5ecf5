"""Signals in one process; how several agree is in test_training.py."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from vlmslice.training.stopping import SignalStop

ARGUMENTS = SimpleNamespace(device=torch.device("cpu"))


def end_step(stop: SignalStop) -> TrainerControl:
    return stop.on_step_end(ARGUMENTS, None, TrainerControl())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_training_with_a_save_after_the_step(number: signal.Signals) -> None:
    def handle(*_: object) -> None:
        """Not the one that the tests were started with: in the background of a shell, SIGINT is ignored."""

    before = signal.signal(number, handle)
    with SignalStop() as stop:
        control = end_step(stop)
        assert not control.should_save and not control.should_training_stop and not stop.agreed
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        control = end_step(stop)
        assert control.should_save and control.should_training_stop and stop.agreed
    assert signal.signal(number, before) is handle


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with SignalStop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not end_step(stop).should_save
    finally:
        signal.signal(signal.SIGINT, before)
