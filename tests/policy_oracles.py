"""The processors of transformers from which the published policies come, called to be compared with.

    python tests/policy_oracles.py

prints, for each, the sizes tried and the mismatches.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import transformers
from PIL import Image
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2 import image_processing_got_ocr2
from transformers.models.minicpmv4_6 import image_processing_minicpmv4_6, image_processing_pil_minicpmv4_6

from vlmslice.image_processing import VlmSliceImageProcessor
from vlmslice.slicing import SlicePlan, SlicingConfig, plan_slices
from vlmslice.view_packing import join_patches

SIDE = 224
"""Of slices, in the comparisons of pixels."""
RAW = {"do_rescale": False, "do_normalize": False}

LLAVA_NEXT_GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
ONEVISION_GRIDS = [(rows, cols) for rows in range(1, 7) for cols in range(1, 7)]

# Sizes at which other planners, or earlier versions of this one, went wrong.
EDGE_SIZES = [
    (1, 1), (1, 2), (1, 3), (2, 3), (3, 5), (20, 60), (28, 28), (40, 400), (64, 129), (73, 147),
    (224, 224), (225, 224), (267, 267), (448, 448), (449, 448), (448, 672), (480, 640), (600, 601),
    (1000, 1000), (2000, 2000), (2000, 2001), (2101, 2101), (2762, 2762), (3412, 3412), (4000, 4000),
    (8000, 8000), (13000, 13000), (14000, 14000), (100, 4000), (20, 20000), (1, 20000), (2, 398847),
    (2, 300000), (1, 400000), (400000, 400000), (399999, 400000), (200000, 400000), (199999, 400000),
    (4117, 4704), (1227, 307),
]  # fmt: skip


@dataclass(frozen=True)
class PlanOracle:
    """A processor, by what it would make of an image size.

    Attributes:
        policy: The policy that must agree with it.
        name: Of the processor and its settings.
        config: The settings of the policy.
        theirs: From `(height, width)` what is compared.
        ours: From the plan the same.
        compared: What that is, in words.
    """

    policy: str
    name: str
    config: SlicingConfig
    theirs: Callable[[int, int], object]
    ours: Callable[[SlicePlan], object]
    compared: str

    def agrees(self, height: int, width: int) -> bool:
        return self.ours(plan_slices(height, width, self.config)) == self.theirs(height, width)


def settings_of(policy: str, **options) -> SlicingConfig:
    """Slices of 224 px of 14 px patches, unless set otherwise, and no bound on visual tokens."""
    defaults = {
        "policy": policy,
        "scale_resolution": SIDE,
        "patch_size": 14,
        "merge_size": 2,
        "max_visual_tokens": 10**9,
    }
    return SlicingConfig(**defaults | options)


def _minicpm(mode: str, merge_size: int) -> PlanOracle:
    oracle = image_processing_pil_minicpmv4_6.MiniCPMV4_6ImageProcessorPil()

    def theirs(height: int, width: int) -> tuple:
        """From the methods that the processor itself calls, in its order."""
        grid = oracle.get_sliced_grid((height, width), 9, 448)
        whole = oracle.find_best_resize((height, width), 448, 14, mode, allow_upscale=grid is None)
        if grid is None:
            return (1, 1), whole, None
        refined = oracle.get_refine_size((height, width), grid, 448, 14, mode, allow_upscale=True)
        return tuple(grid), (refined[0] // grid[0], refined[1] // grid[1]), whole

    config = settings_of("minicpm", scale_resolution=448, merge_size=merge_size, max_slice_nums=9)
    return PlanOracle(
        "minicpm",
        f"MiniCPM-V 4.6, {mode}",
        config,
        theirs,
        lambda plan: (plan.grid, plan.slices[0].size, plan.overview and plan.overview.size),
        "grid, slice and overview size",
    )


def _internvl(side: int, max_slice_nums: int) -> PlanOracle:
    def theirs(height: int, width: int) -> tuple:
        cols, rows = image_processing_got_ocr2.get_optimal_tiled_canvas(
            (height, width), (side, side), 1, max_slice_nums
        )
        return rows, cols

    config = settings_of("internvl", scale_resolution=side, max_slice_nums=max_slice_nums)
    name = f"InternVL (got_ocr2), {side} px, 1 to {max_slice_nums}"
    return PlanOracle("internvl", name, config, theirs, lambda plan: plan.grid, "grid")


def _idefics3(side: int, max_slice_nums: int) -> PlanOracle:
    oracle = transformers.Idefics3ImageProcessor(
        size={"longest_edge": math.isqrt(max_slice_nums) * side}, max_image_size={"longest_edge": side}
    )

    def theirs(height: int, width: int) -> tuple:
        num_views, rows, cols = oracle.get_number_of_image_patches(height, width)
        return (num_views, (rows, cols)) if num_views else (1, (1, 1))

    config = settings_of("idefics3", scale_resolution=side, max_slice_nums=max_slice_nums)
    name = f"Idefics3, {side} px, {math.isqrt(max_slice_nums)} along"
    return PlanOracle(
        "idefics3", name, config, theirs, lambda plan: (len(plan.views), plan.grid), "grid, number of views"
    )


def pinpoints(grids: list[tuple[int, int]], side: int) -> list[list[int]]:
    return [[rows * side, cols * side] for rows, cols in grids]


def _anyres(processor: type, grids: list[tuple[int, int]], side: int, max_slice_nums: int) -> PlanOracle:
    """Their number of tokens also counts one more for each row, which here is the spatial schema's part."""
    asked = SimpleNamespace(vision_aspect_ratio="anyres_max_1000")  # beyond it OneVision shrinks features

    def theirs(height: int, width: int) -> tuple:
        best_height, best_width = select_best_resolution((height, width), pinpoints(grids, side))
        grid = (best_height // side, best_width // side)
        unpadded, _ = processor._get_unpadded_features(asked, height, width, side // 14, side // 14, *grid)
        return grid, unpadded

    config = settings_of("anyres", scale_resolution=side, merge_size=1, max_slice_nums=max_slice_nums)
    name = f"{processor.__name__.removesuffix('Processor')}, {side} px, {len(grids)} grids"
    return PlanOracle(
        "anyres",
        name,
        config,
        theirs,
        lambda plan: (plan.grid, sum(view.num_visual_tokens for view in plan.slices)),
        "grid, tokens kept",
    )


PLAN_ORACLES = [
    _minicpm("16x", 4),
    _minicpm("4x", 2),
    _internvl(448, 12),
    _internvl(448, 1),
    _internvl(364, 36),
    _internvl(SIDE, 9),
    _anyres(LlavaNextProcessor, LLAVA_NEXT_GRIDS, 336, 4),
    _anyres(LlavaNextProcessor, LLAVA_NEXT_GRIDS, SIDE, 4),
    _anyres(LlavaOnevisionProcessor, ONEVISION_GRIDS, 336, 36),
    _idefics3(364, 16),
    _idefics3(364, 1),
    _idefics3(512, 17),
    _idefics3(512, 100),
]


def drawn_sizes(num_sizes: int) -> list[tuple[int, int]]:
    """Heights and widths: half of them up to 5,000 px, half of any shape, ties and what once went wrong."""
    rng = random.Random(46)
    ordinary = [(rng.randint(1, 5000), rng.randint(1, 5000)) for _ in range(num_sizes // 2)]
    extreme = [
        (round(math.exp(rng.uniform(0, 12.9))), round(math.exp(rng.uniform(0, 12.9))))
        for _ in range(num_sizes // 2)
    ]
    ties = [(side, factor * side) for side in (*range(1, 60), *range(300, 1600, 20)) for factor in (1, 2, 3)]
    return [*EDGE_SIZES, *ordinary, *extreme, *ties]


# --- pixels -------------------------------------------------------------------------------------------------------


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _internvl_views(image: Image.Image) -> Iterator[np.ndarray]:
    oracle = transformers.GotOcr2ImageProcessor(
        size=_square(SIDE), crop_to_patches=True, max_patches=9, resample=3
    )
    pixels = oracle(image, return_tensors="np", **RAW)["pixel_values"]
    yield pixels[-1]  # the overview, or the one view
    yield from pixels[:-1]


def _anyres_views(image: Image.Image) -> Iterator[np.ndarray]:
    oracle = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size=_square(SIDE),
        image_grid_pinpoints=pinpoints(LLAVA_NEXT_GRIDS, SIDE),
        resample=3,
    )
    yield from oracle(image, return_tensors="np", **RAW)["pixel_values"][0]


def _pad_views(image: Image.Image) -> Iterator[np.ndarray]:
    oracle = transformers.LlavaImageProcessor(
        size=_square(SIDE), crop_size=_square(SIDE), do_pad=True, resample=3, image_mean=MEAN
    )
    yield from oracle(image, return_tensors="np", **RAW)["pixel_values"]


def _minicpm_views(image: Image.Image) -> Iterator[np.ndarray]:
    oracle = image_processing_minicpmv4_6.MiniCPMV4_6ImageProcessor(scale_resolution=SIDE)
    batch = oracle(image, resample=3, **RAW)
    # Patches lie side by side: [3, 14, patches * 14].
    patches, first = np.asarray(batch["pixel_values"]).reshape(3, 14, -1, 14), 0
    for height, width in np.asarray(batch["target_sizes"]).tolist():
        of_view = patches[:, :, first : first + height * width].reshape(3, 14, height, width, 14)
        yield of_view.transpose(0, 2, 1, 3, 4).reshape(3, height * 14, width * 14)
        first += height * width


MEAN = [0.48, 0.46, 0.41]
"""Of the colours, which `pad` pads with."""

PIXEL_ORACLES: dict[str, tuple[Callable[[Image.Image], Iterator[np.ndarray]], SlicingConfig]] = {
    "minicpm": (_minicpm_views, settings_of("minicpm", merge_size=4, max_slice_nums=9)),
    "internvl": (_internvl_views, settings_of("internvl", max_slice_nums=9)),
    "anyres": (_anyres_views, settings_of("anyres", max_slice_nums=4)),
    "pad": (_pad_views, settings_of("pad")),
}
"""By policy: a processor's views of an image, `float[3, height, width]` in 0..255, overview first; and our settings."""


def our_views(
    image: Image.Image, config: SlicingConfig, processor_class: type = VlmSliceImageProcessor
) -> list[np.ndarray]:
    """Our views of an image, in the same form."""
    outputs = processor_class(image_mean=MEAN, **config.to_dict())(image, **RAW)
    rows = zip(outputs["pixel_values"], outputs["target_sizes"].tolist(), strict=True)
    return [
        join_patches(patches, (height, width), config.patch_size).numpy().transpose(2, 0, 1)
        for patches, (height, width) in rows
    ]


def _print_tables(num_sizes: int, num_images: int) -> None:
    sizes = drawn_sizes(num_sizes)
    print(f"{'policy':<10}{'oracle':<42}{'compared':<32}{'sizes':>7}{'mismatches':>12}")
    for oracle in PLAN_ORACLES:
        mismatches = sum(not oracle.agrees(*size) for size in sizes)
        print(f"{oracle.policy:<10}{oracle.name:<42}{oracle.compared:<32}{len(sizes):>7}{mismatches:>12}")
    rng = np.random.default_rng(0)
    print(f"\n{'policy':<10}{'images':>7}{'views':>7}{'exact views':>13}{'mean levels apart':>19}{'most':>6}")
    drawn = [tuple(np.exp(rng.uniform(np.log(20), np.log(1200), 2)).astype(int)) for _ in range(num_images)]
    for policy, (views, config) in PIXEL_ORACLES.items():
        apart = []
        for height, width in drawn:
            coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3)).astype(np.uint8)
            image = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
            pairs = zip(our_views(image, config), views(image), strict=True)
            apart += [np.abs(ours - theirs) for ours, theirs in pairs]
        exact = sum(not view.any() for view in apart)
        mean, most = np.mean([view.mean() for view in apart]), max(view.max() for view in apart)
        print(f"{policy:<10}{num_images:>7}{len(apart):>7}{exact:>13}{mean:>19.4f}{most:>6.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Mismatches between our policies and transformers' processors."
    )
    parser.add_argument("--sizes", type=int, default=20_000, help="image sizes to plan for each oracle")
    parser.add_argument("--images", type=int, default=40, help="images to compare pixel by pixel")
    arguments = parser.parse_args()
    _print_tables(arguments.sizes, arguments.images)
