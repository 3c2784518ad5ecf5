"""The figures of a run as a table, and one HTML page with them and with cases drawn: what to look at, and to show."""

from __future__ import annotations

import base64
import html
import io
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rapidfuzz.distance import Levenshtein

from vlmslice.metrics import TASK_METRICS, normalize_text
from vlmslice.suites import OCR_TASKS, Suite

NUM_CASES = 12
CASES_SEED = 20_261_122

_THUMBNAIL_SIZE = (560, 720)  # height, width; at twice the size at which it is shown
_MAX_SHOWN = 6_000  # characters of a text
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def result_lines(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of figures: part, samples, metric, the model's figure, each peer's."""
    peers = list(dict.fromkeys(peer for part in results["parts"].values() for peer in part["peers"]))
    lines = []
    for name, part in results["parts"].items():
        for metric in TASK_METRICS[part["task"]]:
            if metric.name not in part["metrics"]:
                continue
            columns = [part["metrics"], *(part["peers"].get(peer, {}) for peer in peers)]
            shown = [format_figure(metric.name, part["task"], column) for column in columns]
            arrow = "↓" if metric.lower_is_better else "↑"
            lines.append([name, str(part["num_samples"]), f"{metric.title} {arrow}", *shown])
    return ["part", "samples", "metric", results["model"]["name"], *peers], lines


def format_figure(name: str, task: str, figures: dict[str, Any]) -> str:
    """`12.3 % (10.1 % to 15.0 %)`, or a dash if there is no such figure."""
    [metric] = [metric for metric in TASK_METRICS[task] if metric.name == name]
    figure = figures.get(name)
    if figure is None:
        return metric.format(None)
    low, high = metric.format(figure["low"]).removesuffix(" %"), metric.format(figure["high"])
    return f"{metric.format(figure['value'])} ({low} to {high})"


def markdown_table(results: dict[str, Any]) -> str:
    """The table of figures in Markdown, for a report card."""
    header, lines = result_lines(results)
    table = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


# The page


def write_report(path: Path, results: dict[str, Any], rows: Sequence[dict[str, Any]], suite: Suite) -> None:
    """Writes a page that needs nothing else: figures with intervals, and of each part the worst and some other cases.

    The others are drawn by a fixed seed from those that are not among the worst. Cases show the image as it was asked
    about, the question, the truth, the answer and the metrics of the row.

    Args:
        path: Where the page goes.
        results: As in `results.json`.
        rows: As in `predictions.jsonl`, in the order of the suite.
        suite: For the images.
    """
    header, lines = result_lines(results)
    sections = []
    for part, figures in results["parts"].items():
        indices = [i for i, row in enumerate(rows) if row["part"] == part]
        worst, others = choose_cases(rows, indices)
        sections += [
            f'<section id="{html.escape(part, quote=True)}"><h2>{html.escape(part)}</h2>',
            f"<p>{html.escape(_describe_part(figures))}</p>",
        ]
        for title, chosen in (("Worst cases", worst), ("Random cases", others)):
            if chosen:
                cases = "".join(_draw_case(rows[i], suite[i].image) for i in chosen)
                sections.append(f'<h3>{title}</h3><div class="cases">{cases}</div>')
        sections.append("</section>")
    model, asked = results["model"], results["suite"]
    title = f"{model['name']} on {asked['name']}"
    page = _PAGE.format(
        style=_STYLE,
        title=html.escape(title),
        summary=html.escape(
            f"{asked['num_samples']} samples. 95 % bootstrap intervals over images. "
            f"Model sha256 {model['sha256'][:16]}, samples sha256 {results['samples_sha256'][:16]}."
        ),
        table=_html_table(header, lines),
        sections="".join(sections),
    )
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def choose_cases(rows: Sequence[dict[str, Any]], indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices of the worst rows of a part, worst first, and of others drawn by a fixed seed, in their order.

    Rows are as bad as the first metric of the task says, and among equals the next one; no row in which every metric
    is perfect is among the worst.
    """
    badness = {i: _badness(rows[i]) for i in indices}
    faulty = [i for i in indices if any(badness[i])]
    worst = sorted(faulty, key=lambda i: badness[i], reverse=True)[:NUM_CASES]
    rest = [i for i in indices if i not in worst]
    return worst, sorted(random.Random(CASES_SEED).sample(rest, min(NUM_CASES, len(rest))))


def _badness(row: dict[str, Any]) -> list[float]:
    values = ((metric, row["metrics"][metric.name]) for metric in TASK_METRICS[row["task"]])
    return [value if metric.lower_is_better else 1 - value for metric, value in values if value is not None]


def _describe_part(figures: dict[str, Any]) -> str:
    notes = [f"Task {figures['task']}", f"{figures['num_samples']} samples of {figures['num_images']} images"]
    if figures["num_empty"]:
        notes.append(f"{figures['num_empty']} empty answers")
    if figures["num_cut_off"]:
        notes.append(f"{figures['num_cut_off']} answers cut off at the token cap")
    return ", ".join(notes) + "."


def _html_table(header: list[str], lines: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    rows, before = [], None
    for line in lines:
        first = line[:2] if line[0] != before else ["", ""]
        link = f'<a href="#{html.escape(line[0], quote=True)}">{html.escape(first[0])}</a>'
        rest = "".join(f"<td>{html.escape(cell)}</td>" for cell in [first[1], *line[2:]])
        opening = '<tr class="first">' if first[0] else "<tr>"
        rows.append(f"{opening}<td>{link}</td>{rest}</tr>")
        before = line[0]
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _draw_case(row: dict[str, Any], image: Image.Image) -> str:
    truth = _spell_truth(row["answer"])
    is_text = row["task"] in OCR_TASKS and not row["unordered"]
    readings = [("answer", row["prediction"], row["metrics"])]
    readings += [(name, peer["prediction"], peer["metrics"]) for name, peer in row.get("peers", {}).items()]
    blocks = [_text_block("truth", html.escape(_cut(truth)), "")]
    for name, text, values in readings:
        marked = _mark_errors(text, truth, row["ignore_case"]) if is_text else html.escape(_cut(text))
        blocks.append(_text_block(name, marked or "<i>empty</i>", _describe_metrics(row["task"], values)))
    note = " · cut off" if row["cut_off"] else ""
    return (
        f'<article><img alt="" loading="lazy" src="{_thumbnail(image)}">'
        f'<p class="id">{html.escape(row["id"])} · {html.escape(row["image"])} · {row["width"]}x{row["height"]} px · '
        f"{row['num_visual_tokens']} visual tokens{note}</p>"
        f'<p class="question">{html.escape(row["question"])}</p>{"".join(blocks)}</article>'
    )


def _text_block(name: str, marked: str, note: str) -> str:
    return f"<h4>{html.escape(name)} <small>{html.escape(note)}</small></h4><pre>{marked}</pre>"


def _spell_truth(answer: Any) -> str:
    if isinstance(answer, list):
        return " | ".join(map(str, answer))
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, indent=1)


def _cut(text: str) -> str:
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} ... ({len(text)} characters)"


