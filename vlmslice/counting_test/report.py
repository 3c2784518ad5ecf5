"""The report of a counting test: a page that needs nothing else, and one sheet of plots."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from vlmslice.counting_test.analysis import NO_FAULT, NO_NUMBER
from vlmslice.counting_test.answerers import Answerer
from vlmslice.counting_test.answers import CountAnswer
from vlmslice.counting_test.arms import Arm
from vlmslice.counting_test.pictures import Picture
from vlmslice.errors import VlmSliceError
from vlmslice.run_folder import write_text
from vlmslice.slicing import SlicePlan, SlicingError

_NUM_CASES = 4  # of each set
_MAX_HEADLINES = 8
_THUMBNAIL = 420  # longer side, px
_SEAM = (120, 128, 142)


class ReportError(VlmSliceError):
    """A report cannot be drawn."""


def check_report() -> None:
    """Raises before anything is asked if the plots could not be drawn afterwards.

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ReportError(
            "the report needs matplotlib, which is not installed; pip install 'vlmslice[demo]'"
        ) from error


def write_report(
    folder: Path,
    results: Mapping[str, Any],
    answers: Sequence[CountAnswer],
    pictures: Mapping[str, Picture],
    answerer: Answerer,
) -> None:
    """Writes `report.html` and `report.png` into a folder.

    Args:
        folder: Where they go.
        results: As in `results.json`.
        answers: All rows.
        pictures: By id.
        answerer: Tells the slices that are drawn over pictures.
    """
    position = next((answer for answer in answers if answer.set == "position"), None)
    arms = {answer.arm: _find_arm(answer) for answer in answers}
    plan = _plan(answerer, position.height, position.width, arms[position.arm]) if position else None
    write_sheet(folder / "report.png", results, plan)
    write_text(folder / "report.html", _page(results, answers, pictures, answerer, plan))


