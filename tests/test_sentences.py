import logging
from pathlib import Path

import pytest

from vlmslice.errors import VlmSliceError
from vlmslice.page.sentences import error_sentence


def test_own_errors_are_said_as_they_are() -> None:
    error = VlmSliceError("image '/tmp/x1/cat.png' is damaged;\n export it again")
    assert error_sentence(error, "/tmp/x1/cat.png") == "Image 'cat.png' is damaged; export it again."
    assert error_sentence(error, Path("/tmp/x1/cat.png")) == "Image 'cat.png' is damaged; export it again."
    assert error_sentence(VlmSliceError("what?")) == "What?"


def test_unexpected_errors_are_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise KeyError("secret")
    except KeyError as error:
        with caplog.at_level(logging.ERROR):
            sentence = error_sentence(error)
    assert "KeyError" in sentence and "secret" not in sentence and "Traceback" not in sentence
    assert "raise KeyError" in caplog.text
