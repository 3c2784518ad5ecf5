"""Image processor that resizes with Pillow."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension, PILImageResampling

from vlmslice.image_processing_base import SlicingImageProcessor
from vlmslice.slicing import View
from vlmslice.view_packing import intermediate_size


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

    def _resize_view(self, image: Image.Image, view: View, resample: PILImageResampling) -> torch.Tensor:
        top, left, bottom, right = view.box
        if view.box != (0, 0, image.height, image.width):
            # `resize(box=...)` would let the filter look beyond the box, into the next slice.
            image = image.crop((left, top, right, bottom))
        for height, width in (intermediate_size((image.height, image.width), view.size), view.size):
            image = image.resize((width, height), resample)
        return torch.from_numpy(np.array(image))
