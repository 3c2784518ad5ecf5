"""Small parts that every test can afford: slicing of 64-px slices, the byte tokenizer, drawn images."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import tiny_models
from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerFast

from vlmslice import cli
from vlmslice.image_processing import VlmSliceImageProcessor
from vlmslice.processing import VlmSliceProcessor
from vlmslice.slicing import SlicingConfig
from vlmslice.tokenization import build_byte_tokenizer

# How long an example takes says more about what else the machine does than about the code.
hypothesis.settings.register_profile("any_machine", deadline=None)
hypothesis.settings.load_profile("any_machine")

DrawImage = Callable[..., Image.Image]


@pytest.fixture(scope="session")
def tiny_slicing() -> SlicingConfig:
    """Slices of up to 4 x 4 patches, so 4 visual tokens; a 100x200 px image becomes 2x4 slices and an overview."""
    return SlicingConfig(
        scale_resolution=64,
        overview_resolution=32,
        patch_size=16,
        merge_size=2,
        max_slice_nums=12,
        max_visual_tokens=64,
    )


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return build_byte_tokenizer()


@pytest.fixture
def tiny_processor(tiny_slicing: SlicingConfig, byte_tokenizer: PreTrainedTokenizerFast) -> VlmSliceProcessor:
    return VlmSliceProcessor(VlmSliceImageProcessor(**tiny_slicing.to_dict()), byte_tokenizer)


@pytest.fixture(scope="session")
def draw_image() -> DrawImage:
    """Draws an RGB image of a size, with one disc per count, all in its own colour on white."""

    def draw(height: int = 100, width: int = 200, num_discs: int = 3) -> Image.Image:
        image = Image.new("RGB", (width, height), "white")
        canvas = ImageDraw.Draw(image)
        radius = min(height, width // num_discs) / 3
        for index in range(num_discs):
            x, y = width * (index + 0.5) / num_discs, height / 2
            colour = f"hsl({360 * index // num_discs}, 80%, 45%)"
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        return image

    return draw


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model with random weights and its processor."""
    folder = tmp_path_factory.mktemp("model")
    tiny_models.tiny_model().save_pretrained(folder)
    tiny_models.tiny_processor().save_pretrained(folder)
    return folder


class Result(NamedTuple):
    code: int
    out: str
    err: str


Vlmslice = Callable[..., Result]


@pytest.fixture
def vlmslice_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Vlmslice:
    """Runs the command in this process, which has loaded torch already."""

    def run(*arguments: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exit:
            cli.run([str(argument) for argument in arguments])
        return Result(exit.value.code, *capsys.readouterr())  # type: ignore[arg-type]

    return run


def assert_user_error(result: Result, *words: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert word in result.err
