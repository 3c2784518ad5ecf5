"""Does a run that is killed again and again end with the weights of an undisturbed one, bit for bit?

    python benchmarks/kills.py --num 50

Kills (SIGKILL) a tiny run at random moments, and once in each phase of a save; after each it is started again as a user
would, until it is done. A row for each phase, one for the random kills; the exit code is 1 if a run fails or any weight
differs.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from forked import preload, start, wait

ROOT = Path(__file__).parent.parent
NUM_STEPS = 24
SAVE_STEPS = 4
KILLED_SAVE = 16
"""The save, by its step, in whose phases the run is killed; by then two older checkpoints are there."""
PATIENCE = 600.0


def train(folder: Path) -> None:
    from recipes.tiny import tiny

    from vlmslice.training import run_stage

    stage = tiny()[1]
    arguments = stage.arguments | {
        "max_steps": NUM_STEPS,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "disable_tqdm": True,
        "report_to": [],
    }
    run_stage(replace(stage, arguments=arguments), folder, None)


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def dying_before(owner: Any, name: str, condition: Callable[..., bool]) -> Iterator[None]:
    """Within it, the call of `owner.name` that meets the condition kills the process."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if condition(*args, **kwargs):
            die()
        return original(*args, **kwargs)

    setattr(owner, name, call)
    yield
    setattr(owner, name, original)


def is_killed_save(*args: Any, **kwargs: Any) -> bool:
    """Whether a call is about the checkpoint whose save is to be killed."""
    trainers = [a for a in args if hasattr(a, "state")]
    if trainers:
        return trainers[0].state.global_step == KILLED_SAVE
    return any(f"checkpoint-{KILLED_SAVE}" in str(a) for a in args)


def phases() -> dict[str, Callable[[Path], None]]:
    """Functions that train and are killed in one phase of a save."""
    from vlmslice.training import checkpoints, trainer

    def before(owner: Any, name: str, condition: Callable[..., bool] = is_killed_save) -> Callable:
        def run(folder: Path) -> None:
            with dying_before(owner, name, condition):
                train(folder)

        return run

    def in_the_middle_of_a_file(folder: Path) -> None:
        import torch

        original = torch.save

        def save(obj: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            original(obj, path, *args, **kwargs)
            if f"checkpoint-{KILLED_SAVE}" in str(path):
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        torch.save = save
        train(folder)

    def in_the_middle_of_a_deletion(folder: Path) -> None:
        original = shutil.rmtree

        def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
            if Path(path).name.startswith("old-"):
                next(p for p in sorted(Path(path).rglob("*")) if p.is_file()).unlink()
                die()
            original(path, *args, **kwargs)

        checkpoints.shutil.rmtree = rmtree  # type: ignore[assignment]
        train(folder)

    def final(folder: Path) -> None:
        with dying_before(sys.modules["vlmslice.training.run"], "commit", lambda aside, target: True):
            train(folder)

    return {
        "before the files": before(trainer.StageTrainer, "_save_checkpoint"),
        "a file half written": in_the_middle_of_a_file,
        "before the manifest": before(trainer, "seal_checkpoint"),
        "before the rename": before(trainer, "commit"),
        "before the oldest is dropped": before(trainer, "discard", lambda path: True),
        "the oldest half deleted": in_the_middle_of_a_deletion,
        "before the model's rename": final,
    }


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "answer" / "final" / "model.safetensors")


def differ(got: dict[str, Any], expected: dict[str, Any]) -> bool:
    import torch

    return got.keys() != expected.keys() or any(not torch.equal(got[k], v) for k, v in expected.items())


def main(
    num: Annotated[int, typer.Option(help="Random kills.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the moments of the random kills.")] = 0,
) -> None:
    """Kills, resumes and compares."""
    sys.path.insert(0, str(ROOT / "train"))
    preload()
    import recipes.tiny  # noqa: F401

    begun = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    log = root / "log"
    undisturbed = root / "undisturbed"
    first = time.monotonic()
    if wait([start(lambda: train(undisturbed), log)], PATIENCE) != [0]:
        raise SystemExit(f"the undisturbed run failed; see {log}")
    duration = time.monotonic() - first
    expected = weights(undisturbed)
    num_failed = 0

    def finish(folder: Path, what: str, num_kills: int) -> None:
        """Lets a run end, and tells whether all is as in the undisturbed one."""
        nonlocal num_failed
        if wait([start(lambda: train(folder), log)], PATIENCE) != [0]:
            result = "FAILED to resume"
        else:
            result = "differs" if differ(weights(folder), expected) else "bit for bit the same"
        num_failed += result != "bit for bit the same"
        typer.echo(f"{what:<30} {num_kills:>5}  {result}")
        shutil.rmtree(folder)

    typer.echo(f"{'killed':<30} kills  weights at the end")
    for name, run in phases().items():
        folder = root / "phase"
        [code] = wait([start(lambda: run(folder), log)], PATIENCE)  # noqa: B023  (forked at once)
        if code != -signal.SIGKILL:
            raise SystemExit(f"the run that was to be killed {name!r} ended with {code}; see {log}")
        finish(folder, name, 1)
    rng = random.Random(seed)
    num_runs = num_left = 0
    total = num
    while total:
        folder = root / f"random-{num_runs}"
        num_kills = 0
        while total and not (folder / "answer" / "final").exists():
            child = start(lambda: train(folder), log)  # noqa: B023
            moment = time.monotonic() + rng.uniform(0, duration)
            ended, status = 0, 0
            while not ended and time.monotonic() < moment:
                ended, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.002)
            if not ended:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                num_kills += 1
                total -= 1
            elif status:
                raise SystemExit(f"a resumed run failed; see {log}")
        num_left += num_kills
        finish(folder, f"at random, run {num_runs + 1}", num_kills)
        num_runs += 1
    typer.echo(
        f"{num_left} random kills over {num_runs} runs of {NUM_STEPS} steps ({duration:.1f} s undisturbed); "
        f"{num_failed} failed; {time.monotonic() - begun:.0f} s"
    )
    if num_failed:
        typer.echo(f"log: {log}")
        raise typer.Exit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    typer.run(main)
