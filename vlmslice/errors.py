"""The root of every error that vlmslice raises on purpose, and the hint at a misspelt name."""

import difflib
from collections.abc import Iterable


class VlmSliceError(Exception):
    """Base of the package's errors.

    A message says what is wrong, what was got, what was expected and what to do about it. Children live
    beside the code that raises them and also inherit the nearest built-in error (`ValueError`, ...), so that
    callers who know nothing of this package still catch them.
    """


def suggestion(name: object, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name nearest to `name`, or an empty string if none is near."""
    nearest = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
