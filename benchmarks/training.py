"""Training speed: the recipe `nano` beside the same model, losses and data written plainly with transformers' defaults.

    python benchmarks/training.py                          # stage broad, 12 steps of each
    python benchmarks/training.py --stage count --steps 20

Plain means: one process with all cores, `Trainer` and `TrainingArguments` as they come (fp32, AdamW, shuffled samples,
so that views and texts of unequal sizes are padded), SDPA attention. Ours is what the recipe's command runs: processes
of one thread, bf16 autocast, pictures of one size in a batch, attention written out, Muon. Both start from the same
weights and pass over the same samples; the first steps, in which kernels are set up, are not timed.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parent.parent
WARM_UP = 3

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    stage: Annotated[str, typer.Option(help="Stage of the recipe; any but `eye`.")] = "broad",
    steps: Annotated[int, typer.Option(help="Timed optimizer steps of each.")] = 12,
    processes: Annotated[
        int, typer.Option(help="Processes of ours; the recipe is meant for one a core.")
    ] = 2,
    rounds: Annotated[int, typer.Option(help="Runs of each, in turn; the best is taken.")] = 2,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
    output: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Times both in turn and prints samples/s and their ratio."""
    if worker is not None:
        assert output is not None
        (run_ours if worker == "ours" else run_plainly)(stage, steps, output)
        return
    best: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for name in ("plain", "ours"):
            measured = measure(name, stage, steps, processes)
            typer.echo(f"round {number + 1}, {name}: {measured['samples_per_second']:.2f} samples/s")
            if name not in best or measured["samples_per_second"] > best[name]["samples_per_second"]:
                best[name] = measured
    ours, plain = (best[name]["samples_per_second"] for name in ("ours", "plain"))
    share = best["ours"]["flops_share"]
    typer.echo(f"stage {stage}: ours {ours:.2f}, plain {plain:.2f} samples/s; ratio {ours / plain:.2f}")
    typer.echo(
        f"of the peak of matrix products in bf16: ours {share:.0%}, plain {share * plain / ours:.0%} "
        "(by the same FLOPs a sample: what padding costs does not count)"
    )


def measure(name: str, stage: str, steps: int, processes: int) -> dict[str, Any]:
    """Runs one of the two in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(__file__)), "--worker", name, "--stage", stage]
        command += ["--steps", str(steps), "--output", folder]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "train")])
        environment = os.environ | {"PYTHONPATH": paths}
        if name == "ours":
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
        else:
            launcher = []
            environment.pop("OMP_NUM_THREADS", None)
        done = subprocess.run(
            [sys.executable, *launcher, *command], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        return json.loads((Path(folder) / "measured.json").read_text())


def find_stage(name: str) -> Any:
    """The stage of the recipe, from fresh weights: the speed does not depend on what they have learned."""
    from recipes.nano import _build_reader, nano

    [stage] = [stage for stage in nano() if stage.name == name]

    def build(previous: Path | None) -> Any:
        # Which parts are trained is for the stage to say: it gets a folder of fresh weights to start from.
        with tempfile.TemporaryDirectory() as folder:
            _build_reader(None).save_pretrained(folder)
            return stage.model(Path(folder))

    return dataclasses.replace(stage, model=build, save=lambda model, folder: None)


def run_ours(name: str, steps: int, output: Path) -> None:
    from vlmslice.training import run_stage

    stage = find_stage(name)
    arguments = {"max_steps": WARM_UP + steps, "logging_steps": 1, "save_strategy": "no", "report_to": []}
    stage = dataclasses.replace(stage, arguments=stage.arguments | arguments | {"disable_tqdm": True})
    run_stage(stage, output, None)
    if os.environ.get("RANK", "0") == "0":
        history = json.loads((output / stage.name / "trainer_state.json").read_text())["log_history"]
        logged = [entry for entry in history if "loss" in entry]
        seconds = sum(stage.step_batch_size / entry["samples_per_second"] for entry in logged[WARM_UP:])
        shares = [entry["flops_share"] for entry in logged[WARM_UP:] if "flops_share" in entry]
        write(output, steps * stage.step_batch_size / seconds, sum(shares) / len(shares))


def run_plainly(name: str, steps: int, output: Path) -> None:
    from torch.utils.data import Subset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    stage = find_stage(name)
    model = stage.model(None)
    model.set_attn_implementation({"text_config": "sdpa"})
    num_samples = (WARM_UP + steps) * stage.step_batch_size
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            per_device_train_batch_size=stage.arguments["per_device_train_batch_size"],
            gradient_accumulation_steps=stage.arguments.get("gradient_accumulation_steps", 1),
            max_steps=WARM_UP + steps,
            learning_rate=stage.arguments["learning_rate"],
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        train_dataset=Subset(stage.dataset, range(num_samples)),
        data_collator=stage.collator,
        callbacks=[Clock()],
    )
    trainer.train()
    write(output, steps * stage.step_batch_size / (times[-1] - times[WARM_UP - 1]))


def write(output: Path, samples_per_second: float, flops_share: float | None = None) -> None:
    (output / "measured.json").write_text(
        json.dumps({"samples_per_second": samples_per_second, "flops_share": flops_share})
    )


if __name__ == "__main__":
    app()
