"""Convolutions over the whole canvas, after the transformer blocks: what a slice cannot know alone.

Legend: V views, T patches per view (padded), S canvases of one shape, D width.

Transformer blocks see a view alone. The middle of a shape as large as a slice shows nothing but its colour there, and a
seam may cut the shape in two; the overview shows it whole, but coarsely. So the slices' features are laid side by side
on their canvas (see `sheets`), those of the overview are spread below them, and dilated convolutions (Yu and Koltun,
2016, https://arxiv.org/abs/1511.07122) carry what was seen some patches further. In the bundled model they take 7 % of
the encoder's time on a CPU.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from vlmslice.conv_stem import MatrixConv2d
from vlmslice.sheets import Sheet


class DilatedBlock(nn.Module):
    """Norm, narrow, GELU, dilated 3 x 3, GELU, widen, added to the input: `[S, H, W, D]` to the same."""

    def __init__(self, hidden_size: int, dilation: int):
        super().__init__()
        inner = hidden_size // 2
        self.norm = nn.LayerNorm(hidden_size)
        self.narrow = nn.Linear(hidden_size, inner)
        self.spread = MatrixConv2d(inner, inner, 3, dilation=dilation)
        self.widen = nn.Linear(inner, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.widen(F.gelu(self.spread(F.gelu(self.narrow(self.norm(x))))))


class CanvasMixer(nn.Module):
    """Lets the patches of an image's slices know of one another and of the overview; a no-op until it is trained."""

    def __init__(self, hidden_size: int, dilations: Sequence[int]):
        super().__init__()
        self.overview = nn.Linear(hidden_size, 4 * hidden_size)
        self.blocks = nn.ModuleList(DilatedBlock(hidden_size, dilation) for dilation in dilations)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for added in (self.overview, *(block.widen for block in self.blocks)):
            nn.init.zeros_(added.weight)  # type: ignore[union-attr, arg-type]

    def forward(self, features_VTD: torch.Tensor, sheets: Sequence[Sheet]) -> torch.Tensor:
        """Features of the same shape; those of overviews stay what they are.

        Args:
            features_VTD: what the transformer blocks made of the patches.
            sheets: see `sheets.lay_out_sheets`; images alike in shape run together.
        """
        features = features_VTD.flatten(0, 1)
        overviews = {sheet.image: sheet.patches for sheet in sheets if sheet.is_overview}
        alike: dict[tuple, list[Sheet]] = defaultdict(list)
        for sheet in sheets:
            if not sheet.is_overview:
                overview = overviews.get(sheet.image)
                shapes = (None if overview is None else overview.shape, sheet.patches.shape)
                alike[(*shapes, sheet.corner, sheet.canvas)].append(sheet)
        output = features.clone()
        for group in alike.values():
            index_SHW = torch.stack([sheet.patches for sheet in group])
            x = features[index_SHW]
            (top, left), (height, width) = group[0].corner, x.shape[1:3]
            if group[0].image in overviews:
                overview = features[torch.stack([overviews[sheet.image] for sheet in group])]
                spread = self._spread_overview(overview, group[0].canvas)
                x = x + spread[:, top : top + height, left : left + width]
            else:
                # Adds nothing; but processes that train together wait for a gradient of every weight.
                x = x + self.overview(features[:0]).sum()
            for block in self.blocks:
                x = block(x)
            output[index_SHW] = x.to(output.dtype)
        return output.view_as(features_VTD)

    def _spread_overview(self, overview: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """`[S, h, w, D]` to `[S, H, W, D]`, by way of a quarter of a patch: where in it a thing lies counts, too."""
        quarters = F.pixel_shuffle(self.overview(overview).permute(0, 3, 1, 2), 2)
        return F.interpolate(quarters, size, mode="bilinear").permute(0, 2, 3, 1)
