"""Training: whole commands on the tiny recipe, killed, resumed and spread over processes; and the parts they rest on.

Figures measured on two CPU cores, fp32, 20 steps from a loss of 5.63 to 4.22: two processes, plain, ZeRO-2 or ZeRO-3,
differ from one by at most 1.5e-6 in the loss of any step (float32 holds 4.22 to 5e-7). The tests allow 2e-5.
Accumulated batches agree in the loss of the answers alone: each weighs its cells for itself in the dense loss.
"""

import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments
from typer.testing import CliRunner

from vlmslice.data.collator import IGNORED
from vlmslice.training import TrainingError, share_batch
from vlmslice.training.checkpoints import (
    MANIFEST,
    complete_checkpoints,
    last_complete_checkpoint,
    seal_checkpoint,
)
from vlmslice.training.trainer import StageTrainer

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train" / "train.py"
LOSS_TOLERANCE = 2e-5
NUM_COMPARED_STEPS = 20

# 40 steps of two stages, a checkpoint every 8.
REFERENCE = ["--recipe", "tiny", "--max-steps", "40", "--set", "logging_steps=1", "--set", "save_steps=8"]
SHORT = ["--recipe", "tiny", "--stage", "answer", "--max-steps", "20", "--set", "logging_steps=1"]


@pytest.fixture(autouse=True)
def _recipes_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


def environment() -> dict[str, str]:
    """For commands: one thread per process, no accelerator, and this checkout's package."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(SCRIPT.parent)]),
    }


def run_command(command: list[str]) -> None:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def train_command(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *arguments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def logged_losses(stage_dir: Path) -> list[float]:
    history = json.loads((stage_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def assert_same_weights(got: Path, expected: Path) -> None:
    got_weights, expected_weights = (load_file(p / "final" / "model.safetensors") for p in (got, expected))
    assert got_weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert torch.equal(got_weights[name], tensor), name


def assert_losses_agree(got: Path, expected: Path) -> None:
    got_losses, expected_losses = logged_losses(got), logged_losses(expected)[:NUM_COMPARED_STEPS]
    assert len(got_losses) == NUM_COMPARED_STEPS
    assert got_losses == pytest.approx(expected_losses, abs=LOSS_TOLERANCE)
    assert expected_losses[-1] < expected_losses[0] - 1  # it is learning that agrees, not standing still


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run in one process."""
    run_dir = tmp_path_factory.mktemp("reference")
    run_command(train_command(*REFERENCE, "--output-dir", str(run_dir)))
    return run_dir


@pytest.fixture
def after_eye(reference: Path, tmp_path: Path) -> Path:
    """A run folder in which the first stage is done."""
    shutil.copytree(reference / "eye" / "final", tmp_path / "eye" / "final")
    return tmp_path


KILL_IN_SAVE = """
import os, runpy, signal, sys
from vlmslice.training import trainer

def die(folder, layout, seal=trainer.seal_checkpoint):
    if folder.name == "checkpoint-32":
        os.kill(os.getpid(), signal.SIGKILL)
    seal(folder, layout)

trainer.seal_checkpoint = die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_resume_after_kills_is_bit_exact(reference: Path, tmp_path: Path) -> None:
    command = train_command(*REFERENCE, "--output-dir", str(tmp_path))
    stage_dir = tmp_path / "answer"

    # Killed from outside, at whatever it is doing after its second checkpoint.
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 400
        while not (stage_dir / "checkpoint-16").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (stage_dir / "final").exists()

    # What other programs leave: an empty folder, and a copy that broke off.
    (stage_dir / "checkpoint-9999").mkdir()
    shutil.copytree(stage_dir / "checkpoint-16", stage_dir / "checkpoint-39")
    os.truncate(stage_dir / "checkpoint-39" / "optimizer.pt", 1000)

    # Killed from inside, when all files of a checkpoint are written and none has its name yet.
    killed = subprocess.run(
        [sys.executable, "-c", KILL_IN_SAVE, *command[1:]], env=environment(), stderr=subprocess.DEVNULL
    )
    assert killed.returncode == -signal.SIGKILL
    assert (stage_dir / "incomplete" / "checkpoint-32" / "trainer_state.json").exists()
    assert last_complete_checkpoint(stage_dir) == stage_dir / "checkpoint-24"

    run_command(command)
    for name in ("eye", "answer"):
        assert_same_weights(tmp_path / name, reference / name)
    assert logged_losses(stage_dir) == logged_losses(reference / "answer")


TROUBLE = """
import os, runpy, signal, sys, time
from vlmslice.training import trainer

