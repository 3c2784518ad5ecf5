"""Checkpoints against what disks do: they rot, fill up, or refuse to be written."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlmslice.training.checkpoints import (
    CheckpointError,
    complete_checkpoints,
    last_complete_checkpoint,
    seal_checkpoint,
    writing,
)


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """Writes beyond `num_bytes` of a file fail, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def make_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "optimizer.pt").write_bytes(b"states")
    seal_checkpoint(checkpoint, {"zero_stage": 0})
    return checkpoint


def test_one_flipped_bit_is_found(tmp_path: Path, caplog) -> None:
    older, newer = make_checkpoint(tmp_path, 4), make_checkpoint(tmp_path, 8)
    assert last_complete_checkpoint(tmp_path) == newer
    (newer / "optimizer.pt").write_bytes(b"stateS")
    assert complete_checkpoints(tmp_path) == [older, newer]  # sizes alone do not tell
    assert last_complete_checkpoint(tmp_path) == older
    assert f"passing over {newer}: optimizer.pt is not what was written" in caplog.text


def test_checkpoint_without_digests_is_known_by_its_sizes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 4)
    manifest = checkpoint / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[: text.index(',\n "sha256"')] + "}")
    assert last_complete_checkpoint(tmp_path) == checkpoint


BIG = torch.zeros(100_000)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "state.json").write_bytes(bytes(400_000)),
        lambda folder: torch.save(BIG, folder / "optimizer.pt"),
        lambda folder: save_file({"x": BIG}, folder / "model.safetensors"),
    ],
    ids=["json", "torch", "safetensors"],
)
def test_full_disk_is_one_error_and_leaves_nothing_half_written(tmp_path: Path, write) -> None:
    older = make_checkpoint(tmp_path, 4)
    aside = tmp_path / "incomplete" / "checkpoint-8"
    aside.mkdir(parents=True)
    with (
        no_file_above(50_000),
        pytest.raises(CheckpointError, match=r"checkpoint-8 cannot be written: .* MB are free .* make room"),
        writing(tmp_path / "checkpoint-8"),
    ):
        write(aside)
    assert not aside.parent.exists()
    assert last_complete_checkpoint(tmp_path) == older


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "answer" / "final"
    with pytest.raises(CheckpointError, match="final cannot be written: .*Not a directory"), writing(target):
        (target.parent / "incomplete").mkdir(parents=True)


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="^shapes differ$"), writing(tmp_path / "checkpoint-8"):
        raise RuntimeError("shapes differ")
    with pytest.raises(KeyError), writing(tmp_path / "checkpoint-8"):
        raise KeyError("weights")
