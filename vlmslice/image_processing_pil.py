"""Image processor that resizes with Pillow."""

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling

from vlmslice.image_processing_base import SlicingImageProcessor


class VlmSliceImageProcessorPil(SlicingImageProcessor, PilBackend):  # type: ignore[misc]
    """Slices images by the plan and packs the views as patches, with Pillow.

    A call returns what `view_packing.PackedViews` lists, and `plans`, the `SlicePlan` of each image.
    """

    def _crop(
        self, image: Image.Image, box: tuple[int, int, int, int], device: str | torch.device | None
    ) -> Image.Image:
        top, left, bottom, right = box
        # `resize(box=...)` would let the filter look beyond the box, into the next slice.
        return image if box == (0, 0, image.height, image.width) else image.crop((left, top, right, bottom))

    def _resize(self, image: Image.Image, size: tuple[int, int], resample: PILImageResampling) -> Image.Image:
        return image.resize((size[1], size[0]), resample)

    def _pad(
        self, image: Image.Image, padding: tuple[int, int, int, int], fill: tuple[int, int, int]
    ) -> Image.Image:
        top, left, bottom, right = padding
        return ImageOps.expand(image.convert("RGB"), (left, top, right, bottom), fill)

    def _to_array(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.convert("RGB")))
