"""Image processor that resizes with torchvision."""

import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling, SizeDict

from vlmslice.image_processing_base import SlicingImageProcessor
from vlmslice.view_packing import intermediate_size

# As tensors of so many px at most is a part of an image resized in its first step, and converted from Pillow. One
# tensor of all of it would be the whole image in memory once more, and in fresh memory pages, which cost more time than
# the resizing.
_BAND_PIXELS = 2**21
_CONVERTED_PIXELS = 2**18


class VlmSliceImageProcessor(SlicingImageProcessor, TorchvisionBackend):  # type: ignore[misc]
    """Slices images by the plan and packs the views as patches, with torchvision.

    A call returns what `view_packing.PackedViews` lists, and `plans`, the `SlicePlan` of each image. With
    `device` set, the resizing runs there; the packed patches are on the CPU.
    """

    # Pixels are `uint8[height, width, 3]`: torchvision resizes fastest what is stored channels last.

    def _resize_part(
        self,
        image: Image.Image,
        box: tuple[int, int, int, int],
        size: tuple[int, int],
        resample: PILImageResampling,
        device: str | torch.device | None,
    ) -> torch.Tensor:
        top, left, bottom, right = box
        middle = intermediate_size((bottom - top, right - left), size)
        if middle[0] == bottom - top:  # Widths first: in bands of rows.
            length = max(_BAND_PIXELS // (right - left), 1)
            bands = [(y, left, min(y + length, bottom), right) for y in range(top, bottom, length)]
            sizes = [(band[2] - band[0], middle[1]) for band in bands]
            if len(bands) == 1:
                return self._resize(
                    self._crop(image, box, device), size, resample
                )  # both steps, in this order
        else:
            length = max(_BAND_PIXELS // (bottom - top), 1)
            bands = [(top, x, bottom, min(x + length, right)) for x in range(left, right, length)]
            sizes = [(middle[0], band[3] - band[1]) for band in bands]
        parts = [
            self._resize(self._crop(image, band, device), band_size, resample)
            for band, band_size in zip(bands, sizes, strict=True)
        ]
        return self._resize(torch.cat(parts, dim=int(middle[0] != bottom - top)), size, resample)

    def _crop(
        self, image: Image.Image, box: tuple[int, int, int, int], device: str | torch.device | None
    ) -> torch.Tensor:
        top, left, bottom, right = box
        pixels = torch.empty(bottom - top, right - left, 3, dtype=torch.uint8)
        for rows in pixels.split(max(_CONVERTED_PIXELS // (right - left), 1)):
            part = image.crop((left, top, right, top + len(rows)))
            rows.numpy()[:] = part if part.mode == "RGB" else part.convert("RGB")
            top += len(rows)
        return pixels.to(device or "cpu")

    def _resize(
        self, image: torch.Tensor, size: tuple[int, int], resample: PILImageResampling
    ) -> torch.Tensor:
        target = SizeDict(height=size[0], width=size[1])
        return self.resize(image.permute(2, 0, 1), target, resample, antialias=True).permute(1, 2, 0)

    def _pad(
        self, image: torch.Tensor, padding: tuple[int, int, int, int], fill: tuple[int, int, int]
    ) -> torch.Tensor:
        if not any(padding):
            return image
        top, left, bottom, right = padding
        height, width, _ = image.shape
        padded = image.new_tensor(fill).expand(top + height + bottom, left + width + right, -1).clone()
        padded[top : top + height, left : left + width] = image
        return padded

    def _to_array(self, image: torch.Tensor) -> torch.Tensor:
        return image
