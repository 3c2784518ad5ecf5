"""The `vlmslice` command: parses arguments, calls one library function, prints.

Answers go to stdout and nothing else does; notes and errors go to stderr. An error of the user is one line and exit
code 2. What needs torch is imported inside the commands that need it.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from vlmslice import __version__
from vlmslice.answer_schemas import read_answer_schema
from vlmslice.command_line import (
    UserError,
    picture_paths,
    print_json,
    print_note,
    print_table,
    read_size,
    run_application,
    save_picture,
)
from vlmslice.data.commands import data_app
from vlmslice.slicing import SlicePlan, SlicingConfig, SlicingError, plan_slices
from vlmslice.slicing_policies import POLICIES

if TYPE_CHECKING:
    from PIL import Image

    from vlmslice.inference import Answer

_EPILOG = "Sizes are given as width x height, as in 1920x1080; boxes, grids and JSON are height first."

app = typer.Typer(
    name="vlmslice",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(data_app)

_Policy = Annotated[
    str | None, typer.Option(help=f"Slicing policy: {', '.join(POLICIES)}.  [default: the model's]")
]
_MaxVisualTokens = Annotated[
    int | None, typer.Option(help="Most visual tokens of an image.  [default: the model's]")
]
_Model = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Folder of a saved model.  [default: the bundled one]")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vlmslice {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """A vision-language model that cuts images into slices of the shape it was trained on.

    - `vlmslice ask receipt.png "What is written in the image?"`
    - `vlmslice plan 1920x1080`
    """


@app.command()
def ask(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE", help="Image files; `-` reads one from standard input.")
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about them.")],
    as_json: _Json = False,
    show_slices: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.png",
            help="Draw overview and grid over the image; several images make OUT-1.png, ...",
        ),
    ] = None,
    policy: _Policy = None,
    max_visual_tokens: _MaxVisualTokens = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 1024,
    fields: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME", help="Hold the answer to a JSON object of these fields, all texts."
        ),
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Hold the answer to JSON of the schema in this file.")
    ] = None,
    model: _Model = None,
) -> None:
    """Ask about images; the answer streams as it is made.

    - `vlmslice ask receipt.png "What is written in the image?"`
    - `vlmslice ask chart.png "Which bar is tallest?" --show-slices out.png`
    - `vlmslice ask one.png two.png "What do they say?" --json`
    - `cat shapes.png | vlmslice ask - "How many circles are there?"`
    - `vlmslice ask receipt.png "Read the receipt as JSON." --fields company,date,address,total`

    Where the answer points at a single image, as counts do, `--show-slices` draws the points, too.

    With `--json`: `answer`, `points` (`[y, x]` in pixels of the image), `plans` (one for each image),
    `num_visual_tokens`, `num_new_tokens`, `finish_reason` (`stop`, or `length` or `loop` of an answer that was cut),
    `model` and `seconds` by stage: `load` (Python, libraries, weights), `process` (images to model inputs),
    `first_token` (encode and read the prompt), `decode` (the rest of the answer).
    """
    start = time.perf_counter()
    from vlmslice.image_loading import load_image

    if images.count("-") > 1:
        raise UserError("- stands for standard input and can be given once; save the other image to a file")
    pictures = [load_image(sys.stdin.buffer if image == "-" else image) for image in images]
    outputs = picture_paths(show_slices, len(pictures)) if show_slices else []
    schema = read_answer_schema(fields, json_schema)

    from transformers.utils.logging import disable_progress_bar

    from vlmslice.inference import Assistant

    disable_progress_bar()
    assistant = Assistant.from_pretrained(model)
    loaded = time.perf_counter()
    answer = assistant.ask(
        pictures,
        question,
        policy=policy,
        max_visual_tokens=max_visual_tokens,
        max_new_tokens=max_new_tokens,
        json_schema=schema,
        on_text=None if as_json else _print_piece,
    )
    seconds = {"load": loaded - start, **answer.seconds}
    if as_json:
        print_json(
            {
                **answer.to_dict(),
                "model": assistant.model.name_or_path,
                "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
            }
        )
    else:
        print(flush=True)
        print_note(_summarize(answer, seconds))
        if answer.finish_reason == "length":
            print_note(f"the answer was cut at {max_new_tokens} tokens; allow more with --max-new-tokens")
        elif answer.finish_reason == "loop":
            print_note("the answer went round in circles and was stopped")
    for path, picture, plan in zip(outputs, pictures, answer.plans, strict=False):
        _draw(picture, plan, path, answer.points)
        print_note(f"slices drawn to {path}")


@app.command()
def plan(
    source: Annotated[
        str, typer.Argument(metavar="WIDTHxHEIGHT|IMAGE", help="A size such as 1920x1080, or an image file.")
    ],
    policy: _Policy = None,
    max_visual_tokens: _MaxVisualTokens = None,
    model: _Model = None,
    all_policies: Annotated[bool, typer.Option("--all", help="Every policy, side by side.")] = False,
    as_json: _Json = False,
) -> None:
    """Tell how an image of some size will be cut, and what it will cost; of a file, only the header is read.

    - `vlmslice plan 4000x100`: 4000 px wide, 100 px high
    - `vlmslice plan 4000x100 --policy uhd`
    - `vlmslice plan 4000x100 --all`: every policy, side by side
    - `vlmslice plan receipt.jpg --json`

    The JSON is height first throughout: `image_size` and `size` are `[height, width]`, `grid` is `[rows, columns]`,
    and a `box` is `[top, left, bottom, right]` in pixels of the image. With `--all` it holds `plans` by policy, and
    `errors` of those that cannot make one.

    `--all` tells of each policy the patches that the vision encoder and the tokens that the language model must work
    through, the megapixels of the slices that show the image, the share of the slices that is padding, and by how much
    the aspect ratio is changed.
    """
    from vlmslice.model_files import read_slicing_config

    height, width = read_size(source)
    fields = read_slicing_config(model).to_dict()
    fields |= {
        name: value
        for name, value in (("policy", policy), ("max_visual_tokens", max_visual_tokens))
        if value is not None
    }
    if all_policies:
        if policy is not None:
            raise UserError(f"got --policy {policy} and --all; leave one of them out")
        _compare_policies(height, width, fields, as_json)
        return
    result = plan_slices(height, width, SlicingConfig.from_dict(fields))
    if as_json:
        print_json(result.to_dict())
    else:
        print(_describe_plan(result))


@app.command()
def demo(
    model: _Model = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 takes a free one.")] = 7860,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets others in.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
) -> None:
    """Serve a web page to ask about images, on this machine only.

    - `vlmslice demo`: opens http://127.0.0.1:7860
    - `vlmslice demo --model runs/nano/wide --port 0 --no-browser`

    Nothing is sent anywhere else. It needs gradio, installed by `pip install 'vlmslice[demo]'` and then
    `pip install --no-deps gradio==6.31.0`.
    """
    from vlmslice.page.server import serve_page

    serve_page(model, host, port, browser, note=print_note, announce=lambda line: print(line, flush=True))


@app.command("eval")
def evaluate_command(
    suite: Annotated[
        str,
        typer.Option(
            metavar="SUITE",
            help="`synthetic`, `nine-balls`, `dev`, or a JSONL file of image, task, question, answer.",
        ),
    ],
    model: _Model = None,
    data_root: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the real images, for the suite `dev`.")
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(metavar="PART", help="This part of the suite only; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most samples of each part.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where everything goes.  [default: runs/eval/MODEL-SUITE]"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions asked at once.")] = 8,
    policy: _Policy = None,
    max_visual_tokens: _MaxVisualTokens = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of an answer.  [default: by task]")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="PEER", help="Score `tesseract` or `rapidocr` on the OCR rows too; repeatable."),
    ] = None,
    free_form: Annotated[
        bool, typer.Option("--free-form", help="Do not hold answers that should be JSON to their schema.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete what an earlier run left in the folder.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Score a model on a suite, into a folder with predictions, figures and a page of cases; goes on after a kill.

    - `vlmslice eval --suite synthetic --limit 60`
    - `vlmslice eval --suite dev --data-root data --part receipt-lines --limit 200 --peer tesseract`
    - `vlmslice eval --suite rows.jsonl --model runs/nano/read/final --out report --json`

    The folder gets `report.html`, `results.json`, `results.md`, `predictions.jsonl` and `manifest.json`; `--json`
    prints what `results.json` holds. Intervals are 95 % bootstrap intervals over images.
    """
    from vlmslice.model_files import find_model

    model_name = find_model(model).resolve().name

    from transformers.utils.logging import disable_progress_bar

    from vlmslice.evaluation import EvaluationOptions, evaluate
    from vlmslice.peers import load_peer
    from vlmslice.suites import open_suite

    disable_progress_bar()
    peers = [load_peer(name) for name in dict.fromkeys(peer or ())]
    opened = open_suite(suite, data_root=data_root, limit=limit, parts=part)
    folder = out or Path("runs", "eval", f"{model_name}-{opened.name}")
    options = EvaluationOptions(policy, max_visual_tokens, max_new_tokens, free_form, batch_size)
    results = evaluate(model, opened, folder, options=options, peers=peers, restart=restart)
    if as_json:
        print_json(results)
    else:
        _print_results(results)
    print_note(f"report written to {folder / 'report.html'}")