def write_sheet(path: Path, results: Mapping[str, Any], plan: SlicePlan | None = None) -> None:
    """All plots and the findings on one sheet.

    Args:
        path: Of a PNG.
        results: As in `results.json`.
        plan: Whose seams are drawn over the map of positions.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from vlmslice.counting_test.plots import PLOTS, STYLE

    lines = [
        line
        for text in _headlines(results)[:_MAX_HEADLINES]
        for line in textwrap.wrap(text, 220, subsequent_indent="    ")
    ]
    top = 0.95 + 0.24 * len(lines)
    height = 9.6 + top
    with rc_context(STYLE):
        figure = Figure((21, height))
        FigureCanvasAgg(figure)
        figure.text(0.028, 1 - 0.5 / height, _title(results), fontsize=17, fontweight="bold")
        for number, line in enumerate(lines):
            figure.text(0.028, 1 - (0.86 + 0.24 * number) / height, line, fontsize=10.5, color="#3a414d")
        grid = figure.add_gridspec(
            2,
            4,
            left=0.035,
            right=0.99,
            bottom=0.6 / height,
            top=1 - (top + 0.35) / height,
            hspace=0.34,
            wspace=0.22,
        )
        for number, name in enumerate(PLOTS):
            PLOTS[name](figure.add_subplot(grid[number]), results, plan)
        partial = path.with_suffix(".partial")
        figure.savefig(partial, format="png", dpi=110)
    partial.replace(path)


def result_lines(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """Header and rows of the table of arms, and the findings, a line each, as a terminal shows them."""
    header, rows = _arm_rows(results)
    shown = [
        header.index(name) for name in ("arm", "pictures", "exact", "mean abs. error", "on a seam", "inside")
    ]
    return [header[i] for i in shown], [[row[i] for i in shown] for row in rows], _headlines(results)


def _find_arm(answer: CountAnswer) -> Arm:
    """The arm of a row; what is taken away changes no plan."""
    policy = answer.arm.split(", ")[0]
    return Arm(None if policy == "as it is" else policy)


def _plan(answerer: Answerer, height: int, width: int, arm: Arm) -> SlicePlan | None:
    try:
        return answerer.plan(height, width, arm)
    except SlicingError:
        return None


def _title(results: Mapping[str, Any]) -> str:
    return f"Counting test: {results['answerer']['name']}"


def _headlines(results: Mapping[str, Any]) -> list[str]:
    several = len(results["arms"]) > 1
    lines = [
        f"•  {finding['arm'] + ': ' if several else ''}{finding['sentence']}."
        for finding in results["findings"]
    ]
    return lines or [NO_FAULT]


# The page


def _page(
    results: Mapping[str, Any],
    answers: Sequence[CountAnswer],
    pictures: Mapping[str, Picture],
    answerer: Answerer,
    plan: SlicePlan | None,
) -> str:
    from vlmslice.counting_test.plots import PLOTS

    plots = "".join(f"<figure>{_draw_plot(name, results, plan)}</figure>" for name in PLOTS)
    title = html.escape(_title(results))
    num_pictures = len({answer.id for answer in answers if answer.reason is None})
    summary = (
        f"{num_pictures} pictures, {sum(answer.reason is None for answer in answers)} answers, seed {results['seed']}. "
        "Intervals are 95 % bootstrap intervals over groups of matched pictures."
    )
    return _PAGE.format(
        style=_STYLE,
        title=title,
        summary=html.escape(summary),
        findings=_list_findings(results),
        plots=plots,
        table=_table(*_arm_rows(results)),
        sets=_sets_table(results),
        cases=_draw_cases(answers, pictures, answerer),
        notes=_notes(results),
    )


def _draw_plot(name: str, results: Mapping[str, Any], plan: SlicePlan | None) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from vlmslice.counting_test.plots import PLOTS, STYLE

    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure((5.0, 4.0), layout="constrained")
        FigureCanvasSVG(figure)
        PLOTS[name](figure.add_subplot(), results, plan)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(name, quote=True)}" src="data:image/svg+xml;base64,{data}">'


def _list_findings(results: Mapping[str, Any]) -> str:
    if not results["findings"]:
        return f'<p class="good">{NO_FAULT}</p>'
    several = len(results["arms"]) > 1
    items = []
    for finding in results["findings"]:
        claim, _, evidence = finding["sentence"].partition(": ")
        arm = f'<span class="arm">{html.escape(finding["arm"])}</span>' if several else ""
        items.append(f"<li>{arm}<b>{html.escape(claim)}</b><small>{html.escape(evidence)}</small></li>")
    return f'<ol class="findings">{"".join(items)}</ol>'


def _arm_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["arm", "pictures", "exact", "mean abs. error", "signed error", "on a seam", "inside", "resized",
              "shifted", "transposed", "no number", "not asked"]  # fmt: skip
    rows = []
    for name, arm in results["arms"].items():
        overall, changes = arm["overall"], arm["invariance"]
        rows.append(
            [
                name if set(arm["sets"]) - {"nine-balls"} else f"{name} (nine balls)",
                str(arm["num_pictures"]),
                _percent(overall["exact"]),
                _number(overall["mae"], ""),
                _number(overall["signed"], "+"),
                _number(arm["seams"]["on_seams"], "+"),
                _number(arm["seams"]["inside"], "+"),
                *(_percent(changes[kind]) for kind in ("resized", "shifted", "transposed")),
                str(arm["num_without_number"]),
                str(sum(arm["not_asked"].values())),
            ]
        )
    return header, rows


def _sets_table(results: Mapping[str, Any]) -> str:
    arms = {
        name: arm for name, arm in results["arms"].items() if set(arm["sets"]) - {"nine-balls"}
    } or results["arms"]
    rows = []
    names = list(dict.fromkeys((name, part) for arm in arms.values() for name, part in _variants(arm)))
    found = {
        (arm_name, name, variant): figures
        for arm_name, arm in arms.items()
        for name, part in arm["sets"].items()
        for variant, figures in [("all", part["all"]), *part["variants"].items()]
    }
    for name, variant in names:
        figures = [found.get((arm_name, name, variant)) for arm_name in arms]
        num = next(str(some["num"]) for some in figures if some)
        rows.append(
            [
                name if variant == "all" else "",
                variant,
                num,
                *(_percent(some and some["exact"]) for some in figures),
            ]
        )
    return _table(["set", "variant", "pictures", *(f"exact: {name}" for name in arms)], rows)


def _variants(arm: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, part in arm["sets"].items():
        yield name, "all"
        for variant in part["variants"]:
            yield name, variant


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=first' if row[0] else ''}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _percent(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "–"
    value, low, high = (f"{100 * figure[name]:.0f}" for name in ("value", "low", "high"))
    return f"{value} % ({low}–{high})"


def _number(figure: Mapping[str, float] | None, sign: str) -> str:
    if figure is None:
        return "–"
    value, low, high = (f"{figure[name]:{sign}.2f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _draw_cases(answers: Sequence[CountAnswer], pictures: Mapping[str, Picture], answerer: Answerer) -> str:
    """Of each set some groups of the first arm, those first whose answers differ."""
    first = answers[0].arm if answers else ""
    groups: dict[str, dict[str, list[CountAnswer]]] = {}
    for answer in answers:
        if answer.arm == first and answer.reason is None:
            groups.setdefault(answer.set, {}).setdefault(answer.group, []).append(answer)
    sections = []
    for name in sorted(groups, key=lambda name: not name.startswith("seams-")):
        some = list(groups[name].values())
        if all(len(group) == 1 for group in some):
            some = [[answer for [answer] in some]]  # pictures of one layout, or of one kind, side by side
            some[0].sort(key=lambda answer: answer.is_exact)
        some.sort(key=lambda group: sum(answer.is_exact for answer in group) / len(group))
        chosen = some[: _NUM_CASES // 2] + some[max(len(some) - _NUM_CASES // 2, _NUM_CASES // 2) :]
        blocks = "".join(_draw_group(group[:6], pictures, answerer) for group in chosen)
        sections.append(f"<h3>{html.escape(name)}</h3>{blocks}")
    return "".join(sections)


def _draw_group(group: Sequence[CountAnswer], pictures: Mapping[str, Picture], answerer: Answerer) -> str:
    questions = dict.fromkeys(answer.question for answer in group)
    cells = []
    for answer in group:
        plan = _plan(answerer, answer.height, answer.width, _find_arm(answer))
        told = NO_NUMBER if answer.count is None else str(answer.count)
        verdict = "right" if answer.is_exact else "wrong"
        question = "" if len(questions) == 1 else f"{html.escape(answer.question)}<br>"
        cells.append(
            f'<figure class="case"><img alt="" loading="lazy" src="{_thumbnail(pictures[answer.id], plan)}">'
            f"<figcaption>{question}{html.escape(answer.variant)}: "
            f'<b class="{verdict}">{html.escape(told)}</b> of {answer.truth}</figcaption></figure>'
        )
    heading = f"<p>{html.escape(next(iter(questions)))}</p>" if len(questions) == 1 else ""
    return f'<div class="group">{heading}<div class="row">{"".join(cells)}</div></div>'


def _thumbnail(picture: Picture, plan: SlicePlan | None) -> str:
    """A small picture with its slices, as a data: URL; objects on seams stand out by the lines through them."""
    scale = min(1.0, _THUMBNAIL / max(picture.size))
    height, width = (max(round(side * scale), 1) for side in picture.size)
    down, right = (round(step * scale) for step in picture.shift)
    small = replace(picture, size=(height, width), shift=(down, right)).draw()
    pen = ImageDraw.Draw(small)
    if plan is not None and len(plan.slices) > 1:
        for view in plan.slices:
            box = [edge * scale for edge in view.box]
            pen.rectangle((box[1], box[0], box[3], box[2]), outline=_SEAM)
    file = io.BytesIO()
    small.quantize(64, method=Image.Quantize.MEDIANCUT).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _notes(results: Mapping[str, Any]) -> str:
    reasons = {
        reason: number for arm in results["arms"].values() for reason, number in arm["not_asked"].items()
    }
    if not reasons:
        return ""
    lines = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons)
    return f"<h2>Not asked</h2><ul class='notes'>{lines}</ul>"


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
<p class="summary">{summary}</p>
<h2>Findings</h2>
{findings}
<h2>Plots</h2>
<div class="plots">{plots}</div>
<h2>Figures</h2>
{table}
<details><summary>By set</summary>{sets}</details>
<h2>Pictures and answers</h2>
<p class="summary">Of each set the groups with the most wrong answers, and some others; slices are drawn in grey.</p>
{cases}
{notes}
</body>
</html>
"""

