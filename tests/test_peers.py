"""Peers read what is there, and say how to get them when they are not."""

import shutil
import sys
from importlib.util import find_spec

import pytest
from PIL import Image, ImageDraw, ImageFont

from vlmslice.peers import PeerError, load_peer

INSTALLED = {"tesseract": shutil.which("tesseract"), "rapidocr": find_spec("rapidocr")}


def line_image() -> Image.Image:
    image = Image.new("RGB", (300, 60), "white")
    ImageDraw.Draw(image).text((20, 10), "TOTAL 42.50", fill="black", font=ImageFont.load_default(32))
    return image


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTALLED)
def test_reads(name: str) -> None:
    if not INSTALLED[name]:
        pytest.skip(f"{name} is not installed")
    peer = load_peer(name)
    assert peer.name == name and peer.version[0].isdigit()
    page = Image.new("RGB", (800, 400), "white")
    page.paste(line_image(), (200, 100))
    # In this order, as an engine may remember how it was asked last.
    for image, is_crop in ((line_image(), True), (page, False), (line_image(), True)):
        assert peer.read(image, is_crop).replace(" ", "") == "TOTAL42.50"
    assert peer.read(Image.new("RGB", (300, 200), "white"), False) == ""


def test_unknown() -> None:
    with pytest.raises(PeerError, match="expected one of tesseract, rapidocr; did you mean 'tesseract'"):
        load_peer("teseract")


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PeerError, match="apt-get install tesseract-ocr"):
        load_peer("tesseract")
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(PeerError, match="pip install rapidocr"):
        load_peer("rapidocr")
