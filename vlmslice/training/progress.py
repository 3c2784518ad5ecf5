"""What is seen of a run while it goes on."""

from __future__ import annotations

from tqdm.auto import tqdm
from transformers import TrainerCallback


class SampleProgress(TrainerCallback):
    """A progress bar that counts samples, so that its rate is samples/s; logged figures go above it.

    Behind the rate stand tokens/s and FLOP/s as a share of the machine's, as last logged.
    """

    def __init__(self, name: str, step_batch_size: int, parts: str):
        """`parts`: a line on what trains, shown first."""
        self._name, self._step_batch_size, self._parts = name, step_batch_size, parts
        self._bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._bar = tqdm(
                desc=self._name,
                initial=state.global_step * self._step_batch_size,
                total=state.max_steps * self._step_batch_size,
                unit=" samples",
                dynamic_ncols=True,
            )
            self._bar.write(f"{self._name} trains {self._parts}")

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(self._step_batch_size)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._bar is not None:
            figures = {k: f"{v:.4g}" for k, v in logs.items() if isinstance(v, float) and k != "total_flos"}
            of_run = "  ".join(f"{name} {value}" for name, value in figures.items() if "/" not in name)
            self._bar.write(f"step {state.global_step}  {of_run}")
            of_parts = "  ".join(f"{name} {value}" for name, value in figures.items() if "/" in name)
            if of_parts:
                self._bar.write(f"  {of_parts}")
            if "flops_share" in logs:
                self._bar.set_postfix_str(
                    f"{logs['tokens_per_second']:.4g} tokens/s, {logs['flops_share']:.1%} of the matmul peak"
                )

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()