what = sys.argv.pop(1)
original = trainer.StageTrainer.compute_loss

def compute_loss(self, model, inputs, *args, **kwargs):
    step = self.state.global_step + 1
    if what == "stall" and step == 7 and os.environ["RANK"] == "1":
        time.sleep(600)
    loss = original(self, model, inputs, *args, **kwargs)
    if os.environ["RANK"] == "1":
        if what == "signal" and step == 3:
            return loss * float("nan")
        if what == "signal" and step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
    return loss

trainer.StageTrainer.compute_loss = compute_loss
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_trouble_on_one_rank_is_that_of_all(after_eye: Path) -> None:
    """A loss that is no number, then SIGTERM, twice; then the run goes on and the same rank stands still."""
    script = after_eye / "trouble.py"
    script.write_text(TROUBLE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    rest = [str(SCRIPT), *SHORT, "--set", "ddp_timeout=4", "--output-dir", str(after_eye)]
    stage_dir = after_eye / "answer"

    done = subprocess.run(
        [*launcher, str(script), "signal", *rest],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "step 3: the loss is nan on rank 1; the step is skipped" in done.stderr
    assert done.stderr.count("stopped: stage 'answer' was stopped by a signal after step 5") == 1
    assert done.returncode and re.search(r"exitcode\s*: 75", done.stderr), done.stderr[-3000:]
    assert complete_checkpoints(stage_dir) == [stage_dir / "checkpoint-5"]
    weights = load_file(stage_dir / "checkpoint-5" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())

    begun = time.monotonic()
    done = subprocess.run(
        [*launcher, str(script), "stall", *rest],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode and time.monotonic() - begun < 200
    assert re.search(
        r"error: rank 0 .* the others wait for rank 1 \(step 7: computes the loss", done.stderr
    ), done.stderr[-3000:]


def test_full_disk_ends_the_run_and_leaves_the_older_checkpoint(
    app, after_eye: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_dir = after_eye / "answer"
    save = StageTrainer._save_checkpoint

    def on_a_full_disk(self, *args):
        full = (100_000, resource.RLIM_INFINITY) if self.state.global_step == 16 else None
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, full)
        try:
            save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    monkeypatch.setattr(StageTrainer, "_save_checkpoint", on_a_full_disk)
    command = [*SHORT, "--set", "save_steps=8", "--output-dir", str(after_eye)]
    code, text = app(*command)
    assert code == 2 and "checkpoint-16 cannot be written: " in text and "give the same command again" in text
    assert not (stage_dir / "incomplete").exists()
    assert last_complete_checkpoint(stage_dir) == stage_dir / "checkpoint-8"
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    assert app(*command)[0] == 0


def test_run_that_was_stopped_after_its_last_step_takes_no_other(app, after_eye: Path) -> None:
    command = [*SHORT[:4], "--max-steps", "4", "--set", "save_steps=2", "--output-dir", str(after_eye)]
    assert app(*command)[0] == 0
    final = after_eye / "answer" / "final"
    expected = load_file(final / "model.safetensors")
    shutil.rmtree(final)
    assert app(*command)[0] == 0
    got = load_file(final / "model.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_rank_without_images_keeps_in_step_under_zero3() -> None:
    benchmark = ROOT / "benchmarks" / "parallelism.py"
    run_command(
        [sys.executable, str(benchmark), "--connector", "cross_attention", "--zero", "3", "--num-steps", "2"]
        + ["--data", "one rank text-only", "--accumulation", "1", "--checkpointing", "off"]
    )


@pytest.mark.parametrize("zero", [None, "zero3.json"])
def test_torchrun_agrees_with_one_process(reference: Path, after_eye: Path, zero: str | None) -> None:
    config = ["--deepspeed", str(SCRIPT.parent / "deepspeed" / zero)] if zero else []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_command([*launcher, str(SCRIPT), *SHORT, *config, "--output-dir", str(after_eye)])
    assert_losses_agree(after_eye / "answer", reference / "answer")


def test_torchrun_agrees_with_one_process_in_the_dense_stage(reference: Path, tmp_path: Path) -> None:
    """Cells that show something weigh more than empty ones, and the processes have unequal shares of them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(SCRIPT), *SHORT, "--output-dir", str(tmp_path)]
    run_command(["eye" if word == "answer" else word for word in command])
    assert_losses_agree(tmp_path / "eye", reference / "eye")


def test_deepspeed_zero2_agrees_with_one_process(reference: Path, after_eye: Path) -> None:
    launcher = Path(sys.executable).with_name("deepspeed")
    config = SCRIPT.parent / "deepspeed" / "zero2.json"
    run_command(
        [str(launcher), "--num_gpus", "2", "--master_port", str(free_port()), str(SCRIPT), *SHORT]
        + ["--deepspeed", str(config), "--output-dir", str(after_eye)]
    )
    assert_losses_agree(after_eye / "answer", reference / "answer")


# In this process, for speed.


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch):
    """Runs the script's command line; returns the exit code and all output."""
    spec = importlib.util.spec_from_file_location("train_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(module.app, list(arguments))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return invoke


def test_help_and_list(app) -> None:
    code, text = app("--help")
    assert code == 0 and all(option in text for option in ("--recipe", "--set", "--deepspeed", "--max-steps"))
    code, text = app("--list")
    assert code == 0 and "tiny: Teaches" in text and "answer: 60 steps of 8 samples" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "--recipe is missing; expected one of align, distil, lora, nano, nano_pixel_unshuffle, nano_resampler, ",
        ),
        (["--recipe", "align"], "starts from a saved model; add --model FOLDER"),
        (["--recipe", "tiny", "--model", "x"], "takes no --model; got 'x'"),
        (["--recipe", "align", "--model", "/nowhere"], "it has no config.json"),
        (["--recipe", "align", "--model", "x", "--teacher", "x"], "takes no --teacher; got 'x'"),
        (["--recipe", "tiny", "--data-root", "x"], "takes no --data-root; got 'x'"),
        (["--recipe", "nano", "--data-root", "/nowhere"], "there is no receipts.jsonl in '/nowhere'"),
        (["--recipe", "tniy"], "unknown recipe 'tniy'; did you mean 'tiny'?"),
        (
            ["--recipe", "tiny", "--stage", "answr"],
            "unknown stage of recipe 'tiny' 'answr'; did you mean 'answer'?",
        ),
        (
            ["--recipe", "tiny", "--stage", "zzz"],
            "unknown stage of recipe 'tiny' 'zzz'; expected one of eye, answer",
        ),
        (["--recipe", "tiny", "--set", "learning_rat=1"], "did you mean 'learning_rate'?"),
        (["--recipe", "tiny", "--set", "seed"], "--set 'seed' has no value; expected KEY=VALUE"),
        (["--recipe", "tiny", "--set", "per_device_train_batch_size=9999"], "fewer than one step of 9999"),
    ],
)
def test_errors_name_the_remedy(app, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, text = app(*arguments, "--output-dir", str(tmp_path))
    assert code == 2 and message in text


def test_stage_needs_the_one_before(app, tmp_path: Path) -> None:
    code, text = app("--recipe", "tiny", "--stage", "answer", "--output-dir", str(tmp_path))
    assert code == 2 and "run `--stage eye` first" in text


def test_deepspeed_needs_a_launcher(app, tmp_path: Path) -> None:
    code, text = app("--recipe", "tiny", "--deepspeed", "zero2.json", "--output-dir", str(tmp_path))
    assert code == 2 and "--deepspeed needs a launcher; run `torchrun" in text


def test_accumulated_batches_agree_with_one_batch(app, reference: Path, after_eye: Path) -> None:
    halves = ["--set", "per_device_train_batch_size=4", "--set", "gradient_accumulation_steps=2"]
    assert app(*SHORT, *halves, "--output-dir", str(after_eye))[0] == 0
    assert_losses_agree(after_eye / "answer", reference / "answer")


def test_auxiliary_loss_is_not_weighted_by_answer_ids(tmp_path: Path) -> None:
    """1 of the 4 answer ids of a step of 2 accumulations: a quarter of the answers' loss, half of the rest."""

    class Model(torch.nn.Linear):
        def forward(self, labels):
            return {"loss": torch.tensor(8.0 + 3.0), "auxiliary_loss": torch.tensor(3.0)}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, gradient_accumulation_steps=2, report_to=[]
    )
    trainer = StageTrainer(model=Model(1, 1), args=arguments)
    labels = torch.tensor([[IGNORED, 7]])
    assert trainer.compute_loss(trainer.model, {"labels": labels}, num_items_in_batch=4) == 8 / 4 + 3 / 2


def test_bf16_trains(app, reference: Path, after_eye: Path) -> None:
    assert app(*SHORT, "--set", "bf16=true", "--output-dir", str(after_eye))[0] == 0
    losses = logged_losses(after_eye / "answer")
    assert losses == pytest.approx(logged_losses(reference / "answer")[:20], rel=0.02)


def test_checkpoint_of_another_layout_is_refused(app, reference: Path, after_eye: Path) -> None:
    checkpoint = after_eye / "answer" / "checkpoint-40"
    shutil.copytree(reference / "answer" / "checkpoint-40", checkpoint)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["layout"] = {"zero_stage": 2, "num_processes": 4}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    code, text = app(*SHORT, "--output-dir", str(after_eye))
    assert (
        code == 2
        and "'num_processes': 4" in text
        and "the launcher and the DeepSpeed config it was begun" in text
    )


def test_finished_stage_is_not_run_again(app, reference: Path) -> None:
    before = (reference / "answer" / "final").stat().st_mtime_ns
    assert app(*REFERENCE, "--output-dir", str(reference))[0] == 0
    assert (reference / "answer" / "final").stat().st_mtime_ns == before


def test_align_trains_a_saved_model(app, reference: Path, tmp_path: Path) -> None:
    model = reference / "answer" / "final"
    code, text = app(
        "--recipe", "align", "--model", str(model), "--output-dir", str(tmp_path), "--max-steps", "4",
        "--set", "logging_steps=1", "--set", "warmup_steps=1",
    )  # fmt: skip
    assert code == 0, text
    losses = logged_losses(tmp_path / "align")
    assert len(losses) == 4 and losses[-1] < losses[0]
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "align" / "final"))
    frozen = [name for name in before if name.startswith("vision_encoder.")]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(
        before["connector.head.projection.weight"], after["connector.head.projection.weight"]
    )


