"""Image processor that resizes with Pillow."""

from typing import Unpack

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension, PILImageResampling

from vlmslice.image_processing_base import SlicerInput, SlicingImageProcessor, VlmSliceImageProcessorKwargs
from vlmslice.slicing import View
from vlmslice.view_packing import intermediate_size


class VlmSliceImageProcessorPil(SlicingImageProcessor, PilBackend):
    """Slices images by the plan and packs the views as patches, with Pillow.

    See `view_packing.PackedViews` for what a call returns; `plans` holds the `SlicePlan` of each image besides.
    """

    def __init__(self, **kwargs: Unpack[VlmSliceImageProcessorKwargs]):
        super().__init__(**kwargs)

    def preprocess(
        self, images: SlicerInput | list, **kwargs: Unpack[VlmSliceImageProcessorKwargs]
    ) -> BatchFeature:
        return super().preprocess(images, **kwargs)

    def process_image(
        self, image: SlicerInput, input_data_format: str | ChannelDimension | None = None, **kwargs
    ) -> Image.Image:
        return self._load_rgb(image, input_data_format)

    def _image_size(self, image: Image.Image) -> tuple[int, int]:
        return image.height, image.width

    def _resize_view(self, image: Image.Image, view: View, resample: PILImageResampling) -> torch.Tensor:
        top, left, bottom, right = view.box
        if view.box != (0, 0, image.height, image.width):
            # `resize(box=...)` would let the filter look beyond the box and blend in pixels of the next slice.
            image = image.crop((left, top, right, bottom))
        for height, width in (intermediate_size((image.height, image.width), view.size), view.size):
            image = image.resize((width, height), resample)
        return torch.from_numpy(np.array(image))
