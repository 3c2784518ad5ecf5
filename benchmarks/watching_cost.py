"""What watching a run costs, as shares of a training step of the recipe `nano`.

Command: `OMP_NUM_THREADS=1 PYTHONPATH=train python benchmarks/watching_cost.py`; half a minute on one CPU core.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from recipes.nano import nano
from transformers.trainer_callback import TrainerControl

from vlmslice.training.diagnostics import Diagnostics
from vlmslice.training.throughput import FlopCounter

NUM_ROUNDS = 5
BATCH_SIZE = 8
FIRST_SAMPLE = 30_000


def main() -> None:
    stage = nano()[1]
    model = stage.model(None).train()
    batch = stage.collator([stage.dataset[i] for i in range(FIRST_SAMPLE, FIRST_SAMPLE + BATCH_SIZE)])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    diagnostics = Diagnostics(1)
    arguments = SimpleNamespace(deepspeed=None)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)

    def call(event: Callable) -> None:
        event(arguments, state, TrainerControl(), model=model)

    def train(counter: contextlib.AbstractContextManager, measures: bool) -> None:
        with counter:
            if measures:
                call(diagnostics.on_step_begin)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch)["loss"]
            loss.backward()
        if measures:
            call(diagnostics.on_pre_optimizer_step)
        optimizer.step()
        if measures:
            call(diagnostics.on_optimizer_step)
            call(diagnostics.on_step_end)
        optimizer.zero_grad()

    call(diagnostics.on_train_begin)
    seconds: dict[str, list[float]] = {"plain": [], "FLOPs counted": [], "diagnostics": []}
    for number in range(NUM_ROUNDS + 1):
        for name, times in seconds.items():
            counter = FlopCounter() if name == "FLOPs counted" else contextlib.nullcontext()
            start = time.perf_counter()
            train(counter, measures=name == "diagnostics")
            if number:  # the first round sets up kernels
                times.append(time.perf_counter() - start)
    plain = statistics.median(seconds["plain"])
    for name, times in seconds.items():
        print(
            f"{name:<15}{statistics.median(times) / plain:6.2f} x a step of {BATCH_SIZE} samples, {plain:.2f} s"
        )


if __name__ == "__main__":
    main()
