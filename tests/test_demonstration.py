import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmslice import demonstration
from vlmslice.data.fonts import HELD_OUT_FAMILIES
from vlmslice.data.receipts import QUESTIONS
from vlmslice.demonstration import (
    DemonstrationError,
    demonstration_fonts,
    render_exhibit,
    render_text,
    shrink_picture,
)
from vlmslice.errors import VlmSliceError


def test_exhibit_is_of_its_question_and_the_same_every_time() -> None:
    first, again, other = (
        render_exhibit("receipt", QUESTIONS["json"], 880, 380, seed=seed) for seed in (0, 0, 1)
    )
    assert first.question in QUESTIONS["json"]
    assert list(json.loads(first.truth)) == ["company", "date", "address", "total"]
    assert first.image.size == (380, 880)
    assert first.truth == again.truth and first.image == again.image
    assert first.truth != other.truth


def test_fonts_are_held_out_from_training() -> None:
    assert set(demonstration_fonts().families) <= HELD_OUT_FAMILIES


def test_question_that_the_task_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstration, "_MOST_TRIES", 2)
    with pytest.raises(DemonstrationError, match="asked none of .*'Why'.* in 2 pictures"):
        render_exhibit("flowchart", ["Why"], 300, 300)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmslice.data.fonts.matplotlib_font_dir", lambda: None)
    with pytest.raises(DemonstrationError, match="pip install matplotlib"):
        render_exhibit("flowchart", ["Why"], 300, 300)


def test_text_is_broken_and_all_there(tmp_path: Path) -> None:
    text = "One two three\n\nfour, Donaudampfschifffahrtsgesellschaft five."
    (tmp_path / "text.txt").write_text(text)
    image, lines = render_text(tmp_path / "text.txt", 20, 800)
    assert " ".join(lines) == " ".join(text.split())
    narrow, narrow_lines = render_text(tmp_path / "text.txt", 20, 200)
    assert narrow.width == 200 and len(narrow_lines) > len(lines) and narrow.height > image.height
    assert np.asarray(narrow.convert("L"))[:, -18:].min() > 200  # nothing runs into the margin
    assert render_text(None, 20, 400, seed=1)[1] != render_text(None, 20, 400, seed=2)[1]


@pytest.mark.parametrize(
    "content,reason", [(b"\xff\xfe\x00", "decode"), (b" \n", "is empty"), (None, "No such file")]
)
def test_text_that_cannot_be_read(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DemonstrationError, match=reason):
        render_text(path, 20, 300)


def test_large_picture_is_shrunk(tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    Image.effect_noise((1500, 900), 80).save(path)
    shrink_picture(path, max_bytes=100_000)
    small = Image.open(path)
    assert path.stat().st_size <= 100_000 and small.width < 1200
    assert small.width / small.height == pytest.approx(5 / 3, rel=0.02)


def test_place_of_the_picture_is_checked(tmp_path: Path) -> None:
    assert demonstration.check_picture(tmp_path / "new" / "out.png").parent.is_dir()
    with pytest.raises(VlmSliceError, match="cannot write a picture to"):
        demonstration.check_picture(tmp_path / "out.xyz")


def test_frames_become_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "green", "blue")]
    demonstration.hand_over(frames, tmp_path / "frames.gif")
    assert Image.open(tmp_path / "frames.gif").n_frames == 3
