"""The web page of `vlmslice demo`: `Assistant` behind a gradio page on this machine.

Only `layout.py` and `server.py` know gradio; the rest are plain functions and are tested as such:

- `line.py`: the one model and those who wait for it.
- `asking.py`, `ball_counts.py`: what a press of a button does, as a generator of what to show next.
- `price.py`, `answer_table.py`, `sentences.py`: plan, answer and error as the page shows them.
- `examples.py`: pictures drawn in code, so that the page needs no files.
"""
