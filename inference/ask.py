"""Ask the bundled model, or another, about images: `python inference/ask.py IMAGE... "question"`.

The same as `vlmslice ask`, from a checkout.
"""

import sys

from vlmslice.cli import run

if __name__ == "__main__":
    run(["ask", *sys.argv[1:]])