def test_logs_go_to_tensorboard(reference: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((reference / "answer" / "runs").iterdir()))).Reload()
    assert {"train/loss", "train/language_loss", "train/samples_per_second"} <= set(events.Tags()["scalars"])


def test_trained_model_answers(reference: Path) -> None:
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = reference / "answer" / "final"
    processor, model = (
        AutoProcessor.from_pretrained(folder),
        AutoModelForImageTextToText.from_pretrained(folder),
    )
    content = [{"type": "image", "image": Image.new("RGB", (80, 40))}, {"type": "text", "text": "Read this."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]


def test_labels_of_the_tiny_recipe_cover_answers_only() -> None:
    from recipes.tiny import tiny

    stage = tiny()[1]
    tokenizer = stage.collator.processor.tokenizer
    samples = [stage.dataset[i] for i in range(32)]
    assert {sample.task for sample in samples} == {"read", "count"}
    batch = stage.collator(samples)
    for sample, ids, labels in zip(samples, batch["input_ids"], batch["labels"], strict=True):
        learnt = labels != IGNORED
        assert torch.equal(labels[learnt], ids[learnt])
        assert tokenizer.decode(labels[learnt]).endswith(sample.answer + "<|end|>")
        assert tokenizer.decode(labels[learnt], skip_special_tokens=True) == sample.answer
        assert len(stage.collator.processor.find_points(labels[learnt].tolist())) == len(sample.points)


def test_every_recipe_describes_its_stages(reference: Path, tmp_path: Path) -> None:
    from recipes import build_stages, find_recipe, recipe_names, required_inputs

    from vlmslice.data.sources import Source

    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        8 * '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}\n'
    )
    inputs = {"--model": {"model": reference / "answer" / "final"}, "--data": {"data": [Source(chats)]}}

    known = {f.name for f in fields(TrainingArguments)}
    assert {"nano", "tiny"} <= set(recipe_names())
    for name in recipe_names():
        assert f"--recipe {name}" in find_recipe(name).__doc__
        needed = [inputs[option] for option in required_inputs(find_recipe(name))]
        stages = build_stages(name, **{key: value for part in needed for key, value in part.items()})
        assert len({stage.name for stage in stages}) == len(stages) > 0
        for stage in stages:
            assert stage.arguments.keys() <= known
            assert len(stage.dataset) >= stage.step_batch_size
            stage.collator([stage.dataset[0]])


