"""The web page as a user has it: `vlmslice demo` in a process of its own, driven in Chromium by playwright.

`make test-browser` runs this; with SCREENSHOTS=FOLDER it keeps pictures of the page there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from PIL import Image

from vlmslice import Assistant
from vlmslice.data.nine_balls import draw_nine_balls
from vlmslice.slicing import plan_slices

pytestmark = pytest.mark.browser

_TIMEOUT = 60_000  # ms; how long anything may take on a machine that does other things, too
# A clipboard of the page's own: that of the machine may be in use.
_CLIPBOARD = "navigator.clipboard.writeText = async text => { window.copied = text }"
_LOCAL = re.compile(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:|about:|chrome")
_QUESTION = "How many shapes are there?"


@contextmanager
def serve(*options: object) -> Iterator[str]:
    """The address of a page that is started and ended as a user would."""
    command = [str(Path(sys.executable).with_name("vlmslice")), "demo", "--port", "0", "--no-browser"]
    with subprocess.Popen(
        [*command, *map(str, options)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert address, f"instead of an address: {line!r}"
        try:
            yield address[0]
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def bundled() -> Iterator[str]:
    """A page on the bundled model."""
    with serve() as address:
        yield address


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page on a model that never ends an answer by itself, and takes its time for each token."""
    folder = tmp_path_factory.mktemp("endless")
    tiny_models.tiny_model(text={"num_hidden_layers": 24}).save_pretrained(folder)
    tiny_models.tiny_processor().save_pretrained(folder)
    with serve("--model", folder) as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.getuid() == 0 else []
        options += ["--use-fake-device-for-media-stream"]
        path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


Visit = Callable[..., Any]


@pytest.fixture
def visit(chromium: Any) -> Iterator[Visit]:
    """Opens a page as a user of its own. Afterwards: nothing was fetched from elsewhere, and no script complained."""
    complaints: list[str] = []
    with ExitStack() as stack:

        def open_page(address: str, width: int = 1280, height: int = 900) -> Any:
            context = chromium.new_context(
                viewport={"width": width, "height": height}, permissions=["camera"]
            )
            stack.callback(context.close)
            page = context.new_page()
            page.add_init_script(_CLIPBOARD)
            page.set_default_timeout(_TIMEOUT)
            page.on(
                "request", lambda r: None if _LOCAL.match(r.url) else complaints.append(f"fetched {r.url}")
            )
            page.on(
                "websocket", lambda s: None if _LOCAL.match(s.url) else complaints.append(f"fetched {s.url}")
            )
            page.on(
                "response", lambda r: complaints.append(f"{r.status} {r.url}") if r.status >= 400 else None
            )
            page.on(
                "console", lambda m: complaints.append(f"console: {m.text}") if m.type == "error" else None
            )
            page.on("pageerror", lambda error: complaints.append(f"script: {error}"))
            page.goto(address)
            page.locator("#vs-ask").wait_for()
            return page

        yield open_page
    assert complaints == []


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    """Who knows what the page should answer."""
    return Assistant.from_pretrained()


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("balls") / "nine balls.png"
    draw_nine_balls(448).save(path)
    return path


def upload(page: Any, path: Path) -> None:
    """By the file chooser; the price that appears is that of this image."""
    remove = page.locator("#vs-image").get_by_role("button", name="Remove Image")
    if remove.count():
        remove.click()
        page.locator("#vs-price", has_text="With an image").wait_for()
    page.locator("#vs-image input[type=file]").set_input_files(path)
    page.locator("#vs-price .vs-compare, #vs-price .vs-notice").first.wait_for()


def ask(page: Any, question: str) -> None:
    page.locator("#vs-question textarea").fill(question)
    page.locator("#vs-ask").click()


def wait_for(page: Any, kind: str, status: str = "#vs-status") -> str:
    """The sentence of a status, once it is of a kind."""
    place = page.locator(f"{status} [data-kind={kind}]")
    place.wait_for()
    return place.inner_text()


