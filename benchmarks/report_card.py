"""Measures the bundled model and writes the table of docs/report-card.md, all in one command.

    python benchmarks/report_card.py --data-root DATA                    # hours on two cores; goes on where it stopped
    python benchmarks/report_card.py --data-root DATA --peer rapidocr    # reads the same pictures, a column of its own
    python benchmarks/report_card.py --data-root DATA --limit 60 --out runs/card60
    python benchmarks/report_card.py --data-root DATA --dry-run          # print the table of what is measured so far

`vlmslice eval` does the work: its folders stay in `--out`, with every prediction and a page of drawn cases. Only the
lines between the two marks in the report card are replaced.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

CARD = Path(__file__).parent.parent / "docs" / "report-card.md"
BEGIN, END = "<!-- figures: benchmarks/report_card.py -->", "<!-- end of figures -->"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Target:
    """A line of the card.

    Attributes:
        label: what is measured.
        suite, part, metric: where the figure stands in the results.
        good, aim: where a good small model is, and what to aim at, as they are spelled.
        is_share: the figure is a share, shown as a percentage.
        most: samples at most, whatever the limit; a page takes a minute.
    """

    label: str
    suite: str
    part: str
    metric: str
    good: str
    aim: str
    is_share: bool = True
    most: int = 300


TARGETS = (
    Target("lines, unseen fonts and words: character errors", "synthetic", "read", "cer", "5 %", "1.5 %"),
    Target("paragraphs, likewise: character errors", "synthetic", "paragraph", "cer", "5 %", "1.5 %", most=100),
    Target("receipt lines: character errors, case ignored", "dev", "receipt-lines", "cer", "12 %", "4 %"),
    Target("whole receipts: word recall", "dev", "receipt-pages", "word_recall", "55 %", "75 %", most=40),
    Target("receipts as JSON: date and total exact", "dev", "receipt-json", "date_and_total", "50 %", "80 %"),
    Target("old book pages: character errors", "dev", "book-pages", "cer", "15 %", "3 %", most=6),
    Target("unseen charts: relaxed accuracy", "synthetic", "plot", "relaxed_accuracy", "75 %", "92 %", most=150),
    Target("ChartQA: relaxed accuracy", "dev", "charts", "relaxed_accuracy", "20 %", "45 %"),
    Target("1-10 shapes: exact", "synthetic", "count", "exact", "92 %", "99 %"),
    Target("0-30 shapes and letters, any ground: exact", "synthetic", "crowd", "exact", "92 %", "99 %", most=150),
    Target("nine balls, 24 sizes from 224 to 4096 px: exact", "nine-balls", "nine-balls", "exact", "92 %", "100 %"),
    Target("red blood cells: mean error", "dev", "count-red-blood-cells", "mae", "2.5", "1", is_share=False),
)  # fmt: skip
ANSWER_TIME = ("answer to a 1344 x 1344 image, 64 tokens, two cores", "4 s", "1 s")


@app.command()
def main(
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of the real sets; without it, rendered pictures only.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a saved model; the bundled one by default.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most samples of each part.")] = 300,
    peer: Annotated[
        str | None, typer.Option(help="OCR engine to set beside the model: rapidocr or tesseract.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the evaluations go.")] = Path("runs/report-card"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what was measured so far; write nothing.")
    ] = False,
) -> None:
    """Evaluates every line of the card, times answers, and puts the table into the card."""
    chosen = [target for target in TARGETS if target.suite != "dev" or data_root is not None]
    if not dry_run:
        for target in chosen:
            evaluate_part(target, model, data_root, limit, out, peer)
        time_file = out / "answer-time.json"
        if not time_file.exists():
            time_file.write_text(json.dumps(time_answers(model)))
    lines = [*table(chosen, out), "", *how(limit)]
    if dry_run:
        typer.echo("\n".join(lines))
        return
    before, _, rest = CARD.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    CARD.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]), encoding="utf-8")
    typer.echo(f"{CARD} written")


def evaluate_part(
    target: Target, model: Path | None, data_root: Path | None, limit: int, out: Path, peer: str | None = None
) -> None:
    from vlmslice.evaluation import evaluate
    from vlmslice.peers import load_peer
    from vlmslice.suites import OCR_TASKS, open_suite

    suite = open_suite(
        target.suite,
        data_root=data_root if target.suite == "dev" else None,
        limit=min(limit, target.most),
        parts=[target.part],
    )
    typer.echo(target.label)
    peers = [load_peer(peer)] if peer and suite.parts[target.part] in OCR_TASKS else []
    evaluate(model, suite, out / target.part, peers=peers)


def time_answers(model: Path | None, rounds: int = 5) -> dict[str, float]:
    """Seconds from a loaded image to 64 tokens, and of its two parts; medians after one answer that is not timed."""
    import torch
    from PIL import Image

    from vlmslice.inference import Assistant

    assistant = Assistant.from_pretrained(model)
    assistant.model.generation_config.min_new_tokens = 64
    image = Image.effect_noise((1344, 1344), 60).convert("RGB")
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        answer = assistant.ask([image], "Read the text.", max_new_tokens=64)
        seconds.append(time.perf_counter() - start)
        assert answer.num_new_tokens == 64, answer
    return {"seconds": statistics.median(seconds[1:]), "threads": torch.get_num_threads()}


def table(targets: list[Target], out: Path) -> list[str]:
    """Rows of markdown; what is not measured yet is left out."""
    parts = {}
    for target in targets:
        file = out / target.part / "results.json"
        if file.exists():
            parts[target] = json.loads(file.read_text())["parts"][target.part]
    peers = list(dict.fromkeys(peer for part in parts.values() for peer in part["peers"]))
    names = ["", "samples", "figure (95 % interval)", *peers, "good", "aim"]
    rows = [_row(names), "|" + "---|" * len(names)]
    for target, part in parts.items():
        figure = spell(part["metrics"][target.metric], target.is_share)
        others = [
            spell(part["peers"][peer][target.metric], target.is_share) if peer in part["peers"] else ""
            for peer in peers
        ]
        rows.append(_row([target.label, str(part["num_samples"]), figure, *others, target.good, target.aim]))
    file = out / "answer-time.json"
    if file.exists():
        measured = json.loads(file.read_text())
        label, good, aim = ANSWER_TIME
        rows.append(_row([label, "5", f"{measured['seconds']:.1f} s", *("" for _ in peers), good, aim]))
    return rows


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spell(figure: dict[str, Any], is_share: bool) -> str:
    """`6.5 % (5.0 to 8.3 %)`, or `2.41 (2.02 to 2.80)`."""
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    if is_share:
        return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f} %)"
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def how(limit: int) -> list[str]:
    return [
        f"At most {limit} samples of each part, fewer of what takes minutes; greedy decoding. *Good* is where a good",
        "small model should be, *aim* is what to aim at. Measured anew, and this table rewritten, by",
        "`python benchmarks/report_card.py --data-root DATA --peer rapidocr`.",
    ]


if __name__ == "__main__":
    app()
