"""Writes `slice_plans.json`, the plans against which a port of the planner can check itself.

    python tests/golden/make_slice_plans.py

Run it only after a deliberate change of the planner, and name that change in CHANGELOG.md.
"""

import argparse
import json
from pathlib import Path

from vlmslice.slicing import SlicingConfig, plan_slices

HEADER = {
    "about": "Slice plans of vlmslice: for each config the plans of some image sizes, in full.",
    "conventions": {
        "order": "heights before widths, rows before columns; views: overview first, then slices row by row",
        "image_size": "[height, width] of the upright image in px",
        "grid": "[rows, cols] of the slices",
        "overview": "the view of the whole image, or null if the grid is [1, 1]",
        "box": "[top, left, bottom, right] in px of the image; without an image_box, row i of the slices spans "
        "i*height//rows to (i+1)*height//rows; with one, fractions, and beyond the image where it is padded",
        "size": "[height, width] in px to which the box is resized; patch_grid times patch_size",
        "patch_grid": "patches [height, width]; both are multiples of merge_size",
        "canvas_boxes": "per view [top, left, bottom, right] in patches of the canvas that the slices cover",
        "image_box": "[top, left, bottom, right] of the resized image on the canvas, in px of the canvas; null if "
        "slices are cut from the image and resized each by itself",
        "fill": "colour of what lies beyond the image",
        "num_visual_tokens": "of a view: tokens_per_view, or else the blocks of its token_box; of a plan: the sum",
        "token_box": "[top, left, bottom, right] of the blocks of a view, of merge_size^2 patches, whose tokens are "
        "kept; null for all",
        "reason": "for people; a port may word it differently and should not compare it",
    },
    "arithmetic": "IEEE 754 doubles; natural logarithms; round() rounds half to even; int() truncates",
}

SIZES = [
    (1, 1), (1, 3), (20, 60), (40, 400), (100, 201), (224, 224), (225, 224), (267, 267), (268, 268), (300, 200),
    (448, 448), (449, 448), (480, 640), (600, 601), (720, 480), (1080, 1920), (1000, 1000), (2480, 3508),
    (2101, 2101), (4000, 4000), (4000, 4001), (4000, 100), (100, 4000), (20000, 20), (20000, 1), (2, 300000),
    (398847, 2), (13000, 13000), (400000, 400000),
    # Close decisions: a weight of `adaptive` that is off by 3 % changes a plan of one of these.
    (1450, 836), (1057, 823), (816, 2146), (294, 820),
]  # fmt: skip

CONFIGS = {
    "default": SlicingConfig(),
    "nano": SlicingConfig(overview_resolution=160),
    "adaptive, 448 px, at most 9 slices": SlicingConfig(
        scale_resolution=448, patch_size=14, merge_size=4, max_slice_nums=9
    ),
    "adaptive, 64 tokens per view": SlicingConfig(tokens_per_view=64, max_slice_nums=9),
    "adaptive, at most 64 tokens": SlicingConfig(max_visual_tokens=64),
    "minicpm": SlicingConfig("minicpm", 448, None, 14, 4, 9, max_visual_tokens=1_000_000),
    "uhd": SlicingConfig("uhd", 336, None, 14, 1, 7, max_visual_tokens=1_000_000),
    "anyres": SlicingConfig("anyres", 336, None, 14, 1, 4, max_visual_tokens=1_000_000),
    "overlap, each place once": SlicingConfig("overlap_dedup", 512, max_visual_tokens=1_000_000),
    "pad": SlicingConfig("pad", 336, None, 14, 1, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).with_name("slice_plans.json")
    parser.add_argument("path", type=Path, nargs="?", default=default, help="file to write")
    configs = {
        name: {"config": config.to_dict(), "plans": [plan_slices(*size, config).to_dict() for size in SIZES]}
        for name, config in CONFIGS.items()
    }
    text = json.dumps({**HEADER, "configs": configs}, indent=None, separators=(",", ":"))
    # One plan a line: small enough to ship, and a change shows as the plans it concerns.
    text = text.replace('{"policy":', '\n{"policy":')
    parser.parse_args().path.write_text(text + "\n")


if __name__ == "__main__":
    main()