_STYLE = """
:root { --ink: #20242c; --soft: #5b6470; --line: #dfe2e8; --good: #1f7a4d; --bad: #c1273b; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: #f6f7f9; max-width: 1280px;
  margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .7rem; } h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
.summary { color: var(--soft); margin: 0 0 1rem; }
.good { background: #e6f4ec; color: var(--good); font-weight: 600; padding: .9rem 1.1rem; border-radius: 10px; }
.findings { list-style: none; margin: 0; padding: 0; display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); }
.findings li { background: #fff; border: 1px solid var(--line); border-left: 4px solid var(--bad);
  border-radius: 8px; padding: .7rem .9rem; }
.findings b, .findings small { display: block; } .findings small { color: var(--soft); font-size: .86rem; }
.arm { float: right; font-size: .75rem; color: var(--soft); border: 1px solid var(--line); border-radius: 99px;
  padding: 0 .55rem; margin-left: .5rem; }
.plots { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); }
.plots figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .5rem; }
.plots img { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .3rem .9rem; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } tr.first td { border-top: 1px solid var(--line); }
details { margin-top: .8rem; } details > summary { cursor: pointer; color: var(--soft); padding: .3rem 0; }
.group { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; margin: .6rem 0; }
.group p { margin: 0 0 .5rem; color: var(--soft); font-size: .9rem; }
.row { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-end; }
.case { margin: 0; max-width: min(100%, 210px); } .case img { display: block; max-width: 100%; max-height: 210px;
  border: 1px solid var(--line); border-radius: 4px; }
figcaption { font-size: .82rem; color: var(--soft); margin-top: .25rem; }
.right { color: var(--good); } .wrong { color: var(--bad); }
.notes { color: var(--soft); font-size: .88rem; }
"""