def _mark_errors(prediction: str, truth: str, ignore_case: bool) -> str:
    """The answer as HTML: what is not in the truth marked, a mark where something of it is missing."""
    shown, expected = _cut(normalize_text(prediction)), _cut(normalize_text(truth))
    # Lower-casing one letter at a time keeps the places of all.
    one, other = (
        ([letter.casefold() for letter in text] if ignore_case else list(text)) for text in (shown, expected)
    )
    pieces = []
    for code in Levenshtein.opcodes(one, other):
        text = html.escape(shown[code.src_start : code.src_end])
        if code.tag == "equal":
            pieces.append(text)
        elif code.tag == "insert":
            missing = html.escape(expected[code.dest_start : code.dest_end], quote=True)
            pieces.append(f'<mark class="gap" title="missing: {missing}">‸</mark>')
        else:
            pieces.append(f"<mark>{text}</mark>")
    return "".join(pieces)


def _describe_metrics(task: str, values: dict[str, float | None]) -> str:
    metrics = [metric for metric in TASK_METRICS[task] if values[metric.name] is not None]
    return ", ".join(f"{metric.title} {metric.format(values[metric.name])}" for metric in metrics)


def _thumbnail(image: Image.Image) -> str:
    """The image as a data: URL of a small JPEG; a line keeps its height, so that it can be read."""
    height, width = _THUMBNAIL_SIZE
    small = image.copy()
    small.thumbnail((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=78)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<div class="wide">{table}</div>
{sections}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bad: #e5484d55; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1280px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h4 { margin: .6rem 0 .1rem; font-size: .85rem; } h4 small { font-weight: normal; opacity: .75; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; white-space: nowrap; }
thead th, tr.first td { border-top: 1px solid var(--line); }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1rem; align-items: start; }
article { border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow: hidden; }
article img { max-width: 100%; min-height: 40px; max-height: 280px; object-fit: contain;
  display: block; margin: 0 auto .5rem; background: #fff; }
.id { font-size: .75rem; opacity: .7; margin: 0; overflow-wrap: anywhere; } .question { margin: .3rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: .3rem .5rem; background: var(--soft);
  border-radius: 4px; max-height: 14rem; overflow-y: auto; font-size: .8rem; }
mark { background: var(--bad); color: inherit; } mark.gap { cursor: help; }
"""
