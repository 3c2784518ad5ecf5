"""The connector `cross_attention`: language layers look at visual tokens that do not stand in the prompt.

Legend: B samples, L text tokens, M visual tokens of a sample (padded), H heads, K head width, E text width.

In front of chosen layers of the language model, every text token attends over all visual tokens of its sample, and
what it finds is added to it through a gate (Alayrac et al., 2022, https://arxiv.org/abs/2204.14198; CogAgent, Hong et
al., 2023, https://arxiv.org/abs/2312.08914). A visual token costs two small projections in each of these layers
instead of the whole layer, and the prompt holds one placeholder for each image, so thousands of tokens stay cheap.

Where an answer points at one object after the other, row by row (see `pointing`), every second head sees only what
lies ahead of the last point. So for each point the same look-up will do, "the first that fits", and nothing is pointed
at twice. (Inhibition of return; Itti and Koch, 2001, "Computational modelling of visual attention".) Some layers have a
head made for this look-up, see `first_fit`. What is read as text can be held back likewise, see `coverage`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from vlmslice.attention_guide import guided_layers
from vlmslice.config import VlmSliceConfig
from vlmslice.coverage import Coverage
from vlmslice.first_fit import BEYOND, FirstFit, PointingOrder, order_for_pointing
from vlmslice.position_embedding import sincos_2d


class VisualMemory(NamedTuple):
    """What the layers look at; computed once for a prompt and kept while its answer is generated.

    Attributes:
        keys, values: `[B, H, M + 1, K]` for every looking layer. The last is a place where nothing is.
        mask: `bool[B, 1, 1, M + 1]`, False at padding; after `without_passed`, `bool[B, H, L, M + 1]`.
        places: `int64[B, M + 1, 2]` row and column on the canvas, in blocks of patches (one block is one token of a
            slice); beyond all places for padding and for the last.
        order: in which the heads of first fit go through the tokens; None if there are none.
        fitting: keys and values `[B, N, K]` of these heads, by the number of the looking layer.
        samples: of packed rows, `int64[B, M + 1]`: the sample of its row that each token belongs to.
        coverage: what the answers have read so far; changed by each step of generation. None if nothing is held back.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    mask: torch.Tensor
    places: torch.Tensor
    order: PointingOrder | None = None
    fitting: Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    samples: torch.Tensor | None = None
    coverage: Coverage | None = None

    def of_samples(self, samples_BL: torch.Tensor) -> VisualMemory:
        """The same, masked at each position for the tokens of other samples than its own."""
        assert self.samples is not None
        is_own_BLM = self.samples[:, None] == samples_BL[:, :, None]
        is_own_BLM[..., -1] = True  # the place where nothing is
        return self._replace(mask=self.mask & is_own_BLM[:, None])

    def without_passed(self, points_BL3: torch.Tensor) -> VisualMemory:
        """The same, masked in even heads for what does not lie ahead of the last point; rows and columns in blocks."""
        rows_B1M, cols_B1M = self.places[:, None].unbind(-1)
        last_rows_BL1, last_cols_BL1, _ = points_BL3[:, :, None].unbind(-1)
        ahead_BLM = (rows_B1M > last_rows_BL1) | ((rows_B1M == last_rows_BL1) & (cols_B1M > last_cols_BL1))
        sees_all_H = torch.arange(self.keys[0].shape[1], device=self.mask.device) % 2 == 1
        return self._replace(mask=self.mask & (ahead_BLM[:, None] | sees_all_H[None, :, None, None]))