def set_longest(page: Any, number: int) -> None:
    field = page.locator("#vs-longest input[type=number]")
    field.fill(str(number))
    field.press("Tab")


def answer_of(page: Any) -> str:
    return page.locator("#vs-answer textarea").input_value()


def assert_fits(page: Any) -> None:
    """Nothing is wider than the window."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def keep_screenshot(page: Any, name: str) -> None:
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        path = Path(folder) / name
        page.screenshot(path=path, full_page=True)
        with Image.open(path) as picture:  # with a palette, a third of the size
            picture.convert("RGB").quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)


def test_upload_ask_and_see_what_was_looked_at(
    visit: Visit, bundled: str, assistant: Assistant, balls: Path
) -> None:
    page = visit(bundled)
    upload(page, balls)
    config = assistant.processor.image_processor.slicing_config
    plan = plan_slices(448, 448, config)
    price = page.locator("#vs-price").inner_text()
    assert f"{plan.num_visual_tokens:,}" in price and "448 × 448" in price
    ask(page, _QUESTION)
    status = wait_for(page, "done")
    expected = assistant.ask([balls], _QUESTION)
    assert answer_of(page) == expected.text
    assert f"{expected.num_visual_tokens:,} visual tokens in" in status
    overlay = page.locator("#vs-overlay img")
    overlay.wait_for()
    assert overlay.evaluate("image => image.complete && image.naturalWidth") > 400
    page.get_by_role("button", name="Answer and slices as JSON").click()
    page.locator("#vs-json").get_by_role("button", name="Copy").click()
    copied = json.loads(page.wait_for_function("window.copied").json_value())
    assert (copied["answer"], copied["plans"]) == (expected.text, [plan.to_dict()])


def test_an_example_on_a_wide_and_on_a_narrow_screen(visit: Visit, bundled: str) -> None:
    for width, height in ((1280, 900), (390, 844)):
        page = visit(bundled, width, height)
        page.locator("#vs-examples button", has_text="Shapes").click()
        page.locator("#vs-price .vs-compare").wait_for()
        assert page.locator("#vs-question textarea").input_value()
        page.locator("#vs-ask").click()
        wait_for(page, "done")
        page.wait_for_function("document.querySelector('#vs-overlay img')?.naturalWidth > 0")
        assert_fits(page)
        keep_screenshot(page, f"page_{width}.png")
        page.locator("#vs-price summary").click()
        assert_fits(page)
        page.get_by_role("tab", name="Counting test").click()
        page.locator("#vs-count").wait_for()
        assert_fits(page)


def test_a_picture_of_the_camera(visit: Visit, bundled: str) -> None:
    """Chromium's own test picture stands in for a camera."""
    page = visit(bundled)
    image = page.locator("#vs-image")
    image.get_by_role("button", name="Capture from camera").click()
    image.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#vs-image video')?.currentTime > 0")
    image.get_by_role("button", name="capture photo").click()
    page.locator("#vs-price .vs-compare").wait_for()


def test_policy_and_budget_change_the_price_at_once(visit: Visit, bundled: str, balls: Path) -> None:
    page = visit(bundled)
    upload(page, balls)
    before = page.locator("#vs-price dl").inner_text()
    page.locator("#vs-policy input").click()
    page.get_by_role("option", name="uniform", exact=True).click()
    page.locator("#vs-price .vs-chosen", has_text="uniform").wait_for(state="attached")
    assert page.locator("#vs-price dl").inner_text() != before
    budget = page.locator("#vs-budget input[type=number]")
    budget.fill("64")
    budget.press("Tab")
    page.locator("#vs-price .vs-notice", has_text="max_visual_tokens is 64").wait_for()
    ask(page, _QUESTION)
    assert "max_visual_tokens is 64" in wait_for(page, "error")


