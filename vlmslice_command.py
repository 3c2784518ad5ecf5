"""Entry point of the `vlmslice` command.

It lies outside the package because `vlmslice/__init__.py` loads torch for whoever imports it, except when this module
is there already: `vlmslice --help` and `vlmslice plan` answer in a fraction of the time that takes.
"""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Runs the command on the arguments of the process."""
    from vlmslice.cli import run

    run(sys.argv[1:])
