"""Which parts of a model train: frozen and trained by name.

A part is a module of the model, as its parameters name it: `vision_encoder`, `connector`, `language_model`,
`visual_expert`, `cross_attention`, ..., or a piece of one, `vision_encoder.mixer`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn

from vlmslice.errors import suggestion
from vlmslice.training.stage import TrainingError


class PartSize(NamedTuple):
    """Parameters of a part: how many train, of how many in all."""

    num_trained: int
    num_parameters: int


def freeze(model: nn.Module, *frozen: str, but: Collection[str] = ()) -> dict[str, PartSize]:
    """Freezes the parts `frozen` of a model, except for what `but` names; all others train, whatever they did before.

    To keep a language model as it is and train only what was added to it:

        freeze(model, "vision_encoder", "language_model")

    Weights that two parts share (tied embeddings) are frozen with either.

    Args:
        model: the model.
        frozen: names of parts; none lets the whole model train.
        but: names of parts inside these that train nevertheless.

    Returns:
        The size of each part of the model, by name.

    Raises:
        TrainingError: the model has no part of that name; what `but` names is frozen by none of `frozen`.
    """
    modules_frozen = [_find_part(model, name) for name in frozen]
    modules_trained = [_find_part(model, name) for name in but]
    for name in but:
        if not any(name.startswith(f"{part}.") for part in frozen):
            raise TrainingError(
                f"but={name!r} lies in none of the frozen parts ({', '.join(frozen) or 'none'}), so it trains anyway; "
                "leave it out, or freeze what holds it"
            )
    model.requires_grad_(True)
    for module in modules_frozen:
        module.requires_grad_(False)
    for module in modules_trained:
        module.requires_grad_(True)
    return measure_parts(model)


def part_of(parameter_name: str) -> str:
    """The part a parameter belongs to: `connector.layers.0.weight` -> `connector`, also in a model wrapped by PEFT."""
    return parameter_name.removeprefix("base_model.model.").split(".")[0]


def measure_parts(model: nn.Module) -> dict[str, PartSize]:
    """The size of each part of a model, by name. Weights that parts share count for the first that has them."""
    sizes: dict[str, PartSize] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        num_trained, num_parameters = sizes.get(part, PartSize(0, 0))
        sizes[part] = PartSize(
            num_trained + parameter.requires_grad * parameter.numel(), num_parameters + parameter.numel()
        )
    return sizes


def format_parts(sizes: Mapping[str, PartSize]) -> str:
    """One line on what trains: `connector 200k of 200k, language_model 0 of 1.3M`."""
    return ", ".join(
        f"{name} {_short(size.num_trained)} of {_short(size.num_parameters)}" for name, size in sizes.items()
    )


def _short(number: int) -> str:
    if number < 10_000:
        return str(number)
    return f"{number / 1e3:.0f}k" if number < 1e6 else f"{number / 1e6:.1f}M"


def _find_part(model: nn.Module, name: str) -> nn.Module:
    """The module of this name.

    Raises:
        TrainingError: there is none; the model may have been built without it.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    if name not in modules:
        parts = [part for part, _ in model.named_children()]
        # A misspelt piece is compared with the pieces, a misspelt part with the parts.
        known = [path for path in modules if path.count(".") == name.count(".")]
        raise TrainingError(
            f"the model has no part {name!r}, expected one of {', '.join(parts)}, or a piece of one"
            f"{suggestion(name, known)}"
        )
    return modules[name]
