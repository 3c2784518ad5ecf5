"""What stands where on the page, and which function answers which press; nothing is decided here."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from gradio.data_classes import ImageData

from vlmslice import __version__
from vlmslice.inference import MAX_NEW_TOKENS, Assistant
from vlmslice.page.asking import Moment, ask
from vlmslice.page.ball_counts import QUESTION, SIDES, BallCount, count_balls, counts_plot, counts_table
from vlmslice.page.examples import Example
from vlmslice.page.line import Line, Turn
from vlmslice.page.price import NO_IMAGE, price_markup
from vlmslice.slicing_policies import POLICIES

CSS = Path(__file__).with_name("page.css")

_STATUS_OF_ASKING = "Add an image, ask, and see which parts of it the model looked at."
_STATUS_OF_COUNTING = "Nothing counted yet."


def theme() -> gr.themes.Base:
    """One accent colour on calm greys, in the fonts of the system: nothing is fetched."""
    sans = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_lg,
        font=sans,
        font_mono=mono,
    ).set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_shadow="0 1px 2px rgb(0 0 0 / 0.04)",
        input_background_fill="*neutral_50",
        input_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_600",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
    )


class _Turns:
    """Who has which turn, so that the stop button of a browser tab stops its own and no other."""

    def __init__(self) -> None:
        self._turns: dict[tuple[str | None, str], Turn] = {}

    def put(self, session: str | None, task: str, turn: Turn) -> None:
        self._turns[session, task] = turn

    def stop(self, session: str | None, task: str) -> None:
        turn = self._turns.pop((session, task), None)
        if turn is not None:
            turn.stop()


def build_page(assistant: Assistant, line: Line, examples: Sequence[Example]) -> gr.Blocks:
    """The page, ready to launch with `theme()` and `CSS`.

    Args:
        assistant: Who answers everyone.
        line: Of those who wait for it.
        examples: Pictures that load with a click.
    """
    turns = _Turns()
    with gr.Blocks(title="vlmslice", fill_width=True, analytics_enabled=False) as page:
        gr.HTML(_header(assistant), elem_id="vs-header")
        with gr.Tabs(elem_id="vs-tabs"):
            with gr.Tab("Ask", id="ask"):
                _ask_tab(assistant, line, examples, turns)
            with gr.Tab("Counting test", id="count"):
                _counting_tab(assistant, line, turns)
        gr.HTML(
            f'<p class="vs-quiet">vlmslice {__version__}. Images, questions and answers stay on this machine.</p>',
            elem_id="vs-footer",
        )

        def leave(request: gr.Request) -> None:
            for task in ("ask", "count"):
                turns.stop(request.session_hash, task)

        page.unload(leave)
    return page


def _ask_tab(assistant: Assistant, line: Line, examples: Sequence[Example], turns: _Turns) -> None:
    config = assistant.processor.image_processor.slicing_config
    most = config.max_visual_tokens
    step = max(most // 64, 1)
    with gr.Row(
        elem_id="vs-grid"
    ):  # placed by page.css: two columns, or one in this order on a narrow screen
        with gr.Column(elem_id="vs-input", min_width=0):
            upload = gr.Image(
                label="Image",
                sources=["upload", "clipboard", "webcam"],
                type="filepath",
                height=300,
                buttons=["fullscreen"],
                format="png",
                elem_id="vs-image",
                placeholder="Drop an image\nor click to choose one",
            )
            # Handlers get the file as it was uploaded, which `load_image` checks and turns. (A subclass would make
            # gradio write a .pyi file beside this one.)
            upload.preprocess = _uploaded_path
            with gr.Row(elem_id="vs-examples"):
                buttons = _example_buttons(examples)
            question = gr.Textbox(
                label="Question",
                placeholder="What is written in the image?",
                lines=1,
                max_lines=4,
                elem_id="vs-question",
            )
            with gr.Row(elem_classes="vs-actions"):
                ask_button = gr.Button("Ask", variant="primary", min_width=80, scale=2, elem_id="vs-ask")
                stop_button = gr.Button("Stop", interactive=False, min_width=80, scale=1, elem_id="vs-stop")
            price = gr.HTML(NO_IMAGE, elem_id="vs-price")
        with gr.Column(elem_id="vs-output", min_width=0):
            status = gr.HTML(status_markup(_STATUS_OF_ASKING, "idle"), elem_id="vs-status")
            answer = gr.Textbox(
                label="Answer",
                lines=2,
                max_lines=14,
                interactive=False,
                buttons=["copy"],
                elem_id="vs-answer",
            )
            overlay = gr.Image(
                label="What the model looked at",
                show_label=False,
                interactive=False,
                buttons=["fullscreen", "download"],
                format="png",
                visible=False,
                elem_id="vs-overlay",
                alt_text="The image with the slices that the model looked at, and its overview",
            )
            table = gr.Dataframe(
                label="As a table",
                interactive=False,
                visible=False,
                buttons=["copy"],
                wrap=True,
                elem_id="vs-table",
            )
            with gr.Accordion("Answer and slices as JSON", open=False, visible=False) as json_box:
                as_json = gr.Code(
                    language="json", interactive=False, max_lines=20, elem_id="vs-json", label="JSON"
                )
        with gr.Column(elem_id="vs-settings", min_width=0), gr.Group(elem_id="vs-slicing"):
            policy = gr.Dropdown(
                list(POLICIES), value=config.policy, label="Slicing policy", elem_id="vs-policy"
            )
            budget = gr.Slider(
                step, most, value=most, step=step, label="Most visual tokens", elem_id="vs-budget"
            )
            longest = gr.Slider(
                16, 2048, value=MAX_NEW_TOKENS, step=16, label="Longest answer, tokens", elem_id="vs-longest"
            )

    def show_price(file: str | None, policy: str, budget: float) -> str:
        return price_markup(file, policy, int(budget), config)

    gr.on(
        [upload.change, policy.change, budget.change],
        show_price,
        [upload, policy, budget],
        price,
        show_progress="hidden",
        trigger_mode="always_last",
        api_visibility="private",
        concurrency_limit=None,
    )
    for button, example in zip(buttons, examples, strict=True):
        button.click(
            partial(_load, example),
            None,
            [upload, question],
            show_progress="hidden",
            api_visibility="private",
        )

    def show_answer(
        file: str | None,
        question: str,
        policy: str,
        budget: float,
        longest: float,
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        session = request.session_hash
        moments = ask(
            assistant,
            line,
            file,
            question,
            policy=policy,
            max_visual_tokens=int(budget),
            max_new_tokens=int(longest),
            on_turn=lambda turn: turns.put(session, "ask", turn),
        )
        yield {
            overlay: gr.update(visible=False),
            table: gr.update(visible=False),
            json_box: gr.update(visible=False),
        }
        for moment in moments:
            yield show_moment(moment)

    def show_moment(moment: Moment) -> dict[Any, Any]:
        changes: dict[Any, Any] = {
            status: status_markup(moment.status, moment.kind),
            answer: moment.text,
            stop_button: gr.update(interactive=not moment.is_last),
            ask_button: gr.update(interactive=moment.is_last),
        }
        if moment.overlay is not None:
            changes[overlay] = gr.update(value=moment.overlay, visible=True)
        if moment.json is not None:
            changes |= {json_box: gr.update(visible=True), as_json: moment.json}
        if moment.table is not None:
            frame = pd.DataFrame(moment.table.rows, columns=list(moment.table.header))
            changes[table] = gr.update(value=frame, visible=True)
        return changes

    gr.on(
        [ask_button.click, question.submit],
        show_answer,
        [upload, question, policy, budget, longest],
        [status, answer, overlay, table, json_box, as_json, stop_button, ask_button],
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    _wire_stop(stop_button, turns, "ask")


def _counting_tab(assistant: Assistant, line: Line, turns: _Turns) -> None:
    gr.HTML(
        '<p class="vs-lead">The same nine balls, drawn at growing sizes. A model whose slices overlap may see a ball '
        "twice and count 12, then 16; one that squashes or pads loses them.</p>"
    )
    with gr.Row(elem_id="vs-count-grid"):
        with gr.Column(elem_id="vs-count-input", min_width=0):
            sides = gr.CheckboxGroup(
                [(f"{side} px", side) for side in SIDES],
                value=[224, 448, 896],
                label="Sizes",
                elem_id="vs-sides",
            )
            policies = gr.CheckboxGroup(
                list(POLICIES), value=list(POLICIES)[:2], label="Slicing policies", elem_id="vs-policies"
            )
            question = gr.Textbox(QUESTION, label="Question", elem_id="vs-count-question")
            with gr.Row(elem_classes="vs-actions"):
                run_button = gr.Button("Count", variant="primary", min_width=80, scale=2, elem_id="vs-count")
                stop_button = gr.Button(
                    "Stop", interactive=False, min_width=80, scale=1, elem_id="vs-count-stop"
                )
        with gr.Column(elem_id="vs-count-output", min_width=0):
            status = gr.HTML(status_markup(_STATUS_OF_COUNTING, "idle"), elem_id="vs-count-status")
            table = gr.Dataframe(
                label="Counts", interactive=False, visible=False, buttons=["copy"], elem_id="vs-count-table"
            )
            plot = gr.HTML(elem_id="vs-count-plot")

    def show_counts(
        sides: list[int], policies: list[str], question: str, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        session = request.session_hash
        shown: tuple[BallCount, ...] | None = None
        for moment in count_balls(
            assistant,
            line,
            sides,
            policies,
            question,
            on_turn=lambda turn: turns.put(session, "count", turn),
        ):
            is_last = moment.kind in ("done", "stopped", "error")
            changes: dict[Any, Any] = {
                status: status_markup(moment.status, moment.kind),
                stop_button: gr.update(interactive=not is_last),
                run_button: gr.update(interactive=is_last),
            }
            if moment.counts and moment.counts != shown:
                header, rows = counts_table(moment.counts)
                changes[table] = gr.update(value=pd.DataFrame(rows, columns=header), visible=True)
                changes[plot] = counts_plot(moment.counts)
                shown = moment.counts
            yield changes

    run_button.click(
        show_counts,
        [sides, policies, question],
        [status, table, plot, stop_button, run_button],
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    _wire_stop(stop_button, turns, "count")


def _wire_stop(button: gr.Button, turns: _Turns, task: str) -> None:
    def stop(request: gr.Request) -> None:
        turns.stop(request.session_hash, task)

    # Beside the queue, as what it stops is in it.
    button.click(stop, None, None, queue=False, api_visibility="private")


def _example_buttons(examples: Sequence[Example]) -> list[gr.Button]:
    buttons = []
    with tempfile.TemporaryDirectory() as folder:  # gradio takes icons as files, and copies them
        for number, example in enumerate(examples):
            icon = Path(folder) / f"example-{number}.png"
            small = example.image.copy()
            small.thumbnail((240, 160))
            small.save(icon)
            buttons.append(gr.Button(example.name, icon=icon, elem_classes="vs-example", min_width=90))
    return buttons


def _uploaded_path(payload: ImageData | None) -> str | None:
    return None if payload is None else payload.path


def _load(example: Example) -> tuple[Any, str]:
    return example.image, example.question


def status_markup(sentence: str, kind: str) -> str:
    """Where a question stands; read out by screen readers as it changes."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="vs-state vs-{kind}" role="{role}" data-kind="{kind}">{html.escape(sentence)}</p>'


def _header(assistant: Assistant) -> str:
    name = Path(assistant.model.name_or_path).name or "unsaved model"
    millions = assistant.model.num_parameters() / 1e6
    return (
        '<div class="vs-brand"><svg viewBox="0 0 24 24" aria-hidden="true"><rect x="2" y="2" width="20" height="20" '
        'rx="4"/><path d="M2 9h20M9 9v13M16 9v13"/></svg><h1>vlmslice</h1></div>'
        f'<p class="vs-quiet">{html.escape(name)} · {millions:,.1f}M parameters · {assistant.model.device.type}</p>'
    )
