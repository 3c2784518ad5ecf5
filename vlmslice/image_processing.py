"""Image processor that resizes with torchvision."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict

from vlmslice.image_processing_base import SlicingImageProcessor


class VlmSliceImageProcessor(SlicingImageProcessor, TorchvisionBackend):  # type: ignore[misc]
    """Slices images by the plan and packs the views as patches, with torchvision.

    A call returns what `view_packing.PackedViews` lists, and `plans`, the `SlicePlan` of each image. With
    `device` set, the resizing runs there; the packed patches are on the CPU.
    """

    def process_image(  # type: ignore[override]  # `str` devices, as `ImagesKwargs` allows
        self,
        image: Any,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        return _to_tensor(self._to_rgb_image(image, input_data_format)).to(device or "cpu")

    def _image_size(self, image: torch.Tensor) -> tuple[int, int]:
        return image.shape[-2], image.shape[-1]

    def _crop(self, image: torch.Tensor, box: tuple[int, int, int, int]) -> torch.Tensor:
        top, left, bottom, right = box
        return image[:, top:bottom, left:right]

    def _resize(
        self, image: torch.Tensor, size: tuple[int, int], resample: PILImageResampling
    ) -> torch.Tensor:
        return self.resize(image, SizeDict(height=size[0], width=size[1]), resample, antialias=True)

    def _pad(
        self, image: torch.Tensor, padding: tuple[int, int, int, int], fill: tuple[int, int, int]
    ) -> torch.Tensor:
        if not any(padding):
            return image
        top, left, bottom, right = padding
        _, height, width = image.shape
        color = image.new_tensor(fill)[:, None, None]
        padded = color.expand(-1, top + height + bottom, left + width + right).clone()
        padded[:, top : top + height, left : left + width] = image
        return padded

    def _to_array(self, image: torch.Tensor) -> torch.Tensor:
        return image.permute(1, 2, 0)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """`uint8[3, height, width]`, stored channels last as torchvision resizes fastest.

    Copied in bands of about a megapixel: converting all at once would hold two more copies of the image.
    """
    pixels = torch.empty(image.height, image.width, 3, dtype=torch.uint8)
    band_height = max(2**20 // image.width, 1)
    for top, band in zip(range(0, image.height, band_height), pixels.split(band_height), strict=True):
        box = (0, top, image.width, top + len(band))
        band.copy_(torch.from_numpy(np.array(image.crop(box))))
    return pixels.permute(2, 0, 1)
