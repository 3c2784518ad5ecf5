"""Estimates: the ZeRO paper's table, counts that can be worked out, and a dry run as a whole command."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlmslice.training.estimate import BytesPerParameter, describe_seconds, estimate_run, memory_per_rank
from vlmslice.training.stage import Stage

ROOT = Path(__file__).parent.parent
MIXED = BytesPerParameter(weight=2, gradient=2, optimizer=12)


class TestMemory:
    @pytest.mark.parametrize(("zero_stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
    def test_table_of_the_paper(self, zero_stage: int, gigabytes: float) -> None:
        """Figure 1 of https://arxiv.org/abs/1910.02054: 7.5B parameters on 64 processes."""
        size = memory_per_rank(7_500_000_000, 7_500_000_000, MIXED, zero_stage, 64)
        assert size / 1e9 == pytest.approx(gigabytes, abs=0.05)

    def test_one_process_has_nothing_to_share(self) -> None:
        assert {memory_per_rank(1000, 1000, MIXED, stage, 1) for stage in range(4)} == {16_000}

    def test_frozen_weights_are_only_kept(self) -> None:
        assert memory_per_rank(1000, 0, MIXED, 2, 4) == 2000
        assert memory_per_rank(1000, 0, MIXED, 3, 4) == 500

    @pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
    @pytest.mark.parametrize("world_size", [1, 2, 64])
    def test_deepspeeds_own_estimate(self, world_size: int) -> None:
        """It counts fp32 gradients, too: 4 bytes, which DeepSpeed makes while the optimizer steps."""
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

        size = replace(MIXED, optimizer=16)
        _, expected = estimate_zero2_model_states_mem_needs(10**6, world_size, cpu_offload=False)
        assert memory_per_rank(10**6, 10**6, size, 2, world_size) == expected
        _, expected, _ = estimate_zero3_model_states_mem_needs(
            10**6, 0, world_size, cpu_offload=False, cpu_offload_params=False
        )
        # Of stage 3 it leaves the bf16 gradients out.
        assert memory_per_rank(10**6, 10**6, replace(size, gradient=0), 3, world_size) == expected


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    monkeypatch.syspath_prepend(str(ROOT / "train"))
    from recipes.tiny import tiny

    return tiny()


class TestEstimate:
    def test_counts(self, tiny: list[Stage], tmp_path: Path) -> None:
        eye, answer = estimate_run(tiny, tmp_path, world_size=2)
        model = tiny[0].model(None)
        assert eye.parameters == {
            "encoder": (sum(p.numel() for p in model.encoder.parameters()), 0),
            "head": (sum(p.numel() for p in model.head.parameters()), 0),
        }
        assert (eye.num_steps, eye.step_batch_size, eye.batch_size, eye.num_accumulations) == (60, 8, 4, 1)
        assert eye.text_tokens == 0 < answer.text_tokens
        # fp32 and AdamW: 4 + 4 + 8 bytes (and a count of steps of 4 bytes for each weight); DeepSpeed adds a copy.
        num_parameters = sum(trained for trained, _ in eye.parameters.values())
        assert eye.memory[0] == pytest.approx(16 * num_parameters, rel=0.01)
        assert eye.memory[3] == pytest.approx(10 * num_parameters, rel=0.01)
        # Every product of a matrix is there backward for the weight and, but for the first, for the input.
        assert 2.5 < answer.flops / answer.forward_flops < 3.2
        assert eye.seconds == 60 * eye.step_seconds > 60 * 4 * eye.sample_seconds
        assert not list(tmp_path.iterdir())

    def test_frozen_parts_and_checkpointing(self, tiny: list[Stage], tmp_path: Path) -> None:
        def freeze(previous: Path | None) -> torch.nn.Module:
            model = build(previous)
            model.vision_encoder.requires_grad_(False)
            return model

        build = tiny[1].model
        [whole] = estimate_run(tiny, tmp_path, only="answer")
        tiny[1] = replace(tiny[1], model=freeze)
        [frozen] = estimate_run(tiny, tmp_path, only="answer")
        assert frozen.parameters["vision_encoder"] == tuple(reversed(whole.parameters["vision_encoder"]))
        assert frozen.forward_flops == whole.forward_flops
        assert frozen.flops < whole.flops
        tiny[1] = replace(tiny[1], arguments=tiny[1].arguments | {"gradient_checkpointing": True})
        [recomputed] = estimate_run(tiny, tmp_path, only="answer")
        assert recomputed.flops > frozen.flops


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0042, "4.2 ms"), (12.34, "12.3 s"), (150, "2 min"), (5025, "1 h 24 min"), (3599, "1 h 0 min")],
)
def test_describe_seconds(seconds: float, words: str) -> None:
    assert describe_seconds(seconds) == words


def train_command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train" / "train.py"), "--recipe", "tiny", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


class TestDryRun:
    def test_leaves_nothing(self, tmp_path: Path) -> None:
        work, temporary = tmp_path / "work", tmp_path / "temporary"
        work.mkdir()
        temporary.mkdir()
        done = train_command(work, "--dry-run", "--world-size", "2", TMPDIR=str(temporary))
        assert done.returncode == 0, done.stderr
        assert "eye: 60 steps of 8 samples; processes: 2, in each batches of 4" in done.stdout
        assert re.search(r"language_model +[\d,]+ trained", done.stdout)
        for figure in ("visual, ", "forward, ", "ZeRO-3", "of the matmul peak", "in all"):
            assert done.stdout.count(figure) >= 2, figure
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not list(work.iterdir())

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--world-size", "2"], "--world-size needs --dry-run"),
            (["--dry-run", "--deepspeed", "zero2.json"], "leave the launcher and --deepspeed out"),
            (["--dry-run", "--stage", "answr"], "did you mean 'answer'?"),
            (["--dry-run", "--world-size", "3"], "cannot be shared by 3 processes"),
            (["--set", 'report_to=["tensorboard","wandb"]'], "pip install 'vlmslice[wandb]'"),
        ],
    )
    def test_errors(self, arguments: list[str], words: str, tmp_path: Path, monkeypatch) -> None:
        if "report_to" in arguments[-1] and importlib.util.find_spec("wandb"):
            pytest.skip("wandb is installed")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(ROOT / "train"))
        from typer.testing import CliRunner

        spec = importlib.util.spec_from_file_location("train_script", ROOT / "train" / "train.py")
        assert spec is not None and spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        result = CliRunner().invoke(script.app, ["--recipe", "tiny", *arguments])
        assert result.exit_code == 2
        assert words in result.output
        assert not list(tmp_path.iterdir())
