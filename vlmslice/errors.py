"""The root of every error that vlmslice raises on purpose."""


class VlmSliceError(Exception):
    """Base of the package's errors.

    A message says what is wrong, what was got, what was expected and what to do about it. Children live
    beside the code that raises them and also inherit the nearest built-in error (`ValueError`, ...), so that
    callers who know nothing of this package still catch them.
    """
