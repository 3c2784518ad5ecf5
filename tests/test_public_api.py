import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import vlmslice

PACKAGE = Path(vlmslice.__file__).parent
MODULES = sorted(
    ".".join(("vlmslice", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def run_python(code: str) -> str:
    """Runs code in a fresh interpreter, as the order of imports is what is tested."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_all_is_sorted_and_complete() -> None:
    assert vlmslice.__all__ == sorted(vlmslice.__all__)
    public = {
        name
        for name, value in vars(vlmslice).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("vlmslice.")
    }
    assert public == set(vlmslice.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_docstring_and_imports(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__


def test_importing_the_package_registers_its_classes(saved_model: Path) -> None:
    printed = run_python(
        "import vlmslice\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"print(type(AutoModelForImageTextToText.from_pretrained({str(saved_model)!r})).__name__)\n"
        f"print(type(AutoProcessor.from_pretrained({str(saved_model)!r})).__name__)\n"
    )
    assert printed.split() == ["VlmSliceForConditionalGeneration", "VlmSliceProcessor"]


def test_the_planner_imports_only_the_standard_library() -> None:
    for name in ("slicing", "slicing_policies", "errors"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {
            node.module.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
        }
        assert imported <= sys.stdlib_module_names | {"vlmslice"}
