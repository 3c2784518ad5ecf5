"""Starts the page on this machine and keeps it up until someone ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlmslice.errors import VlmSliceError

INSTALL_COMMANDS = ("pip install 'vlmslice[demo]'", "pip install --no-deps gradio==6.31.0")
_MAX_UPLOAD_BYTES = 128 * 2**20  # as `ImageLimits.max_bytes`


class PageError(VlmSliceError):
    """The page cannot be served."""


def serve_page(
    model: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = True,
    note: Callable[[str], None] = print,
    announce: Callable[[str], None] = print,
) -> None:
    """Loads the model, serves the page, and returns once the process is told to end (Ctrl-C or SIGTERM).

    Nothing but the page is served, to nobody but `host`; gradio's telemetry, sharing and fonts are off. Uploads lie in
    a temporary folder that is gone afterwards.

    Args:
        model: Folder of a saved model, by default the bundled one.
        host: Address to listen at; `127.0.0.1` is this machine only.
        port: Of `host`; 0 takes any that is free.
        open_browser: Whether to open the page in the browser of this machine.
        note: Told how the start goes.
        announce: Told the address, once the page answers.

    Raises:
        PageError: gradio or what it needs is not installed, or the port is taken.
        ModelError: The folder holds no complete vlmslice model.
    """
    with tempfile.TemporaryDirectory(prefix="vlmslice-demo-") as uploads, _ended_by_signal() as ended:
        import_gradio(uploads)
        port = _free_port(host, port)  # before the seconds that the model takes

        from transformers.utils.logging import disable_progress_bar

        from vlmslice.inference import Assistant
        from vlmslice.page.examples import draw_examples
        from vlmslice.page.layout import CSS, build_page, theme
        from vlmslice.page.line import Line

        disable_progress_bar()
        start = time.perf_counter()
        note("loading the model ...")
        assistant = Assistant.from_pretrained(model)
        note(f"model {assistant.model.name_or_path} loaded in {time.perf_counter() - start:.1f} s")
        line = Line()
        page = build_page(assistant, line, draw_examples())
        try:
            _, url, _ = page.queue().launch(
                server_name=host,
                server_port=port,
                share=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
                max_file_size=_MAX_UPLOAD_BYTES,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                theme=theme(),
                css_paths=CSS,
            )
            announce(f"the page is at {url} (Ctrl-C ends it)")
            if open_browser:
                webbrowser.open(url)
            ended.wait()
            note("ending ...")
        finally:
            line.close()
            page.close(verbose=False)


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, within the block; outside of the main thread nothing sets it."""
    ended = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield ended
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: ended.set()) for number in numbers]
    try:
        yield ended
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def import_gradio(uploads: str | None = None) -> Any:
    """The module, which then tells nobody that it is used, and keeps uploads in a folder.

    Raises:
        PageError: gradio or what it needs is not installed.
    """
    # Read when gradio is imported or launched.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if uploads is not None:
        os.environ["GRADIO_TEMP_DIR"] = uploads
    # A proxy, if one is set, has no way to this machine, where gradio looks whether the page answers.
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [part for part in os.environ.get(name, "").split(",") if part]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))
    try:
        import gradio
    except ImportError as error:
        raise PageError(
            f"the page needs {error.name or 'gradio'}, which is not installed; run {INSTALL_COMMANDS[0]} and then "
            f"{INSTALL_COMMANDS[1]} (gradio still asks for a Pillow older than this package's)"
        ) from error
    return gradio


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0.

    Raises:
        PageError: Nothing can listen there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            return listener.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PageError(
            f"cannot listen at {host} port {port}: {reason}; choose another with --port, or 0 for any that is free"
        ) from error
