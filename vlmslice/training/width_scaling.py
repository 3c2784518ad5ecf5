"""Learning rates found on a narrow model, used on a wide one: the maximal update parametrisation.

A rate that suits a width of 64 makes a model of width 256 diverge: each weight of a matrix moves as far as before, but
four times as many of them add up in every output. Under the rules of muP (Yang et al., 2022,
https://arxiv.org/abs/2203.03466, table 3) what a step changes in the activations is alike at all widths, and so is the
best learning rate. MiniCPM (Hu et al., 2024, https://arxiv.org/abs/2404.06395, table 7) was tuned on small models so.

Everything is relative to a *base*: the same model at the width at which the learning rate was tuned. A weight's *ratio*
is how many times more inputs it has than in the base, the *root mean square* (RMS) that of its initial values:

| weight | initial RMS, of the base's | rate with AdamW | rate with Muon |
|---|---|---|---|
| hidden matrix: inputs and outputs grow | 1 / sqrt(ratio) | 1 / ratio | 1 / sqrt(ratio) |
| output matrix: inputs grow, outputs do not | 1 / ratio | 1 / ratio | 1 / ratio |
| input matrix, embedding: outputs grow | 1 | 1 | 1 |
| vector: bias, gain, position, query | as it is | 1 | |
| gain before a head tied to the embedding | 1 / ratio | 1 / ratio | |

*A tied head* cannot be both an embedding, which keeps its size, and an output matrix, which does not; muP divides its
logits by the ratio (MiniCPM's `dim_model_base`, Granite's `logits_scaling`). Here that divisor is the initial value of
the gain of the norm in front of the head. A gain `g / ratio` that learns at `rate / ratio` under AdamW is at every step
1 / ratio of the gain `g` that learns at `rate`, so it is the same model; and no config has to carry a multiplier.

*Attention* keeps its scale, 1 / sqrt(head width), because heads stay as wide as they are and grow in number.

*Muon*, as `optimizer` runs it (`match_rms_adamw`), moves every weight by 0.2 x rate, as AdamW does, but in all
directions of a matrix evenly: the largest singular value of a step is 0.2 x rate x sqrt(max(inputs, outputs)), and it
should grow like sqrt(outputs / inputs) (Yang et al., 2023, https://arxiv.org/abs/2310.17813). For hidden matrices that
makes 1 / sqrt(ratio). AdamW's steps point in few directions, so that theirs grows like the width itself.

Depth is not scaled: base and model have the same layers. MiniCPM's scale of the residual branches (`scale_depth` /
sqrt(layers)) depends on the depth alone, and the vision encoder has its like (see `vision_encoder`). Weight decay is
multiplied by the rate, in torch as in the paper, so wide matrices decay more slowly.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import TypeVar, cast

import torch
from timm.layers import LayerScale
from timm.models.naflexvit import NaFlexEmbeds, NaFlexVitCfg
from torch import nn
from transformers import PreTrainedConfig

from vlmslice.config import VlmSliceConfig
from vlmslice.connectors import BlockProjection, CrossAttention, Resampler, TokenHead
from vlmslice.cross_attention import GatedCrossAttention
from vlmslice.errors import VlmSliceError
from vlmslice.first_fit import FirstFit
from vlmslice.modeling import CanvasPosition
from vlmslice.training.optimizer import find_matrices
from vlmslice.vision_encoder import VlmSliceVisionConfig

Config = TypeVar("Config", bound=PreTrainedConfig)

# Modules whose own parameters (not those of modules inside them) are vectors and tables of vectors.
_HOLDERS_OF_VECTORS = (
    BlockProjection,
    CanvasPosition,
    CrossAttention,
    FirstFit,
    GatedCrossAttention,
    LayerScale,
    NaFlexEmbeds,
    Resampler,
    TokenHead,
)


class WidthScalingError(VlmSliceError, ValueError):
    """A model cannot be scaled from its base."""


def widen(config: Config, factor: float) -> Config:
    """`config` with all widths and numbers of heads multiplied by `factor`; heads keep their width.

    `widen(config, 0.25)` describes the base at which to look for a learning rate.

    Args:
        config: of a vision encoder, a language model or the whole model.

    Raises:
        WidthScalingError: a width or a number of heads would be no whole number, or the vision encoder is one that
            timm names, whose width its name fixes.
    """
    config = copy.deepcopy(config)

    def grow(value: int, name: str) -> int:
        grown = value * factor
        if grown < 1 or grown != int(grown):
            raise WidthScalingError(
                f"{name} is {value}, and {factor} of it is {grown}, expected a whole number; choose another factor, or "
                f"another {name}"
            )
        return int(grown)

    if isinstance(config, VlmSliceConfig):
        config.vision_config = widen(config.vision_config, factor)
        config.text_config = widen(config.text_config, factor)
        config.connector_heads = grow(config.connector_heads, "connector_heads")
        return cast(Config, config)
    if isinstance(config, VlmSliceVisionConfig):
        if config.architecture != "naflexvit":
            raise WidthScalingError(
                f"vision architecture {config.architecture!r} has the width that timm gives it, expected the generic "
                "'naflexvit'; scale the other parts, or describe the encoder by its sizes"
            )
        kwargs = config.timm_kwargs or {}
        heads = grow(kwargs.get("num_heads", NaFlexVitCfg().num_heads), "num_heads")
        config.timm_kwargs = kwargs | {"num_heads": heads}
        config.hidden_size = grow(config.hidden_size, "hidden_size")
        return cast(Config, config)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, grow(getattr(config, name), name))
    return config


@torch.no_grad()
def scale_width(model: nn.Module, base: nn.Module) -> None:
    """Gives the weights of a fresh model the sizes that muP asks for, relative to a fresh model of base width.

    A model of base width keeps its weights bit for bit.

    Args:
        model: as its class initialises it. Initialised by whatever law, each matrix is multiplied so that its RMS is
            the one in the table at the top of this module.
        base: the same model at base width, as its class initialises it; see `widen`.

    Raises:
        WidthScalingError: the two differ in more than widths, heads differ in width, or a parameter is of no kind that
            this module knows.
    """
    base_weights = dict(base.named_parameters())
    for name, weight, (in_ratio, out_ratio) in _matrices(model, base):
        if in_ratio == out_ratio == 1:
            continue
        growth = in_ratio ** -(1.0 if out_ratio == 1 else 0.5)
        rms = _rms(weight)
        if rms:  # zero stays zero
            weight.mul_(growth * _rms(base_weights[name]) / rms)
    for name, norm, ratio in _norms_before_tied_heads(model, base):
        if not bool((cast(torch.Tensor, norm.weight) == 1).all()):
            raise WidthScalingError(
                f"the gain of {name!r}, before a tied head, is not 1, expected a fresh model whose norm multiplies by "
                "its weight; scale a model once only, or untie its head (tie_word_embeddings=False)"
            )
        for parameter in norm.parameters():
            parameter.div_(ratio)


def learning_rate_factors(
    model: nn.Module,
    base: nn.Module,
    muon: tuple[str, ...] = (),
    learning_rates: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Factors on the learning rate of the base, for `Stage.learning_rates`.

    Looks at shapes alone, so both models may be on the device `meta`.

    Args:
        model, base: as in `scale_width`.
        muon: as `Stage.muon`.
        learning_rates: factors by prefix that the stage has anyway; they are multiplied in.

    Returns:
        Full parameter name -> factor, for those that are not 1; then `learning_rates`, for the rest.

    Raises:
        WidthScalingError: as in `scale_width`.
    """
    learning_rates = dict(learning_rates or {})
    with_muon = {id(weight) for weight in find_matrices(model, muon)} if muon else set()
    factors = {}
    for name, weight, (in_ratio, out_ratio) in _matrices(model, base):
        factors[name] = 1 / in_ratio
        if id(weight) in with_muon:
            longest = max(weight.shape) / max(base.get_parameter(name).shape)
            factors[name] = math.sqrt(out_ratio / in_ratio / longest)
    for norm_name, norm, ratio in _norms_before_tied_heads(model, base):
        factors |= {f"{norm_name}.{local_name}": 1 / ratio for local_name, _ in norm.named_parameters()}
    # `Stage` matches beginnings of names, the first that fits: a name comes before those that it begins with.
    scaled = [name for name, factor in factors.items() if factor != 1]
    shadowed = [
        name for name, _ in model.named_parameters() if name not in scaled and name.startswith(tuple(scaled))
    ]
    return {
        name: factors.get(name, 1.0)
        * next((f for prefix, f in learning_rates.items() if name.startswith(prefix)), 1.0)
        for name in sorted([*scaled, *shadowed], key=len, reverse=True)
    } | learning_rates


