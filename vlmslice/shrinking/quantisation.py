"""Weight-only quantisation: matrices as int8, with one scale for each output channel.

`weight[o, i]` is kept as `round(weight[o, i] / scale[o])`, with `scale[o]` the largest magnitude of the row divided by
127: symmetric, without a zero point (Jacob et al., 2018, https://arxiv.org/abs/1712.05877). Activations stay as they
are. No weight moves by more than half a step, `scale[o] / 2`.

A scale has the 8 significant bits of bf16. The largest weight of a row then still becomes 127, and 127 scales have an
exact fp32 value: what is quantised once stays as it is when it is quantised again.

transformers can quantise with torchao, which works on a CPU, but for the convolutions of our vision encoder, whose
kernels are cut from their matrices as they run (`Int8Tensor` 0.18 has no `view`): a quarter of the bundled model would
stay as it is. So the 60 lines are here, registered with transformers: `from_pretrained` needs no option.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vlmslice.conv_stem import MatrixConv2d
from vlmslice.errors import VlmSliceError, suggestion

QUANT_METHOD = "vlmslice-int8"

PARTS = ("vision_encoder", "connector", "cross_attention", "language_model")
"""Parts of a model whose matrices can be quantised; embeddings stay as they are."""

_LARGEST = 127


class QuantisationError(VlmSliceError, ValueError):
    """A model cannot be quantised as asked."""


def quantise_matrix(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`int8[out, in]` and the scales `bf16[out]` of a matrix `[out, in]`.

    Raises:
        QuantisationError: the matrix has weights that are not finite.
    """
    if not weight.isfinite().all():
        raise QuantisationError(
            f"{int((~weight.isfinite()).sum())} of {weight.numel()} weights are not finite; quantise a model whose "
            "training did not diverge"
        )
    largest = weight.float().abs().amax(dim=1)
    scale = (largest / _LARGEST).to(torch.bfloat16).clamp_min(torch.finfo(torch.bfloat16).tiny)
    steps = (weight.float() / scale.float()[:, None]).round().clamp(-_LARGEST, _LARGEST)
    return steps.to(torch.int8), scale


class _Int8Weight(nn.Module):
    """What the int8 layers share: `weight` is made anew from `weight_int8` and `weight_scale` whenever it is read."""

    weight_int8: torch.Tensor
    weight_scale: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        return self.weight_int8.to(self.weight_scale.dtype) * self.weight_scale[:, None]


class Int8Linear(_Int8Weight, nn.Linear):  # type: ignore[override]  # whose weight can be set
    """`nn.Linear` with an int8 weight. Scaling its outputs is cheaper than scaling its weight, and the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight_int8.to(x.dtype)) * self.weight_scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Int8MatrixConv2d(_Int8Weight, MatrixConv2d):  # type: ignore[override]  # as above
    """`MatrixConv2d` with an int8 weight."""


_INT8: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Int8Linear, MatrixConv2d: Int8MatrixConv2d}


def hold_int8(layer: nn.Module, weight_int8: torch.Tensor, scale: torch.Tensor) -> None:
    """Makes a layer its int8 kind in place, as `torch.nn.utils.parametrize` does: it keeps its name and hooks.

    Args:
        layer: `nn.Linear` or `MatrixConv2d`.
        weight_int8: `int8[out, in]`.
        scale: `[out]`, in the dtype in which `layer.weight` is to be read.
    """
    del layer._parameters["weight"]
    layer.__class__ = _INT8[type(layer)]
    layer.weight_int8 = nn.Parameter(weight_int8, requires_grad=False)
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)


def _hold_plain(layer: _Int8Weight, dtype: torch.dtype) -> None:
    weight = layer.weight.to(dtype)
    del layer._parameters["weight_int8"], layer._parameters["weight_scale"]
    [layer.__class__] = [plain for plain, int8 in _INT8.items() if type(layer) is int8]  # type: ignore[assignment]
    layer.register_parameter("weight", nn.Parameter(weight))


def find_quantisable(model: nn.Module, parts: Sequence[str]) -> dict[str, nn.Module]:
    """The layers of some `PARTS` that have an int8 kind, by name; the one that spells the answer is left out."""
    spelling = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name: module
        for name, module in model.named_modules()
        if name.partition(".")[0] in parts and type(module) in _INT8 and module is not spelling
    }


@register_quantization_config(QUANT_METHOD)
class Int8Config(QuantizationConfigMixin):
    """The entry `quantization_config` of a quantised model: the `PARTS` whose matrices are int8."""

    def __init__(self, parts: Sequence[str] = PARTS, quant_method: str = QUANT_METHOD):
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' enum holds only its own
        self.parts = list(parts)


@register_quantizer(QUANT_METHOD)
class Int8Quantizer(HfQuantizer):
    """Lets `from_pretrained` and `save_pretrained` know int8 layers; `model.dequantize()` makes them plain again."""

    quantization_config: Int8Config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            raise QuantisationError(
                "got a quantization_config for a model that is not quantised; expected one that `vlmslice quantise` "
                "wrote; load the model without, and call vlmslice.shrinking.quantisation.quantise"
            )
        for layer in find_quantisable(model, self.quantization_config.parts).values():
            weight = layer.weight
            assert isinstance(weight, torch.Tensor)
            hold_int8(layer, torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight[:, 0]))
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for layer in [module for module in model.modules() if isinstance(module, _Int8Weight)]:
            _hold_plain(layer, dtype or layer.weight_scale.dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


@torch.no_grad()
def quantise(model: PreTrainedModel, parts: Sequence[str] = PARTS) -> PreTrainedModel:
    """Makes the matrices of some `PARTS` int8, in place; the model then answers as it is, and can be saved.

    Raises:
        QuantisationError: the model is quantised already, there is no such part, or a weight is not finite.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise QuantisationError(
            "the model is quantised already, expected one that is not; start from the original"
        )
    for part in parts:
        if part not in PARTS:
            raise QuantisationError(
                f"there is no part {part!r}{suggestion(part, PARTS)}; expected some of {', '.join(PARTS)}"
            )
    layers = find_quantisable(model, parts)
    if not layers:
        raise QuantisationError(
            f"{' and '.join(parts) or 'no part'} of this model has no matrices, expected some; name other parts"
        )
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        try:
            weight_int8, scale = quantise_matrix(weight)
        except QuantisationError as error:
            raise QuantisationError(f"{name}: {error}") from error
        hold_int8(layer, weight_int8, scale.to(weight.dtype))
    config = Int8Config([part for part in PARTS if part in parts])
    model.config.quantization_config = config
    quantizer = Int8Quantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer  # type: ignore[assignment]  # where transformers keeps it
    quantizer.postprocess_model(model)
    return model