@pytest.mark.parametrize(
    ("batch_size", "num_accumulations", "num_processes", "expected"),
    [
        (16, 1, 1, (16, 1)),
        (16, 1, 2, (8, 1)),
        (8, 4, 2, (8, 2)),
        (8, 4, 8, (4, 1)),
        (8, 6, 4, (4, 3)),
        (1, 12, 12, (1, 1)),
    ],
)
def test_share_batch(
    batch_size: int, num_accumulations: int, num_processes: int, expected: tuple[int, int]
) -> None:
    assert share_batch(batch_size, num_accumulations, num_processes) == expected
    assert expected[0] * expected[1] * num_processes == batch_size * num_accumulations


def test_share_batch_refuses_what_does_not_divide() -> None:
    with pytest.raises(
        TrainingError, match="3 x 2 samples cannot be shared by 4 processes; .* a multiple of 2"
    ):
        share_batch(3, 2, 4)


def make_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "global_step").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "global_step" / "states.pt").write_bytes(b"states")
    seal_checkpoint(checkpoint, {"zero_stage": 0})
    return checkpoint


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    made = [make_checkpoint(tmp_path, step) for step in (1000, 20, 300)]
    assert complete_checkpoints(tmp_path) == [made[1], made[2], made[0]]
    assert last_complete_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: (c / MANIFEST).unlink(), "it has no manifest.json"),
        (lambda c: os.truncate(c / MANIFEST, 9), "its manifest.json is cut off"),
        (lambda c: os.truncate(c / "model.safetensors", 3), "model.safetensors has 3 bytes instead of 7"),
        (lambda c: (c / "global_step" / "states.pt").unlink(), "global_step/states.pt is missing"),
    ],
)
def test_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog, damage, reason: str) -> None:
    older = make_checkpoint(tmp_path, 4)
    damage(make_checkpoint(tmp_path, 8))
    assert last_complete_checkpoint(tmp_path) == older
    assert f"passing over {tmp_path / 'checkpoint-8'}: {reason}" in caplog.text
