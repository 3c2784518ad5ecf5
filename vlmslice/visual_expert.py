"""The visual expert: weights of their own for visual tokens inside the layers of a language model.

Legend: B samples, L ids of the prompt, E width of a projection or MLP.

In chosen layers every linear layer of the attention (queries, keys, values, output) and the MLP have a twin. Visual
tokens go through the twins, all else through the language model's own; both meet in one attention (CogVLM, Wang et al.,
2023, https://arxiv.org/abs/2311.03079). The twins start as copies, so a model begins as the one without them. If only
they are trained, text alone is answered as before, bit for bit, however long they are trained.

A token goes through one of the two only, so the experts cost memory but no computation.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from vlmslice.config import VlmSliceConfig
from vlmslice.cross_attention import find_decoder_layers


class _Division(NamedTuple):
    """Positions of a batch, flattened: those of text, those of visual tokens, and `int64[B, L]` back to their order."""

    text: torch.Tensor
    visual: torch.Tensor
    back_BL: torch.Tensor


class VisualExpertLayers(nn.Module):
    """Experts in every `visual_expert_interval`-th layer of a language model.

    The language model's modules are reached by hooks, so that its weights keep their names. `divide` must be called
    before each run of the language model.
    """

    def __init__(self, config: VlmSliceConfig, language_model: PreTrainedModel):
        """Copies the weights that `language_model` has now.

        Raises:
            ValueError: the layers are not of the usual kind, or fewer than the interval.
        """
        super().__init__()
        decoder_layers = find_decoder_layers(language_model)
        interval = config.visual_expert_interval
        if not 1 <= interval <= len(decoder_layers):
            raise ValueError(
                f"visual_expert_interval is {interval}, expected 1 to the {len(decoder_layers)} layers of the language "
                "model, or 0 for no visual expert"
            )
        self.chosen = range(interval - 1, len(decoder_layers), interval)
        # In a plain list, as they are parts of the language model.
        self._originals = [_find_originals(decoder_layers[index]) for index in self.chosen]
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: copy.deepcopy(original) for name, original in originals.items()})
            for originals in self._originals
        ).requires_grad_(True)
        self._division: _Division | None = None
        self._seen: dict[tuple[int, str], torch.Tensor] = {}
        for number, originals in enumerate(self._originals):
            for name, original in originals.items():
                original.register_forward_pre_hook(partial(self._take_visual, number, name))
                original.register_forward_hook(partial(self._put_back, number, name))

    def reset_parameters(self) -> None:
        """Copies the weights of the language model again."""
        for experts, originals in zip(self.layers, self._originals, strict=True):
            for name, original in originals.items():
                values = dict(original.named_parameters())
                for key, parameter in experts[name].named_parameters():  # type: ignore[index]
                    init.copy_(parameter, values[key])

    def divide(self, is_visual_BL: torch.Tensor | None) -> None:
        """Sets which positions go through the experts from now on: none, with None.

        It stays until the next call: gradient checkpointing runs the layers again in the backward pass.

        Args:
            is_visual_BL: `bool[B, L]`, True where a visual token stands.
        """
        self._seen.clear()
        self._division = None
        if is_visual_BL is not None:
            is_visual = is_visual_BL.flatten()
            text, visual = (~is_visual).nonzero()[:, 0], is_visual.nonzero()[:, 0]
            back_BL = torch.cat([text, visual]).argsort().view(is_visual_BL.shape)
            self._division = _Division(text, visual, back_BL)

    def _take_visual(self, number: int, name: str, module: nn.Module, args: tuple) -> tuple | None:
        """Runs the expert on visual tokens; to the language model's own module it leaves the others."""
        if self._division is None:
            return None
        positions_NE = args[0].flatten(0, 1)
        expert = self.layers[number][name]  # type: ignore[index]
        self._seen[number, name] = expert(positions_NE[None, self._division.visual])[0]
        return (positions_NE[None, self._division.text], *args[1:])

    def _put_back(
        self, number: int, name: str, module: nn.Module, args: tuple, output: torch.Tensor
    ) -> torch.Tensor | None:
        if self._division is None:
            return None
        return torch.cat([output[0], self._seen.pop((number, name))])[self._division.back_BL]


def _find_originals(layer: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a decoder layer's attention, and its MLP, by name.

    Raises:
        ValueError: it has none, as GPT-2.
    """
    children = dict(layer.named_children())
    attention = children.get("self_attn", nn.Module())
    originals = {name: child for name, child in attention.named_children() if isinstance(child, nn.Linear)}
    if not originals or "mlp" not in children:
        raise ValueError(
            f"{type(layer).__name__} holds {', '.join(children)}, expected self_attn with linear layers (q_proj, "
            "k_proj, ...) and mlp, as in Llama, Qwen or Gemma; set visual_expert_interval=0 for this language model"
        )
    return originals | {"mlp": children["mlp"]}
