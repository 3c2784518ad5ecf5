"""Where a model lies, and what its config says about slicing, without loading it (nor torch)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmslice.errors import VlmSliceError
from vlmslice.slicing import SlicingConfig

BUNDLED_MODEL = Path(__file__).parent / "models" / "nano"


class ModelError(VlmSliceError, ValueError):
    """A model folder is missing, incomplete or holds another kind of model."""


def find_model(folder: str | Path | None = None) -> Path:
    """The folder of a saved model, by default of the bundled one, after a look at its `config.json`.

    Raises:
        ModelError: There is no vlmslice model.
    """
    path = BUNDLED_MODEL if folder is None else Path(folder)
    _read_config(path)
    return path


def find_weights(folder: Path) -> list[Path]:
    """The weight files of a model folder.

    Raises:
        ModelError: There are none; weights in other formats than safetensors do not count, as they may run code.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"model {str(folder)!r} has no weights; expected model.safetensors in it; train it, or save it again with "
            "save_pretrained"
        )
    return weights


def read_slicing_config(folder: str | Path | None = None) -> SlicingConfig:
    """How a saved model slices, by default the bundled one: enough to plan images for it."""
    path = find_model(folder)
    return SlicingConfig.from_dict(_read_config(path)["slicing"])


def read_max_length(folder: str | Path | None = None) -> int | None:
    """Most ids that a saved model takes, prompt and answer together; None if its config does not tell."""
    return _read_config(find_model(folder)).get("text_config", {}).get("max_position_embeddings")


def _read_config(path: Path) -> dict[str, Any]:
    expected = "expected a folder with a vlmslice model (config.json, model.safetensors, processor files)"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(
            f"model {str(path)!r} has no readable config.json: {reason}; {expected}; check the path"
        ) from error
    if model_type != "vlmslice":
        raise ModelError(
            f"model {str(path)!r} is of type {model_type!r}; {expected}; "
            "`vlmslice compose` builds one around another language model"
        )
    return config
