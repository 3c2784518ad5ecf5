"""What both image processors share: inputs, slicing settings, planning, and the call into `view_packing`."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_utils import (
    ChannelDimension,
    PILImageResampling,
    infer_channel_dimension_format,
    is_numpy_array,
    is_torch_tensor,
    validate_preprocess_arguments,
)
from transformers.processing_utils import ImagesKwargs

from vlmslice.image_loading import ImageSource, ImageSourceError, image_from_array, load_image
from vlmslice.slicing import SlicePlan, SlicingConfig, View, plan_slices
from vlmslice.view_packing import pack_views

SlicerInput = ImageSource | np.ndarray | torch.Tensor

_SLICING_FIELDS = tuple(field.name for field in fields(SlicingConfig))
# Options of transformers' image processors that would contradict the plan.
_SET_BY_PLAN = ("do_resize", "size", "do_center_crop", "crop_size", "do_pad", "pad_size")


class VlmSliceImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    policy (`str`, *optional*, defaults to `"adaptive"`):
        Name of the slicing policy: `"adaptive"`, `"uhd"` or `"minicpm"`.
    scale_resolution (`int`, *optional*, defaults to 224):
        Side in pixels of the square that the vision encoder was trained on.
    overview_resolution (`int`, *optional*):
        Side in pixels of the square whose area bounds the overview; `None` means `scale_resolution`.
    patch_size (`int`, *optional*, defaults to 16):
        Side of a patch in pixels.
    merge_size (`int`, *optional*, defaults to 2):
        The sides of every patch grid are multiples of this.
    max_slice_nums (`int`, *optional*, defaults to 36):
        Largest number of slices of one image.
    tokens_per_view (`int`, *optional*):
        Visual tokens of every view, for a connector with learned queries; `None` means one for each
        `merge_size` x `merge_size` patches.
    max_visual_tokens (`int`, *optional*, defaults to 2048):
        Largest number of visual tokens of one image.
    """

    policy: str
    scale_resolution: int
    overview_resolution: int | None
    patch_size: int
    merge_size: int
    max_slice_nums: int
    tokens_per_view: int | None
    max_visual_tokens: int


class SlicingImageProcessor:
    """Mixed into a transformers backend class, which comes after it among the bases.

    A backend adds `process_image`, from an input to its own form of an RGB image, and `_resize_view`.
    """

    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_convert_rgb = True
    policy = SlicingConfig.policy
    scale_resolution = SlicingConfig.scale_resolution
    overview_resolution = SlicingConfig.overview_resolution
    patch_size = SlicingConfig.patch_size
    merge_size = SlicingConfig.merge_size
    max_slice_nums = SlicingConfig.max_slice_nums
    tokens_per_view = SlicingConfig.tokens_per_view
    max_visual_tokens = SlicingConfig.max_visual_tokens
    valid_kwargs = VlmSliceImageProcessorKwargs
    model_input_names = ["pixel_values", "target_sizes", "canvas_boxes", "num_views"]

    @property
    def slicing_config(self) -> SlicingConfig:
        return SlicingConfig(**{name: getattr(self, name) for name in _SLICING_FIELDS})

    def plan(self, height: int, width: int, **overrides: Any) -> SlicePlan:
        """The plan that a call would follow for an upright image of this size.

        Args:
            height: Image height, px.
            width: Image width, px.
            **overrides: Fields of `SlicingConfig` to use instead of this processor's.
        """
        return plan_slices(height, width, replace(self.slicing_config, **overrides))

    def fetch_images(self, images: Any) -> Any:
        """Loads every image source in a nested list; arrays and tensors stay as they are.

        transformers calls this before it counts images, so paths, bytes and URLs never reach its own loader, which
        would fetch from the network.
        """
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if is_numpy_array(images) or is_torch_tensor(images):
            return images
        return load_image(images)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        """Flattens nested lists and batches to a list of single images."""
        flat = list(_flatten(self.fetch_images(images)))
        if not flat:
            raise ImageSourceError("got no image; expected at least one; pass images=None for text alone")
        return flat

    def _load_rgb(self, image: SlicerInput, input_data_format: str | ChannelDimension | None) -> Image.Image:
        if is_torch_tensor(image):
            image = image.detach().cpu()
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
        if not is_numpy_array(image):
            return load_image(image)
        if image.ndim == 3:
            channels = input_data_format or infer_channel_dimension_format(image, num_channels=(1, 2, 3, 4))
            if ChannelDimension(channels) == ChannelDimension.FIRST:
                image = np.moveaxis(image, 0, -1)
        return image_from_array(image)

    def _validate_preprocess_kwargs(
        self,
        *,
        do_rescale: bool | None,
        rescale_factor: float | None,
        do_normalize: bool | None,
        image_mean: Sequence[float] | None,
        image_std: Sequence[float] | None,
        **kwargs: Any,
    ) -> None:
        for name in _SET_BY_PLAN:
            if kwargs[name]:
                raise ValueError(
                    f"got {name}={kwargs[name]}; expected no such option, since the slice plan sets all sizes; use "
                    f"{', '.join(_SLICING_FIELDS)}"
                )
        validate_preprocess_arguments(
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
        )

    def _preprocess(
        self,
        images: list[Any],
        *,
        resample: PILImageResampling,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        config = SlicingConfig(**{name: kwargs[name] for name in _SLICING_FIELDS})
        plans = [plan_slices(*self._image_size(image), config) for image in images]
        scale = rescale_factor if do_rescale else 1.0
        mean = np.broadcast_to(image_mean if do_normalize else 0.0, 3)
        std = np.broadcast_to(image_std if do_normalize else 1.0, 3)

        def resize_view(image: Any, view: View) -> torch.Tensor:
            return self._resize_view(image, view, resample)

        packed = pack_views(
            images,
            plans,
            resize_view,
            patch_size=config.patch_size,
            gain=(scale / std).tolist(),
            offset=(-mean / std).tolist(),
        )
        return BatchFeature(
            data={**packed, "plans": plans}, tensor_type=return_tensors, skip_tensor_conversion=["plans"]
        )

    def _image_size(self, image: Any) -> tuple[int, int]:
        """(height, width) of an image in the backend's form."""
        raise NotImplementedError

    def _resize_view(self, image: Any, view: View, resample: PILImageResampling) -> torch.Tensor:
        """`uint8[height, width, 3]` of one view, made from the pixels inside its box and no others."""
        raise NotImplementedError


def _flatten(images: Any) -> Any:
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _flatten(image)
    elif isinstance(images, Image.Image) or images.ndim <= 3:
        yield images
    else:
        for image in images:
            yield from _flatten(image)
