import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path

import pytest
from conftest import Vlmslice, assert_user_error
from packaging.requirements import Requirement

from vlmslice.page.server import INSTALL_COMMANDS

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())


class TestWithoutGradio:
    def test_one_sentence_with_the_two_commands(
        self, vlmslice_command: Vlmslice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "gradio", None)
        result = vlmslice_command("demo")
        assert_user_error(result, "the page needs gradio", *INSTALL_COMMANDS)

    def test_what_gradio_needs_is_named(
        self, vlmslice_command: Vlmslice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "gradio"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "fastapi", None)
        assert_user_error(vlmslice_command("demo"), "the page needs fastapi", *INSTALL_COMMANDS)


def test_the_extra_is_what_gradio_needs_but_for_pillow() -> None:
    """And wherever gradio is installed, it is the same release."""
    needed = [Requirement(line) for line in metadata.requires("gradio") or []]
    needed = [r for r in needed if not (r.marker and "extra" in str(r.marker)) and r.name != "pillow"]
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["demo"]
    ours = {Requirement(line) for line in extra}
    assert ours == {*needed, Requirement("matplotlib>=3.11")}
    release = f"gradio=={metadata.version('gradio')}"
    assert INSTALL_COMMANDS[1].endswith(release)
    for file in ("Makefile", "pyproject.toml", "docs/page.md", "vlmslice/cli.py"):
        assert set(re.findall(r"gradio==[\w.]+", (ROOT / file).read_text())) == {release}, file


def test_a_taken_port_is_said_before_the_model_is_loaded(vlmslice_command: Vlmslice, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = vlmslice_command("demo", "--port", port, "--model", tmp_path / "missing", "--no-browser")
    assert_user_error(result, f"127.0.0.1 port {port}", "choose another with --port")


def test_a_missing_model(vlmslice_command: Vlmslice, tmp_path: Path) -> None:
    result = vlmslice_command("demo", "--port", 0, "--model", tmp_path / "missing", "--no-browser")
    assert result.code == 2 and "has no readable config.json" in result.err.splitlines()[-1]


@pytest.mark.slow
def test_serves_until_ctrl_c(saved_model: Path, tmp_path: Path) -> None:
    """Behind a proxy that leads nowhere, and what was uploaded is gone afterwards."""
    environment = os.environ | {
        "TMPDIR": str(tmp_path),
        "HTTP_PROXY": "http://127.0.0.1:9",
        "PYTHONUNBUFFERED": "1",
    }
    command = "from vlmslice_command import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", command, "demo", "--model", saved_model, "--port", "0", "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
        # In the background of a shell, Ctrl-C is ignored, and so it is in what is started there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert address, process.communicate()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(address[0], timeout=60) as response:
            assert response.status == 200 and b"vlmslice" in response.read()
        # Files of the machine that nobody uploaded are not served.
        with pytest.raises(urllib.error.HTTPError, match="403|404"):
            opener.open(f"{address[0]}gradio_api/file={ROOT / 'pyproject.toml'}", timeout=60)
        assert list(tmp_path.glob("vlmslice-demo-*"))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err and "loading the model" in err
    assert not list(tmp_path.glob("vlmslice-demo-*"))
