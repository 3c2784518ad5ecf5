"""Engines that read text, to score on the same rows as a model: tesseract and RapidOCR, both optional."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from importlib import metadata
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlmslice.errors import VlmSliceError, suggestion


class PeerError(VlmSliceError, RuntimeError):
    """An engine is unknown, is not installed, or failed on an image."""


class Peer(Protocol):
    """An engine that reads images.

    Attributes:
        name: As it is asked for.
        version: Of the engine, with the settings that change what it reads.
    """

    name: str
    version: str

    def read(self, image: Image.Image, is_crop: bool) -> str:
        """The text of an image, lines apart; `is_crop` if it is a crop to one line."""
        ...


class Tesseract:
    """The `tesseract` command, English: a crop as one line (`--psm 7`), anything else by its own layout analysis."""

    name = "tesseract"

    def __init__(self) -> None:
        """Looks for the command.

        Raises:
            PeerError: It is not installed.
        """
        command = shutil.which("tesseract")
        if command is None:
            raise PeerError(
                "the peer tesseract is not installed; expected the command tesseract; apt-get install tesseract-ocr"
            )
        self._command = command
        found = subprocess.run([command, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
        self.version = f"{found.removeprefix('tesseract ').strip()}, eng, --psm 7 of crops, else 3"

    def read(self, image: Image.Image, is_crop: bool) -> str:
        png = io.BytesIO()
        image.save(png, "PNG")
        command = [self._command, "stdin", "stdout", "-l", "eng", "--psm", "7" if is_crop else "3"]
        done = subprocess.run(
            command, input=png.getvalue(), capture_output=True, env=os.environ | {"OMP_THREAD_LIMIT": "1"}
        )
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise PeerError(
                f"tesseract failed on an image of {image.height}x{image.width}: {' '.join(reason)}; "
                "expected its English data; apt-get install tesseract-ocr-eng"
            )
        return done.stdout.decode("utf-8", errors="replace").strip()


class RapidOcr:
    """PP-OCR as the package `rapidocr` carries it: a crop is only recognised, in anything else lines are found first.

    Its models lie in the package; nothing is fetched.
    """

    name = "rapidocr"

    def __init__(self) -> None:
        """Loads the engine.

        Raises:
            PeerError: It is not installed.
        """
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise PeerError(
                f"the peer rapidocr cannot be imported: {error}; pip install rapidocr onnxruntime"
            ) from error
        self._engine = RapidOCR(params={"Global.log_level": "error"})
        self.version = f"{metadata.version('rapidocr')}, its default models"

    def read(self, image: Image.Image, is_crop: bool) -> str:
        blue_green_red = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
        # The engine remembers these switches, so all are given every time.
        # Which class it returns depends on them; with recognition, all have texts.
        found: Any = self._engine(blue_green_red, use_det=not is_crop, use_cls=not is_crop, use_rec=True)
        return "\n".join(found.txts or ())


_PEERS: dict[str, type[Tesseract] | type[RapidOcr]] = {"tesseract": Tesseract, "rapidocr": RapidOcr}


def load_peer(name: str) -> Peer:
    """The engine of a name.

    Raises:
        PeerError: There is none, or it is not installed.
    """
    if name not in _PEERS:
        raise PeerError(
            f"there is no peer {name!r}; expected one of {', '.join(_PEERS)}{suggestion(name, _PEERS)}"
        )
    return _PEERS[name]()