@app.command("count-test")
def count_test_command(
    model: _Model = None,
    model_kind: Annotated[
        str,
        typer.Option(metavar="KIND", help="`vlmslice`, or `transformers` for any image-text-to-text model."),
    ] = "vlmslice",
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Ask an OpenAI-compatible endpoint; its key is VLMSLICE_ENDPOINT_KEY."
        ),
    ] = None,
    endpoint_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model at the endpoint.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for an endpoint.")] = 120,
    scripted: Annotated[
        str | None,
        typer.Option(
            metavar="SCRIPT",
            help="Ask a script: perfect, double-counter, seam-misser, size-failer or constant.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="POLICY",
            help=f"Slicing policy under test; repeatable: {', '.join(POLICIES)}.  "
            "[default: the model's, and the nine balls under all]",
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ARM",
            help="Also ask with `no-overview`, `no-schema`, or both joined by a comma; repeatable.",
        ),
    ] = None,
    max_visual_tokens: _MaxVisualTokens = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most groups of matched pictures in each set.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the pictures.  [default: fixed]")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where everything goes.  [default: runs/count-test/MODEL]"),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete what an earlier run left in the folder.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Find out what slicing does to what a model counts; a report with figures, plots and findings.

    - `vlmslice count-test`: the bundled model, some minutes on two cores
    - `vlmslice count-test --policy adaptive --policy internvl --arm no-overview --limit 4`
    - `vlmslice count-test --model FOLDER --model-kind transformers`
    - `vlmslice count-test --endpoint http://localhost:8000/v1 --endpoint-model NAME`
    - `vlmslice count-test --scripted double-counter`: seconds, and what a fault looks like

    The folder gets `report.html`, `report.png`, `results.json`, `answers.jsonl` and `manifest.json`; `--json` prints
    what `results.json` holds. The same command goes on after a kill. Of a model that is not ours, `--policy` tells
    whose seams the pictures are made for.
    """
    from vlmslice.counting_test.command import build_test
    from vlmslice.counting_test.run import run_with_progress

    test = build_test(
        model=model,
        model_kind=model_kind,
        endpoint=endpoint,
        endpoint_model=endpoint_model,
        timeout=timeout,
        script=scripted,
        policies=policy or (),
        options=arm or (),
        max_visual_tokens=max_visual_tokens,
        limit=limit,
        seed=seed,
    )
    folder = out or Path("runs", "count-test", test.answerer.name.replace("/", "-"))
    results = run_with_progress(test, folder, restart)
    if as_json:
        print_json(results)
    else:
        from vlmslice.counting_test.report import result_lines

        header, rows, findings = result_lines(results)
        print_table(header, rows)
        print()
        for line in findings:
            print(line)
    print_note(f"report written to {folder / 'report.html'}")


@app.command(
    add_help_option=False,
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "allow_interspersed_args": False,
    },
)
def compose(context: typer.Context) -> None:
    """Build a model from a ViT, a language model and a connector, ready for training."""
    from vlmslice.compose import compose_command

    # Its options are declared beside the function, behind an import of torch, so the arguments are handed on whole.
    inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    inner.command(context_settings={"help_option_names": ["-h", "--help"]})(compose_command)
    run_application(inner, context.args or ["--help"], "vlmslice compose")


_Output = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="New folder for the model.")]
_Source = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="Folder of a saved model.  [default: the bundled one]")
]
_Check = Annotated[
    int, typer.Option(min=0, help="Rendered lines, and as many counts, to ask both models; 0 asks none.")
]


@app.command("prune")
def prune_command(
    output: _Output,
    layers: Annotated[int, typer.Option(min=1, metavar="K", help="Language layers to remove.")],
    model: _Source = None,
    samples: Annotated[int, typer.Option(min=1, help="Rendered samples to measure influence on.")] = 32,
    check: _Check = 20,
) -> None:
    """Remove the language layers that change the hidden states least; tells what it costs.

    - `vlmslice prune -o smaller --layers 2`
    - `vlmslice prune runs/nano/large/final -o smaller --layers 1 --check 100`

    `train/train.py --recipe distil --model smaller` heals what is left.
    """
    from transformers.utils.logging import disable_progress_bar

    from vlmslice.shrinking.commands import prune_folder
    from vlmslice.shrinking.comparison import comparison_rows

    disable_progress_bar()
    groups, measured = prune_folder(model, output, layers, samples, check)
    print_table(
        ("layers", "influence", ""),
        [
            (" ".join(map(str, group)), f"{value:.3f}", "removed" if is_removed else "")
            for group, value, is_removed in groups
        ],
    )
    print()
    print_table(("", "before", "after"), comparison_rows(*measured))
    print_note(f"model saved to {output}")


@app.command("quantise")
def quantise_command(
    output: _Output,
    model: _Source = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART",
            help="vision_encoder, connector, cross_attention or language_model; repeatable.  [default: all]",
        ),
    ] = None,
    check: _Check = 20,
) -> None:
    """Keep the matrices of a model as int8, one scale for each output channel; tells what it costs.

    - `vlmslice quantise -o int8`
    - `vlmslice quantise smaller -o smaller-int8 --part language_model --part cross_attention`
    """
    from transformers.utils.logging import disable_progress_bar

    from vlmslice.shrinking.commands import quantise_folder
    from vlmslice.shrinking.comparison import comparison_rows

    disable_progress_bar()
    measured = quantise_folder(model, output, part, check)
    print_table(("", "before", "after"), comparison_rows(*measured))
    print_note(f"model saved to {output}")


@app.command()
def doctor(
    model: _Model = None,
    as_json: _Json = False,
) -> None:
    """Check this machine: versions, threads, bf16, memory, disk and the model. Exits with 1 if something is wrong.

    - `vlmslice doctor`
    - `vlmslice doctor --json > report.json`
    """
    from vlmslice.doctor import examine

    report = examine(model)
    if as_json:
        print_json(report.to_dict())
    else:
        print(report.describe())
    if report.problems:
        raise typer.Exit(1)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where to look for runs.")] = Path(
        "runs"
    ),
    as_json: _Json = False,
) -> None:
    """List the training runs under a folder: how far each stage is, its losses, its speed.

    - `vlmslice runs`
    - `vlmslice runs runs/nano --json`
    """
    from datetime import datetime

    from vlmslice.training.runs import find_runs, run_lines

    records = find_runs(folder)
    if as_json:
        print_json({"stages": [record.to_dict() for record in records]})
    else:
        print_table(*run_lines(records, datetime.now().astimezone()))


def _draw(
    picture: Image.Image, plan: SlicePlan, path: Path, points: Sequence[tuple[float, float]] = ()
) -> None:
    from vlmslice.drawing import draw_plan

    save_picture(draw_plan(picture, plan, points), path)


def _describe_plan(plan: SlicePlan) -> str:
    height, width = plan.image_size
    rows, cols = plan.grid
    lines = [f"image     {width} x {height} px (width x height)"]
    if plan.overview is None:
        view = plan.slices[0]
        lines.append(f"one view  {view.size[1]} x {view.size[0]} px, {view.num_visual_tokens} visual tokens")
    else:
        piece = plan.slices[0]
        lines += [
            f"slices    {len(plan.slices)}, {rows} x {cols} (rows x columns), each about "
            f"{round(width / cols)} x {round(height / rows)} px, resized to {piece.size[1]} x {piece.size[0]} px, "
            f"{piece.num_visual_tokens} visual tokens",
            f"overview  {plan.overview.size[1]} x {plan.overview.size[0]} px, "
            f"{plan.overview.num_visual_tokens} visual tokens",
        ]
    lines += [f"total     {plan.num_visual_tokens} visual tokens", f"why       {plan.policy}: {plan.reason}"]
    return "\n".join(lines)


def _compare_policies(height: int, width: int, fields: dict[str, Any], as_json: bool) -> None:
    plans: dict[str, SlicePlan] = {}
    errors: dict[str, str] = {}
    for policy in POLICIES:
        try:
            plans[policy] = plan_slices(height, width, SlicingConfig.from_dict(fields | {"policy": policy}))
        except SlicingError as error:
            errors[policy] = str(error)
    if as_json:
        print_json({"plans": {name: plan.to_dict() for name, plan in plans.items()}, "errors": errors})
        return
    print(f"{width} x {height} px (width x height)")
    header = (
        "policy",
        "grid",
        "slice, px",
        "overview",
        "patches",
        "tokens",
        "megapixels",
        "padded",
        "distortion",
    )
    rows = []
    for policy in POLICIES:
        if policy in errors:
            rows.append((policy, *["-"] * (len(header) - 1)))
            continue
        plan = plans[policy]
        sizes = [
            f"{view.size[1]}x{view.size[0]}" if view else "-" for view in (plan.slices[0], plan.overview)
        ]
        kept = plan.detail * height * width / 1e6
        rows.append(
            (
                policy,
                "x".join(map(str, plan.grid)),
                *sizes,
                str(plan.num_patches),
                str(plan.num_visual_tokens),
                f"{kept:.2g}",
                f"{plan.padded:.0%}",
                f"{plan.distortion:.2f}",
            )
        )
    print_table(header, rows)
    for policy, message in errors.items():
        print_note(f"{policy}: {message}")


def _summarize(answer: Answer, seconds: dict[str, float]) -> str:
    grids = ", ".join("x".join(map(str, plan.grid)) for plan in answer.plans)
    times = ", ".join(f"{stage.replace('_', ' ')} {value:.2f} s" for stage, value in seconds.items())
    return f"grid {grids} | {answer.num_visual_tokens} visual tokens | {times}"


def _print_results(results: dict[str, Any]) -> None:
    from vlmslice.evaluation_report import result_lines

    header, lines = result_lines(results)
    rows = []
    before = None
    for name, num_samples, *rest in lines:
        rows.append([*((name, num_samples) if name != before else ("", "")), *rest])
        before = name
    print_table(header, rows)


def _print_piece(text: str) -> None:
    # A picture can make a model spell anything; a terminal must not obey it.
    print(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text), end="", flush=True)


def run(arguments: list[str]) -> NoReturn:
    """Runs `vlmslice` with these arguments and leaves the process with its exit code."""
    # Threads that spin while they wait slow everything else on the machine; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_application(app, arguments or ["--help"], "vlmslice")
