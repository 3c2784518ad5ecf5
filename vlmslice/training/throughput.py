"""How much a step computes: tokens of a batch, and floating-point operations (FLOPs) as torch counts them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from vlmslice.modeling import VlmSliceForConditionalGeneration


def _attention_flops(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(grad_out, query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)


_FORMULAS = flop_registry | {
    # torch has none for its fused attention on the CPU.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of matrix products, convolutions and attention inside of `with`, by torch's formulas.

    All else, such as normalisation and activations, counts as nothing, as is usual. What gradient checkpointing
    computes twice counts twice.

    It differs from `torch.utils.flop_counter.FlopCounterMode` in running every operation as it is. That one takes some
    apart, which changes the rounding of gradients: a run would no longer be resumed bit for bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = _FORMULAS.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            self.num_flops += formula(*args, **kwargs, out_val=out)
        return out


class TokenCounts(NamedTuple):
    """Tokens of a batch without padding: `int64[]` each."""

    visual: torch.Tensor
    text: torch.Tensor


def find_vlm(model: nn.Module) -> VlmSliceForConditionalGeneration | None:
    """The whole model inside of `model`, bare or wrapped (by PEFT, say), or None for the dense stage's."""
    return next((m for m in model.modules() if isinstance(m, VlmSliceForConditionalGeneration)), None)


def count_tokens(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> TokenCounts:
    """Counts what of a batch is real.

    - visual: what the connector makes of the views; for a model without one, as the dense stage's, the patches.
    - text: ids that are neither padding nor placeholders, labelled or not.

    Args:
        model: what a stage trains, or a wrapper of it.
        batch: of a stage's collator.
    """
    vlm = find_vlm(model)
    visual = text = torch.tensor(0)
    sizes = batch.get("target_sizes")
    if sizes is not None:
        visual = (sizes.prod(dim=1) if vlm is None else vlm.tokens_per_view(sizes)).sum()
    ids = batch.get("input_ids")
    if ids is not None:
        mask = batch.get("attention_mask")
        # A mask of other than two dimensions tells which ids see which, not which are padding.
        real = mask != 0 if mask is not None and mask.ndim == 2 else torch.ones_like(ids, dtype=torch.bool)
        if vlm is not None:
            real = real & (ids != vlm.config.image_token_id)
        text = real.sum()
    return TokenCounts(visual, text)


_COUNT_EVERY = 5
"""Intervals. Counting makes a pass a third slower (measured: recipe `nano`, stage `read`, 8 samples, one CPU core)."""


class Throughput:
    """What one process computes between two logs.

    All tokens are counted, FLOPs only in the first batch of every fifth interval: its FLOPs per token are taken for
    those of the batches that follow. Attention makes them grow with the length of a sample, so the share of the peak is
    as rough as samples differ.

    Args:
        model: what is trained.
        counts_flops: False for a compiled model, whose operations cannot be looked at one by one.
    """

    def __init__(self, model: nn.Module, counts_flops: bool = True):
        self._model = model
        self._counts_flops = counts_flops
        self._num_intervals = 0
        self._num_tokens: torch.Tensor | int = 0
        self._counted_tokens: torch.Tensor | int = 1
        self._counted_flops = 0
        self._is_due = True

    def reset(self) -> None:
        """Begins a new interval."""
        self._num_intervals += 1
        self._is_due = self._num_intervals % _COUNT_EVERY == 0
        self._num_tokens = 0

    @contextlib.contextmanager
    def count(self, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Counts `batch`, whose forward and backward pass happens inside of `with`."""
        num_tokens = sum(count_tokens(self._model, batch))
        self._num_tokens = self._num_tokens + num_tokens
        if not self._is_due or not self._counts_flops:
            yield
            return
        self._is_due = False
        with FlopCounter() as counter:
            yield
        self._counted_flops, self._counted_tokens = counter.num_flops, num_tokens

    @property
    def num_tokens(self) -> int:
        """Visual and text tokens since the last `reset`."""
        return int(self._num_tokens)

    @property
    def num_flops(self) -> float:
        """FLOPs since the last `reset`, estimated from those of the batch counted last."""
        return self._counted_flops * self.num_tokens / max(1, int(self._counted_tokens))
