"""Connectors: from the patch features of a view to the visual tokens that the language model receives.

Legend: V views, T patches per view (padded), Q visual tokens per view (padded), D encoder width, H heads, K head
width, E text width.

Four kinds at matched token counts, chosen by name in `VlmSliceConfig.connector`:

- `spatial_resampler`: one query for each block of merge_size x merge_size patches, anchored to its block. Cross-
  attention in the manner of LLaVA-UHD's second resampler, with anchors that hold from the first step.
- `resampler`: a fixed number of learned queries per view (Alayrac et al., 2022; MiniCPM-V), 2D positions on both
  sides.
- `pixel_unshuffle`: the patches of a block side by side, through an MLP (as in InternVL and MiniCPM-V 4.6).
- `cross_attention`: the patches of a block side by side, through one linear layer; the tokens do not enter the prompt,
  layers of the language model look at them (see `cross_attention`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from vlmslice.config import VlmSliceConfig
from vlmslice.position_embedding import sincos_2d
from vlmslice.vision_encoder import patch_coordinates


class CrossAttention(nn.Module):
    """Queries at places look at patches at places; attention starts on what is near.

    Keys are `W_k features + s_h * sincos(place)`, queries `W_q content + s_h * sincos(place + offset_h)` with the
    content weights starting at zero. Every head therefore begins as a soft window round its query's place; sharpness
    `s_h` and the offsets are learned.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        offsets: list[tuple[float, float]],
        sharpness: float = 3.0,
    ):
        """`offsets`: (y, x) in patches, where each of the H heads at first looks beside the place of its query."""
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        inner = num_heads * head_dim
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, inner, bias=False)
        self.key = nn.Linear(dim, inner, bias=False)
        self.value = nn.Linear(dim, inner)
        self.output = nn.Linear(inner, dim)
        self.sharpness = nn.Parameter(torch.empty(num_heads))
        self.offsets = nn.Parameter(torch.empty(num_heads, 2))
        self._initial_offsets, self._initial_sharpness = offsets, sharpness
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.key.weight)
        for linear in (self.value, self.output):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)
        nn.init.constant_(self.sharpness, self._initial_sharpness)
        init.copy_(self.offsets, torch.tensor(self._initial_offsets))

    def forward(
        self,
        content_VQD: torch.Tensor,
        places_VQ2: torch.Tensor,
        features_VTD: torch.Tensor,
        patch_places_VT2: torch.Tensor,
        valid_VT: torch.Tensor,
    ) -> torch.Tensor:
        features_VTD = self.norm(features_VTD)
        scale_H11 = self.sharpness[:, None, None]
        query_places_VHQ2 = places_VQ2[:, None] + self.offsets[None, :, None]
        queries_VHQK = self._heads(self.query(content_VQD)) + scale_H11 * sincos_2d(
            query_places_VHQ2, self.head_dim
        )
        key_places_V1TK = sincos_2d(patch_places_VT2[:, None], self.head_dim)
        keys_VHTK = self._heads(self.key(features_VTD)) + scale_H11 * key_places_V1TK
        values_VHTK = self._heads(self.value(features_VTD))
        dtype = values_VHTK.dtype
        logits_VHQT = (
            queries_VHQK.to(dtype) @ keys_VHTK.to(dtype).transpose(-1, -2) / math.sqrt(self.head_dim)
        )
        logits_VHQT = logits_VHQT.float().masked_fill(~valid_VT[:, None, None], float("-inf"))
        mixed_VHQK = logits_VHQT.softmax(-1).to(dtype) @ values_VHTK
        return self.output(mixed_VHQK.transpose(1, 2).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


class TokenHead(nn.Module):
    """What all connectors end with: an MLP on the residual stream, and a projection to the text width."""

    def __init__(self, dim: int, text_dim: int, scale: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.projection = nn.Linear(dim, text_dim, bias=False)
        self.gain = nn.Parameter(torch.empty(text_dim))
        self._scale = scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.up, self.down, self.projection):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)
        nn.init.constant_(self.gain, self._scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return (F.rms_norm(self.projection(x).float(), self.gain.shape) * self.gain).to(self.gain.dtype)


def block_places(target_sizes: torch.Tensor, merge_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of every view, row-major.

    Args:
        target_sizes: `int64[V, 2]` patch grids, multiples of `merge_size`.

    Returns:
        `int64[V, Q, 2]` (row, column) of each block in its view, and `bool[V, Q]`, True for real blocks.
    """
    block_grids = target_sizes // merge_size
    return patch_coordinates(block_grids, int(block_grids.prod(dim=1).max()))


class SpatialResampler(nn.Module):
    """One query per block, its heads starting on the patches of the block, one patch per head in turn."""

    def __init__(self, config: VlmSliceConfig):
        super().__init__()
        dim, self.merge_size = config.vision_config.hidden_size, config.slicing["merge_size"]
        m = self.merge_size
        middle = (m - 1) / 2
        corners = [(y - middle, x - middle) for y in range(m) for x in range(m)]
        offsets = [corners[head % len(corners)] for head in range(config.connector_heads)]
        self.attention = CrossAttention(dim, config.connector_heads, config.connector_head_dim, offsets)
        self.head = TokenHead(dim, config.text_config.hidden_size, config.connector_scale)

    def forward(
        self, features_VTD: torch.Tensor, valid_VT: torch.Tensor, target_sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        patch_places_VT2, _ = patch_coordinates(target_sizes, features_VTD.shape[1])
        blocks_VQ2, valid_VQ = block_places(target_sizes, self.merge_size)
        centers_VQ2 = blocks_VQ2 * self.merge_size + (self.merge_size - 1) / 2
        content_VQD = _gather_block(features_VTD, blocks_VQ2, target_sizes, self.merge_size).mean(dim=2)
        mixed_VQD = self.attention(content_VQD, centers_VQ2, features_VTD, patch_places_VT2, valid_VT)
        return self.head(content_VQD + mixed_VQD), valid_VQ


class Resampler(nn.Module):
    """A fixed number of learned queries per view, spread evenly over it."""

    def __init__(self, config: VlmSliceConfig):
        super().__init__()
        dim, self.num_queries = config.vision_config.hidden_size, config.slicing["tokens_per_view"]
        self.queries = nn.Parameter(torch.empty(self.num_queries, dim))
        offsets = [(0.0, 0.0)] * config.connector_heads
        self.attention = CrossAttention(
            dim, config.connector_heads, config.connector_head_dim, offsets, sharpness=2.0
        )
        self.head = TokenHead(dim, config.text_config.hidden_size, config.connector_scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.queries, std=0.02)

    def forward(
        self, features_VTD: torch.Tensor, valid_VT: torch.Tensor, target_sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_views = features_VTD.shape[0]
        patch_places_VT2, _ = patch_coordinates(target_sizes, features_VTD.shape[1])
        grids_V2 = target_sizes.new_tensor(query_grid(self.num_queries)).expand_as(target_sizes)
        cells_VQ2, valid_VQ = patch_coordinates(grids_V2, self.num_queries)
        places_VQ2 = (cells_VQ2 + 0.5) / grids_V2[:, None] * target_sizes[:, None] - 0.5
        content_VQD = self.queries.expand(num_views, -1, -1)
        mixed_VQD = self.attention(content_VQD, places_VQ2, features_VTD, patch_places_VT2, valid_VT)
        return self.head(content_VQD + mixed_VQD), valid_VQ


class PixelUnshuffle(nn.Module):
    """The features of a block's patches, one after the other, through an MLP."""

    def __init__(self, config: VlmSliceConfig):
        super().__init__()
        dim, self.merge_size = config.vision_config.hidden_size, config.slicing["merge_size"]
        self.norm = nn.LayerNorm(dim)
        self.merge = nn.Linear(dim * self.merge_size**2, dim)
        self.head = TokenHead(dim, config.text_config.hidden_size, config.connector_scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)
        nn.init.normal_(self.merge.weight, std=self.merge.in_features**-0.5)
        nn.init.zeros_(self.merge.bias)

    def forward(
        self, features_VTD: torch.Tensor, valid_VT: torch.Tensor, target_sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        blocks_VQ2, valid_VQ = block_places(target_sizes, self.merge_size)
        patches_VQMD = _gather_block(self.norm(features_VTD), blocks_VQ2, target_sizes, self.merge_size)
        return self.head(self.merge(patches_VQMD.flatten(2))), valid_VQ


class BlockProjection(nn.Module):
    """The features of a block's patches, one after the other, through one linear layer."""

    def __init__(self, config: VlmSliceConfig):
        super().__init__()
        dim, self.merge_size = config.vision_config.hidden_size, config.slicing["merge_size"]
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim * self.merge_size**2, config.text_config.hidden_size, bias=False)
        self.gain = nn.Parameter(torch.empty(config.text_config.hidden_size))
        self._scale = config.connector_scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)
        nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)
        nn.init.constant_(self.gain, self._scale)

    def forward(
        self, features_VTD: torch.Tensor, valid_VT: torch.Tensor, target_sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        blocks_VQ2, valid_VQ = block_places(target_sizes, self.merge_size)
        patches_VQMD = _gather_block(self.norm(features_VTD), blocks_VQ2, target_sizes, self.merge_size)
        tokens_VQE = self.projection(patches_VQMD.flatten(2))
        tokens_VQE = F.rms_norm(tokens_VQE.float(), self.gain.shape) * self.gain
        return tokens_VQE.to(self.gain.dtype), valid_VQ


def query_grid(num_queries: int) -> tuple[int, int]:
    """Rows and columns, as near to a square as the number allows: 64 -> (8, 8), 12 -> (3, 4), 7 -> (1, 7)."""
    rows = max(r for r in range(1, math.isqrt(num_queries) + 1) if num_queries % r == 0)
    return rows, num_queries // rows


def _gather_block(
    features_VTD: torch.Tensor, blocks_VQ2: torch.Tensor, target_sizes: torch.Tensor, merge_size: int
) -> torch.Tensor:
    """Features of each block's patches, row-major inside the block: `[V, Q, merge_size**2, D]`."""
    inside = torch.arange(merge_size, device=features_VTD.device)
    rows_VQM1 = blocks_VQ2[..., 0, None, None] * merge_size + inside[:, None]
    cols_VQ1M = blocks_VQ2[..., 1, None, None] * merge_size + inside
    index_VQM = (rows_VQM1 * target_sizes[:, 1, None, None, None] + cols_VQ1M).flatten(2)
    views = torch.arange(features_VTD.shape[0], device=features_VTD.device)[:, None, None]
    return features_VTD[views, index_VQM]


_CLASSES = {
    "spatial_resampler": SpatialResampler,
    "resampler": Resampler,
    "pixel_unshuffle": PixelUnshuffle,
    "cross_attention": BlockProjection,
}


def build_connector(config: VlmSliceConfig) -> nn.Module:
    """The connector that `config.connector` names.

    Its forward takes features `[V, T, D]`, `bool[V, T]` validity and `int64[V, 2]` patch grids, and returns visual
    tokens `[V, Q, E]` with `bool[V, Q]`, True for real tokens.
    """
    return _CLASSES[config.connector](config)