def _rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _matrices(model: nn.Module, base: nn.Module) -> Iterator[tuple[str, nn.Parameter, tuple[float, float]]]:
    """Name, weight and growth of inputs and outputs of every matrix and embedding; the rest are vectors."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    base_shapes = {name: parameter.shape for name, parameter in base.named_parameters()}
    if set(names.values()) != base_shapes.keys():
        different = sorted(set(names.values()) ^ base_shapes.keys())
        raise WidthScalingError(
            f"{len(different)} parameters are in one of model and base only, the first {different[0]!r}; expected "
            "models that differ in width alone: build both from one config, see `widen`"
        )
    _check_head_widths(model, base)
    seen = set()
    embeddings = _embedding_weights(model)
    for module_name, module in model.named_modules():
        for local_name, parameter in module.named_parameters(recurse=False):
            name = names[id(parameter)]
            shape, base_shape = parameter.shape, base_shapes[name]
            if len(shape) != len(base_shape):
                raise WidthScalingError(
                    f"{name!r} has shape {tuple(shape)}, in the base {tuple(base_shape)}; build both from one config"
                )
            is_weight = local_name == "weight"
            is_tied_head = isinstance(module, nn.Linear) and id(parameter) in embeddings
            if id(parameter) in seen or is_tied_head:
                continue
            if isinstance(module, nn.Linear) and is_weight:
                in_ratio, out_ratio = shape[1] / base_shape[1], shape[0] / base_shape[0]
            elif isinstance(module, nn.Embedding) and is_weight:
                if shape[0] != base_shape[0]:
                    raise WidthScalingError(
                        f"{name!r} has {shape[0]} rows, in the base {base_shape[0]}; give both one vocabulary"
                    )
                in_ratio, out_ratio = 1.0, shape[1] / base_shape[1]
            elif _holds_vectors(module, parameter):
                continue
            else:
                raise WidthScalingError(
                    f"parameter {local_name!r} of shape {tuple(shape)} belongs to the {type(module).__name__} "
                    f"{module_name!r}, and it is not known how that scales with its width; expected linear layers, "
                    "embeddings, norms and the modules of vlmslice; leave it out, or add its kind to "
                    "vlmslice/training/width_scaling.py"
                )
            seen.add(id(parameter))
            yield name, parameter, (in_ratio, out_ratio)


def _holds_vectors(module: nn.Module, parameter: nn.Parameter) -> bool:
    if isinstance(module, _HOLDERS_OF_VECTORS):
        return True
    # Every language model of transformers brings a norm of its own.
    return parameter.ndim == 1 and (isinstance(module, nn.Linear) or "Norm" in type(module).__name__)


def _check_head_widths(model: nn.Module, base: nn.Module) -> None:
    modules = dict(base.named_modules())
    for name, module in model.named_modules():
        width = getattr(module, "head_dim", None)
        base_width = getattr(modules.get(name), "head_dim", None)
        if width != base_width:
            raise WidthScalingError(
                f"the heads of {name!r} are {width} wide, in the base {base_width}; keep their width and change their "
                "number, as `widen` does"
            )


def _embedding_weights(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _norms_before_tied_heads(model: nn.Module, base: nn.Module) -> Iterator[tuple[str, nn.Module, float]]:
    """Name and module of the norms before heads that share their weight with an embedding, and their growth."""
    embeddings = _embedding_weights(model)
    for name, head in model.named_modules():
        if not isinstance(head, nn.Linear) or id(head.weight) not in embeddings:
            continue
        # As Llama and its many relatives in transformers have it: `lm_head` beside `model.norm`.
        norm_name = ".".join(filter(None, [name.rpartition(".")[0], "model.norm"]))
        try:
            norm = model.get_submodule(norm_name)
        except AttributeError:
            raise WidthScalingError(
                f"{name!r} shares its weight with an embedding, and there is no {norm_name!r}, expected a norm whose "
                "gain can hold the divisor of the logits; untie them (tie_word_embeddings=False)"
            ) from None
        yield norm_name, norm, head.in_features / cast(nn.Linear, base.get_submodule(name)).in_features