class GatedCrossAttention(nn.Module):
    """What one layer of the language model sees of the images: `hidden + tanh(gate) * attention`."""

    def __init__(self, text_dim: int, num_heads: int, head_dim: int, gate: float, scale: float = 1.0):
        """`scale`: root mean square of the visual tokens; keys and values start at about 1 whatever it is."""
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        inner = num_heads * head_dim
        self.norm = nn.RMSNorm(text_dim, eps=1e-6)
        self.query = nn.Linear(text_dim, inner, bias=False)
        self.key = nn.Linear(text_dim, inner, bias=False)
        self.value = nn.Linear(text_dim, inner, bias=False)
        self.output = nn.Linear(inner, text_dim, bias=False)
        self.gate = nn.Parameter(torch.empty(()))
        self._initial_gate, self._scale = gate, scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.query, self.key, self.value, self.output):
            scale = self._scale if linear in (self.key, self.value) else 1.0
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5 / scale)
        nn.init.ones_(self.norm.weight)
        nn.init.constant_(self.gate, self._initial_gate)

    def project(self, tokens_BME: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, H, M + 1, K]`: of the tokens, and zeros, on which nothing is found."""
        keys, values = (
            F.pad(self._heads(layer(tokens_BME)), (0, 0, 0, 1)) for layer in (self.key, self.value)
        )
        return keys, values

    def forward(
        self,
        hidden_BLE: torch.Tensor,
        keys_BHMK: torch.Tensor,
        values_BHMK: torch.Tensor,
        mask: torch.Tensor,
        with_weights: bool = False,
        held_back_BM: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The new hidden states, and `[B, H, L, M + 1]` attention weights if asked for; `mask` as wide as they or 1.

        `held_back_BM` is taken off the logits; with it the weights are given, too.
        """
        queries_BHLK = self._heads(self.query(self.norm(hidden_BLE)))
        keys_BHMK, values_BHMK = keys_BHMK.to(queries_BHLK.dtype), values_BHMK.to(queries_BHLK.dtype)
        weights = None
        if with_weights or held_back_BM is not None:
            logits_BHLM = (queries_BHLK @ keys_BHMK.transpose(-1, -2) / math.sqrt(self.head_dim)).float()
            if held_back_BM is not None:
                logits_BHLM = logits_BHLM - held_back_BM[:, None, None]
            weights = logits_BHLM.masked_fill(~mask, float("-inf")).softmax(-1)
            found_BHLK = weights.to(values_BHMK.dtype) @ values_BHMK
        else:
            found_BHLK = F.scaled_dot_product_attention(queries_BHLK, keys_BHMK, values_BHMK, attn_mask=mask)
        found_BLE = self.output(found_BHLK.transpose(1, 2).flatten(2))
        return hidden_BLE + self.gate.tanh().to(found_BLE.dtype) * found_BLE, weights

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


class CrossAttentionLayers(nn.Module):
    """One `GatedCrossAttention` in front of every `cross_attention_interval`-th layer of a language model.

    The layers are reached by hooks, so any causal language model of transformers will do, and its weights keep their
    names. `look_at` must be called before each run of the language model.
    """

    def __init__(self, config: VlmSliceConfig, language_model: PreTrainedModel):
        super().__init__()
        decoder_layers = find_decoder_layers(language_model)
        if not 1 <= config.cross_attention_interval <= len(decoder_layers):
            raise ValueError(
                f"cross_attention_interval is {config.cross_attention_interval}, expected 1 to the "
                f"{len(decoder_layers)} layers of the language model"
            )
        # The last of each group, so that a model of one group still reads the question before it looks.
        self.chosen = range(
            config.cross_attention_interval - 1, len(decoder_layers), config.cross_attention_interval
        )
        text_dim = config.text_config.hidden_size
        self.layers = nn.ModuleList(
            GatedCrossAttention(
                text_dim,
                config.connector_heads,
                config.connector_head_dim,
                config.cross_attention_gate,
                config.connector_scale,
            )
            for _ in self.chosen
        )
        for number in config.first_fit_layers:
            if not 0 <= number < len(self.layers):
                raise ValueError(
                    f"first_fit_layers has {number}, expected numbers of the {len(self.layers)} looking layers, from 0"
                )
        self.first_fit = nn.ModuleDict(
            {
                str(number): FirstFit(text_dim, config.connector_head_dim, config.connector_scale)
                for number in config.first_fit_layers
            }
        )
        self._scale = config.connector_scale
        self._merge_size = config.slicing["merge_size"]
        self._memory: VisualMemory | None = None
        self._candidates: torch.Tensor | None = None
        self._with_weights = False
        self._guided = guided_layers(len(self.layers))
        self._held_back: torch.Tensor | None = None
        self._looks: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []
        self.found: list[torch.Tensor] = []
        for number, index in enumerate(self.chosen):
            decoder_layers[index].register_forward_pre_hook(partial(self._look, number), with_kwargs=True)

    def number_images(self, num_images: int, like: torch.Tensor) -> torch.Tensor:
        """`[num_images, E]`, added to the visual tokens of the k-th image of a sample and to its placeholder."""
        width = like.shape[-1] // 4 * 4
        numbers = torch.arange(num_images, device=like.device)
        embedding = self._scale * sincos_2d(torch.stack([numbers, numbers], dim=-1), width, longest=100.0)
        return F.pad(embedding, (0, like.shape[-1] - width)).to(like.dtype)

    def remember(
        self,
        tokens_of_samples: Sequence[torch.Tensor],
        places_of_samples: Sequence[torch.Tensor],
        can_point_of_samples: Sequence[torch.Tensor],
        samples_of_rows: Sequence[torch.Tensor] | None = None,
    ) -> VisualMemory:
        """Keys and values of the visual tokens of each sample, `[tokens, E]`; a sample may have none.

        Of packed rows, all tokens of a row are given as those of one sample, with `samples_of_rows`.

        Args:
            tokens_of_samples: the tokens.
            places_of_samples: row and column of each token on the canvas, in patches, `[tokens, 2]`.
            can_point_of_samples: `bool[tokens]`, False for those of an overview.
            samples_of_rows: `int64[tokens]`, which sample of its row each token belongs to.
        """
        lengths = torch.tensor([len(tokens) for tokens in tokens_of_samples])
        tokens_BME = nn.utils.rnn.pad_sequence(list(tokens_of_samples), batch_first=True)
        mask = torch.arange(tokens_BME.shape[1])[None] < lengths[:, None]
        keys, values = zip(
            *(cast(GatedCrossAttention, layer).project(tokens_BME) for layer in self.layers), strict=True
        )
        mask = F.pad(mask, (0, 1), value=True)[:, None, None].to(tokens_BME.device)
        places = nn.utils.rnn.pad_sequence(
            [(places / self._merge_size).floor().long() for places in places_of_samples],
            batch_first=True,
            padding_value=BEYOND,
        )
        memory = VisualMemory(keys, values, mask, F.pad(places, (0, 0, 0, 1), value=BEYOND))
        if samples_of_rows is not None:
            samples = nn.utils.rnn.pad_sequence(list(samples_of_rows), batch_first=True, padding_value=-1)
            memory = memory._replace(samples=F.pad(samples, (0, 1), value=-1))
        if not self.first_fit:
            return memory
        can_point = nn.utils.rnn.pad_sequence(list(can_point_of_samples), batch_first=True)
        order = order_for_pointing(places, can_point)
        fitting = {
            int(number): cast(FirstFit, head).project(tokens_BME, order.tokens)
            for number, head in self.first_fit.items()
        }
        return memory._replace(order=order, fitting=fitting)

    def look_at(
        self,
        memory: VisualMemory | None,
        points_BL3: torch.Tensor | None = None,
        with_weights: bool = False,
        samples_BL: torch.Tensor | None = None,
    ) -> None:
        """Sets what the layers look at from now on: nothing, with None.

        Afterwards `weights` holds those asked for, and `found` the log-probabilities of `FirstFit`.

        It stays until the next call: gradient checkpointing runs the layers again in the backward pass.

        Args:
            memory: what `remember` gave.
            points_BL3: see `pointing.last_points`; None where the ids to come have none.
            with_weights: keep the attention weights.
            samples_BL: see `packed_rows`; a position then sees the tokens of its own sample only.
        """
        self._candidates = None
        if points_BL3 is not None:
            points_BL3 = points_BL3.div(self._merge_size, rounding_mode="floor")
        if memory is not None and memory.order is not None:
            self._candidates = memory.order.candidates(points_BL3)
            if samples_BL is not None and memory.samples is not None:
                samples_BN = memory.samples.gather(1, memory.order.tokens)
                self._candidates = self._candidates & (samples_BN[:, None] == samples_BL[:, :, None])
        if memory is not None and memory.samples is not None and samples_BL is not None:
            memory = memory.of_samples(samples_BL)
        if memory is not None and points_BL3 is not None:
            memory = memory.without_passed(points_BL3)
        self._memory, self._with_weights = memory, with_weights
        coverage = None if memory is None else memory.coverage
        self._held_back = None if coverage is None else coverage.held_back()
        self.weights, self.found, self._looks = [], [], []

    def hold_back(self, memory: VisualMemory, penalty: float) -> VisualMemory:
        """The same memory at the beginning of an answer, of which nothing is to be read twice (see `coverage`)."""
        return memory._replace(coverage=Coverage(memory.places, penalty))

    def reorder(self, rows: torch.Tensor) -> None:
        """After a step of beam search: what each row has read is what another had, see `Coverage.reorder`."""
        if self._memory is not None and self._memory.coverage is not None:
            self._memory.coverage.reorder(rows)

    def _look(
        self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict]:
        if self._memory is None:
            return args, kwargs
        memory = self._memory
        if memory.coverage is not None and args[0].shape[1] != 1:
            raise ValueError(
                f"coverage_penalty holds back what was read id by id, and got {args[0].shape[1]} ids at once; generate "
                "without an assistant model, or set model.config.coverage_penalty to 0"
            )
        hidden, weights = self.layers[number](
            args[0],
            memory.keys[number],
            memory.values[number],
            memory.mask,
            self._with_weights,
            self._held_back,
        )
        if self._with_weights:
            self.weights.append(weights)
        if memory.coverage is not None and number in self._guided:
            self._looks.append(weights[:, 0, 0])
            if number == self._guided[-1]:
                memory.coverage.look(torch.stack(self._looks).mean(dim=0))
        if memory.fitting is not None and number in memory.fitting:
            hidden, found = self.first_fit[str(number)](hidden, *memory.fitting[number], self._candidates)
            if self._with_weights:
                self.found.append(found)
        return (hidden, *args[1:]), kwargs


def find_decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """The list of a language model's layers, whatever its name.

    Raises:
        ValueError: there is none with as many layers as the config tells.
    """
    expected = language_model.config.num_hidden_layers
    for module in language_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == expected:
            return module
    raise ValueError(
        f"{type(language_model).__name__} has no list of {expected} layers, expected one to put cross-attention in "
        "front of; use another connector"
    )
