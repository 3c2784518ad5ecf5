import re
import threading
from types import SimpleNamespace

import gradio as gr
import pytest
from gradio.data_classes import ImageData
from PIL import Image
from tiny_models import tiny_model, tiny_processor

from vlmslice import Assistant
from vlmslice.page import examples as examples_module
from vlmslice.page.examples import draw_examples
from vlmslice.page.layout import CSS, _Turns, build_page, status_markup, theme
from vlmslice.page.line import Line
from vlmslice.slicing_policies import POLICIES


@pytest.fixture(scope="module")
def page() -> gr.Blocks:
    return build_page(Assistant(tiny_model(), tiny_processor()), Line(), draw_examples())


def component(page: gr.Blocks, elem_id: str):
    [found] = [block for block in page.blocks.values() if getattr(block, "elem_id", None) == elem_id]
    return found


def test_settings_are_those_of_the_model(page: gr.Blocks) -> None:
    config = tiny_processor().image_processor.slicing_config
    policy, budget = component(page, "vs-policy"), component(page, "vs-budget")
    assert [name for name, _ in policy.choices] == list(POLICIES)
    assert (policy.value, budget.value, budget.maximum) == (config.policy, 64, 64)
    assert 0 < budget.minimum == budget.step
    assert [name for name, _ in component(page, "vs-policies").choices] == list(POLICIES)


def test_uploads_reach_the_loader_as_they_are(page: gr.Blocks) -> None:
    """Pillow is not asked before `load_image`: a file that is no picture gets a sentence, not an exception."""
    image = component(page, "vs-image")
    assert image.preprocess(ImageData(path="/nowhere/note.png", orig_name="note.png")) == "/nowhere/note.png"
    assert image.preprocess(None) is None


def test_theme_and_style_fetch_nothing() -> None:
    """That the page as a whole does not either is for `tests/browser`."""
    theme_ = theme()
    assert theme_._stylesheets == [] and theme_._font_css == []
    assert not re.search(r"https?:|@import|url\(", CSS.read_text())


def test_no_handler_is_offered_as_an_interface(page: gr.Blocks) -> None:
    visibilities = {
        fn.api_visibility for fn in page.fns.values() if not any("unload" in t for t in fn.targets)
    }
    assert visibilities == {"private"}


def test_an_example_loads_with_a_click(page: gr.Blocks) -> None:
    examples = draw_examples()
    names = [example.name for example in examples]
    buttons = [
        block
        for block in page.blocks.values()
        if "vs-example" in (getattr(block, "elem_classes", None) or [])
    ]
    assert [button.value for button in buttons] == names
    for button, example in zip(buttons, examples, strict=True):
        [fn] = [fn.fn for fn in page.fns.values() if (button._id, "click") in fn.targets]
        image, question = fn()
        assert (image.tobytes(), question) == (example.image.tobytes(), example.question)


def test_examples_differ_in_shape_and_are_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = draw_examples()
    assert len({example.image.size for example in examples}) == len(examples) == 5
    assert all(isinstance(example.image, Image.Image) and example.question for example in examples)
    again = draw_examples()
    assert [e.image.tobytes() for e in examples] == [e.image.tobytes() for e in again]
    monkeypatch.setattr(examples_module, "matplotlib_font_dir", lambda: None)
    assert [example.name for example in draw_examples()] == ["Nine balls"]


def test_stop_is_for_the_own_tab_and_task() -> None:
    stopped: list[str] = []
    turns = _Turns()
    for session, task in (("a", "ask"), ("a", "count"), ("b", "ask")):
        name = f"{session} {task}"
        turns.put(session, task, SimpleNamespace(stop=lambda name=name: stopped.append(name)))  # type: ignore[arg-type]
    turns.stop("a", "ask")
    turns.stop("a", "ask")
    turns.stop("nobody", "ask")
    assert stopped == ["a ask"]


def test_a_status_is_text_and_no_markup() -> None:
    assert "&lt;script&gt;" in status_markup("<script>", "error")
    assert 'role="alert"' in status_markup("no", "error") and 'role="status"' in status_markup("yes", "done")


def test_building_leaves_no_threads_and_no_files(page: gr.Blocks) -> None:
    assert not [
        thread for thread in threading.enumerate() if "analytics" in thread.name or "version" in thread.name
    ]
    assert not CSS.with_name("layout.pyi").exists()
