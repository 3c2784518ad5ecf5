"""Errors as sentences: what the page says instead of a traceback."""

from __future__ import annotations

import logging
from pathlib import Path

from vlmslice.errors import VlmSliceError

logger = logging.getLogger(__name__)


def error_sentence(error: Exception, upload: str | Path | None = None) -> str:
    """One sentence for the person before the page.

    Errors of this package say themselves what is wrong; any other is a defect, which is logged with its traceback.

    Args:
        error: What was raised.
        upload: The file that it was about; its folder, which nobody chose, is left out.
    """
    if not isinstance(error, VlmSliceError):
        logger.error("unexpected error on the page", exc_info=error)
        return (
            f"Something went wrong that should not have ({type(error).__name__}); the terminal in which "
            "vlmslice demo runs tells more. Other images and questions still work."
        )
    sentence = " ".join(str(error).split())
    if upload is not None:
        sentence = sentence.replace(str(upload), Path(upload).name)
    sentence = sentence[:1].upper() + sentence[1:]
    return sentence if sentence.endswith((".", "!", "?")) else sentence + "."
