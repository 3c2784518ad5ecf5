"""Image processor that resizes with Pillow."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension, PILImageResampling

from vlmslice.image_processing_base import SlicingImageProcessor


class VlmSliceImageProcessorPil(SlicingImageProcessor, PilBackend):  # type: ignore[misc]
    """Slices images by the plan and packs the views as patches, with Pillow.

    A call returns what `view_packing.PackedViews` lists, and `plans`, the `SlicePlan` of each image.
    """

    def process_image(  # type: ignore[override]  # a PIL image where the parent makes an array
        self, image: Any, input_data_format: str | ChannelDimension | None = None, **kwargs: Any
    ) -> Image.Image:
        return self._to_rgb_image(image, input_data_format)

    def _image_size(self, image: Image.Image) -> tuple[int, int]:
        return image.height, image.width

    def _crop(self, image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        top, left, bottom, right = box
        # `resize(box=...)` would let the filter look beyond the box, into the next slice.
        return image if box == (0, 0, image.height, image.width) else image.crop((left, top, right, bottom))

    def _resize(self, image: Image.Image, size: tuple[int, int], resample: PILImageResampling) -> Image.Image:
        return image.resize((size[1], size[0]), resample)

    def _pad(
        self, image: Image.Image, padding: tuple[int, int, int, int], fill: tuple[int, int, int]
    ) -> Image.Image:
        top, left, bottom, right = padding
        return ImageOps.expand(image, (left, top, right, bottom), fill)

    def _to_array(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image))
