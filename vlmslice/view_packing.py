"""Plans and images to the tensors that the model takes: the one place where views become packed patches.

    SlicePlan  ->  views, overview first  ->  resized pixels  ->  rows of patches, normalised and zero padded

Both image processors pass through here and differ only in how they resize.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NotRequired, TypedDict, TypeVar

import torch

from vlmslice.slicing import SlicePlan, View

# V views of all images, T patches of the largest view rounded up, N images
PATCH_COUNT_MULTIPLE = 16  # Every new tensor shape costs a kernel set-up on the CPU: use few lengths.

ImageT = TypeVar("ImageT")


class PackedViews(TypedDict):
    """What the model takes of N images.

    Keys:
        pixel_values: `[V, T, patch_size * patch_size * 3]`. A row is one view, its patches in row-major
            order, each flattened channels last (the layout of timm's NaFlexVit); zeros from patch
            `height * width` on.
        target_sizes: `int64[V, 2]`, the patch grid (height, width) of each view.
        canvas_boxes: `int64[V, 4]`, as in `SlicePlan.canvas_boxes`.
        num_views: `int64[N]`, the number of consecutive rows that belong to each image.
        token_boxes: `int64[V, 4]`, (top, left, bottom, right) of the visual tokens of each view that the language model
            receives, in blocks of `merge_size` patches; left out where it receives all.
    """

    pixel_values: torch.Tensor
    target_sizes: torch.Tensor
    canvas_boxes: torch.Tensor
    num_views: torch.Tensor
    token_boxes: NotRequired[torch.Tensor]


def pack_views(
    images: Sequence[ImageT],
    plans: Sequence[SlicePlan],
    draw_views: Callable[[ImageT, SlicePlan], Iterable[torch.Tensor]],
    *,
    patch_size: int,
    merge_size: int,
    gain: Sequence[float],
    offset: Sequence[float],
) -> PackedViews:
    """Resizes every view of every plan and packs it as patches.

    A 448x448 image cut 2x2 into slices of 224x224 px with an overview of 160x160 px gives, at 16 px per
    patch, five rows: the overview with 100 patches, then four slices with 196, all padded to T = 208.

    Args:
        images: N source images, in whatever form `draw_views` takes.
        plans: The plan of each image.
        draw_views: Maps an image and its plan to `uint8[height, width, 3]` of each view.
        patch_size: Side of a patch, px.
        merge_size: Side of a block, in patches.
        gain: Per channel; a packed value is `pixel * gain + offset`.
        offset: Per channel.
    """
    views = [view for plan in plans for view in plan.views]
    longest = max(height * width for height, width in (view.patch_grid for view in views))
    num_patches = -(-longest // PATCH_COUNT_MULTIPLE) * PATCH_COUNT_MULTIPLE
    pixel_values = torch.zeros(len(views), num_patches, patch_size * patch_size * 3)
    rows = iter(pixel_values)
    gain_of_patch = torch.tensor(gain).repeat(patch_size * patch_size)
    offset_of_patch = torch.tensor(offset).repeat(patch_size * patch_size)
    for image, plan in zip(images, plans, strict=True):
        for pixels in draw_views(image, plan):
            patches = split_into_patches(pixels, patch_size)
            next(rows)[: len(patches)].copy_(patches).mul_(gain_of_patch).add_(offset_of_patch)
    packed = PackedViews(
        pixel_values=pixel_values,
        target_sizes=torch.tensor([view.patch_grid for view in views]),
        canvas_boxes=torch.tensor([box for plan in plans for box in plan.canvas_boxes]),
        num_views=torch.tensor([len(plan.views) for plan in plans]),
    )
    if any(view.token_box for view in views):
        packed["token_boxes"] = torch.tensor(
            [view.token_box or _all_blocks(view, merge_size) for view in views]
        )
    return packed


def _all_blocks(view: View, merge_size: int) -> tuple[int, int, int, int]:
    return 0, 0, view.patch_grid[0] // merge_size, view.patch_grid[1] // merge_size


def intermediate_size(source_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) between the two one-axis passes of a resize: the smaller of the two possible.

    Pillow 13 picks the order of its passes by cost, torchvision always takes the horizontal one first. As
    pixels are rounded and clipped in between, they would differ by up to 25 of 255 levels on noise; both
    image processors therefore resize in two explicit steps, and differ by 2 at most. The smaller one also
    bounds memory: 300,000 x 2 px to 960 x 32 px goes through 960 x 2, not through 300,000 x 32.
    """
    source_height, source_width = source_size
    height, width = size
    if source_height * width <= height * source_width:
        return source_height, width
    return height, source_width


def split_into_patches(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cuts `[height, width, 3]` into `[num_patches, patch_size * patch_size * 3]`, rows first."""
    height, width, channels = pixels.shape
    cells = pixels.reshape(height // patch_size, patch_size, width // patch_size, patch_size, channels)
    return cells.transpose(1, 2).reshape(-1, patch_size * patch_size * channels)


def join_patches(patches: torch.Tensor, patch_grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Inverse of `split_into_patches`, for display; ignores the padding after the last patch of the grid."""
    rows, cols = patch_grid
    cells = patches[: rows * cols].reshape(rows, cols, patch_size, patch_size, -1)
    return cells.transpose(1, 2).reshape(rows * patch_size, cols * patch_size, -1)
