"""Image processor that resizes with torchvision."""

from typing import Unpack

import torch
from torchvision.transforms.functional import pil_to_tensor
from transformers import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict

from vlmslice.image_processing_base import SlicerInput, SlicingImageProcessor, VlmSliceImageProcessorKwargs
from vlmslice.slicing import View
from vlmslice.view_packing import intermediate_size


class VlmSliceImageProcessor(SlicingImageProcessor, TorchvisionBackend):
    """Slices images by the plan and packs the views as patches, with torchvision.

    See `view_packing.PackedViews` for what a call returns; `plans` holds the `SlicePlan` of each image besides.
    """

    def __init__(self, **kwargs: Unpack[VlmSliceImageProcessorKwargs]):
        super().__init__(**kwargs)

    def preprocess(
        self, images: SlicerInput | list, **kwargs: Unpack[VlmSliceImageProcessorKwargs]
    ) -> BatchFeature:
        return super().preprocess(images, **kwargs)

    def process_image(
        self,
        image: SlicerInput,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        **kwargs,
    ) -> torch.Tensor:
        return pil_to_tensor(self._load_rgb(image, input_data_format)).to(device or "cpu")

    def _image_size(self, image: torch.Tensor) -> tuple[int, int]:
        return image.shape[-2], image.shape[-1]

    def _resize_view(self, image: torch.Tensor, view: View, resample: PILImageResampling) -> torch.Tensor:
        top, left, bottom, right = view.box
        pixels = image[:, top:bottom, left:right]
        for height, width in (intermediate_size((bottom - top, right - left), view.size), view.size):
            pixels = self.resize(pixels, SizeDict(height=height, width=width), resample=resample, antialias=True)
        return pixels.permute(1, 2, 0)