def test_a_bad_file_is_a_sentence_and_the_next_one_works(
    visit: Visit, bundled: str, balls: Path, tmp_path: Path
) -> None:
    page = visit(bundled)
    ask(page, _QUESTION)
    assert "Add an image first" in wait_for(page, "error")
    note = tmp_path / "note.png"
    note.write_text("no picture at all")
    upload(page, note)
    page.locator("#vs-price .vs-notice", has_text="note.png").wait_for()
    ask(page, _QUESTION)
    page.locator("#vs-status [data-kind=error]", has_text="note.png").wait_for()
    assert "Traceback" not in page.locator("body").inner_text()
    upload(page, balls)
    ask(page, _QUESTION)
    wait_for(page, "done")


def test_two_users_at_once_get_their_own_answers(
    visit: Visit, bundled: str, assistant: Assistant, balls: Path, tmp_path: Path
) -> None:
    other = tmp_path / "five balls.png"
    draw_nine_balls(448).crop((0, 0, 448, 280)).save(other)
    users = [(visit(bundled), path) for path in (balls, other)]
    for page, path in users:
        upload(page, path)
        page.locator("#vs-question textarea").fill(_QUESTION)
    for page, _ in users:
        page.locator("#vs-ask").click()
    for page, _ in users:
        wait_for(page, "done")
    expected = [assistant.ask([path], _QUESTION).text for _, path in users]
    assert expected[0] != expected[1]
    assert [answer_of(page) for page, _ in users] == expected


def test_counting_runs_and_can_be_stopped(visit: Visit, bundled: str, assistant: Assistant) -> None:
    page = visit(bundled)
    page.get_by_role("tab", name="Counting test").click()
    for choices in ("#vs-sides", "#vs-policies"):  # one of each
        for _ in range(page.locator(f"{choices} input:checked").count() - 1):
            page.locator(f"{choices} input:checked").last.uncheck()
    page.locator("#vs-count").click()
    assert "of 1 pictures counted as nine" in wait_for(page, "done", "#vs-count-status")
    expected = assistant.ask(
        [draw_nine_balls(224)], page.locator("#vs-count-question textarea").input_value()
    )
    assert page.locator("#vs-count-table [role=gridcell]").last.inner_text().strip() == expected.text
    page.locator("#vs-count-plot svg").wait_for()

    for box in page.locator("#vs-sides input").all():
        box.check()
    page.locator("#vs-count").click()
    wait_for(page, "running", "#vs-count-status")
    page.locator("#vs-count-stop").click()
    assert re.match(r"Stopped after \d of 7 pictures", wait_for(page, "stopped", "#vs-count-status"))


def test_a_running_answer_can_be_stopped_and_others_wait_for_it(
    visit: Visit, endless: str, balls: Path
) -> None:
    first, second = visit(endless), visit(endless)
    for page in (first, second):
        upload(page, balls)
    set_longest(first, 1024)
    set_longest(second, 16)
    ask(first, _QUESTION)
    wait_for(first, "running")
    ask(second, _QUESTION)
    assert wait_for(second, "waiting") == "Waiting: 1 question before yours."
    first.locator("#vs-stop").click()
    said = re.search(r"Stopped: .*? (\d+) tokens? out", wait_for(first, "stopped"))
    assert said and int(said[1]) < 1024
    assert "16 tokens out" in wait_for(second, "done")


def test_who_leaves_holds_up_nobody(visit: Visit, endless: str, balls: Path) -> None:
    leaving, staying = visit(endless), visit(endless)
    for page in (leaving, staying):
        upload(page, balls)
    set_longest(leaving, 1024)
    set_longest(staying, 16)
    ask(leaving, _QUESTION)
    wait_for(leaving, "running")
    ask(staying, _QUESTION)
    wait_for(staying, "waiting")
    start = time.monotonic()
    leaving.close()
    wait_for(staying, "done")
    # 1024 tokens take ten times as long as this, on any machine on which these tests end in time.
    assert time.monotonic() - start < 15
