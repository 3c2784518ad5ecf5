"""A convolutional patch embedding: print is told from its neighbourhood, wherever a glyph lies on the patch grid.

Legend: V views, T patches per view (padded), S sheets of one shape, C channels, D width.

A ViT must learn each glyph anew for every offset at which a patch may cut it; a convolution learns it once (early
convolutions help transformers in general: Xiao et al., 2021, https://arxiv.org/abs/2106.14881). Convolutions are also
what a CPU does best: in bf16, 200 GFLOP/s on one core where the blocks of a small ViT reach 80.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from vlmslice.sheets import Sheet

BLOCK = 4
"""Side in pixels of the blocks that the first layer looks at, the finest grid on which convolutions run."""


class MatrixConv2d(nn.Linear):
    """A convolution over maps `[V, H, W, C]` whose weight is kept as the matrix that it is.

    Being a linear layer, it is initialised as one, and `optimizer.find_matrices` finds it. With `stride` equal to
    `kernel_size` it halves (or so) the map; with stride 1 it keeps its size.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1
    ):
        super().__init__(kernel_size**2 * in_channels, out_channels)
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.unflatten(1, (self.kernel_size, self.kernel_size, -1)).permute(0, 3, 1, 2)
        padding = self.dilation * (self.kernel_size // 2) if self.stride == 1 else 0
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, self.bias, self.stride, padding, self.dilation)
        return y.permute(0, 2, 3, 1)


class ResidualConv(nn.Module):
    """Norm, 3 x 3, GELU, 3 x 3, added to the input: `[V, H, W, C]` to the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.inner = MatrixConv2d(channels, channels, 3)
        self.outer = MatrixConv2d(channels, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(F.gelu(self.inner(self.norm(x))))


class ConvStem(nn.Module):
    """Patch embedding by convolutions at 4, 8 and 16 px.

    Blocks of 4 x 4 px become vectors; residual convolutions run on them, on their 2 x 2 groups and on the patches. A
    patch sees about 60 px beyond its edges, never beyond its sheet (see `sheets`).
    """

    def __init__(self, patch_size: int, hidden_size: int, depths: tuple[int, int, int] = (1, 1, 1)):
        super().__init__()
        if patch_size != 4 * BLOCK:
            raise ValueError(
                f"stem 'conv' with patch_size {patch_size}, expected {4 * BLOCK}; use stem 'timm'"
            )
        fine, middle = 3 * hidden_size // 8, 3 * hidden_size // 4
        self.pixels = nn.Linear(3 * BLOCK**2, fine)
        self.fine = nn.Sequential(*(ResidualConv(fine) for _ in range(depths[0])))
        self.to_middle = MatrixConv2d(fine, middle, 2, stride=2)
        self.middle = nn.Sequential(*(ResidualConv(middle) for _ in range(depths[1])))
        self.to_patches = MatrixConv2d(middle, hidden_size, 2, stride=2)
        self.patches = nn.Sequential(*(ResidualConv(hidden_size) for _ in range(depths[2])))

    def residual_outputs(self) -> list[nn.Linear]:
        """The layers whose outputs are added to a residual stream."""
        return [module.outer for module in self.modules() if isinstance(module, ResidualConv)]

    def forward(self, x: torch.Tensor, sheets: Sequence[Sheet]) -> torch.Tensor:
        """Patches `[V, T, patch_size**2 * 3]` (channels last) to `[V, T, D]`, zero where no sheet has them.

        Sheets of one shape run together.
        """
        shapes: dict[torch.Size, list[torch.Tensor]] = {}
        for sheet in sheets:
            shapes.setdefault(sheet.patches.shape, []).append(sheet.patches)
        patches = x.flatten(0, 1)
        output = None
        for alike in shapes.values():
            index_SHW = torch.stack(alike)
            y = self._embed(patches[index_SHW])
            if output is None:
                output = y.new_zeros(len(patches), y.shape[-1])
            output[index_SHW] = y
        assert output is not None
        return output.unflatten(0, x.shape[:2])

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """`[S, height, width, D]` of sheets of patches `[S, height, width, patch_size**2 * 3]`."""
        side = 4
        num_sheets, height, width, _ = x.shape
        x = x.unflatten(-1, (side, BLOCK, side, BLOCK * 3))
        # From patch row and column, block row, row in block, block column, values; to a map of blocks.
        x = x.permute(0, 1, 3, 2, 5, 4, 6).reshape(num_sheets, height * side, width * side, -1)
        x = self.fine(F.gelu(self.pixels(x)))
        x = self.middle(F.gelu(self.to_middle(x)))
        return self.patches(F.gelu(self.to_patches(x)))
