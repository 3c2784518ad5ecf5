"""What both image processors share: inputs, slicing settings, planning, and the call into `view_packing`."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension, PILImageResampling, validate_preprocess_arguments
from transformers.processing_utils import ImagesKwargs

from vlmslice.image_loading import ImageError, ImageSourceError, image_from_array, load_image, read_image_size
from vlmslice.slicing import SlicePlan, SlicingConfig, View, plan_slices
from vlmslice.view_packing import intermediate_size, pack_views

_SLICING_FIELDS = tuple(field.name for field in fields(SlicingConfig))
# Options that every transformers image processor has, but which could only contradict the plan here.
_ALWAYS_ON = ("do_resize", "do_convert_rgb")
_ALWAYS_OFF = ("size", "do_center_crop", "crop_size", "do_pad", "pad_size")


class VlmSliceImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    policy (`str`, *optional*, defaults to `"adaptive"`):
        Name of the slicing policy, one of `slicing_policies.POLICIES`.
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


class SlicingImageProcessor(BaseImageProcessor):
    """Everything but the pixels of an image processor; placed before a transformers backend among the bases.

    A subclass adds `process_image`, from an input to the backend's form of an RGB image, and what is done with that:
    `_image_size`, `_crop`, `_resize`, `_pad` and `_to_array`.
    """

    resample = PILImageResampling.BICUBIC
    do_resize = True
    do_convert_rgb = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
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

    def __init__(self, **kwargs: Unpack[VlmSliceImageProcessorKwargs]):
        super().__init__(**kwargs)  # type: ignore[misc]  # the parent lists only the common kwargs

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

    def source_size(self, image: Any) -> tuple[int, int]:
        """(height, width) that `plan` takes of an image source, array or tensor; of a file the header is read only."""
        if isinstance(image, (np.ndarray, torch.Tensor)):
            width, height = self._to_rgb_image(image, None).size
            return height, width
        return read_image_size(image)

    def fetch_images(self, images: Any, position: str = "images") -> Any:
        """Loads every image source in a nested list; arrays and tensors stay as they are.

        transformers calls this before it counts images. Its own version would fetch URLs from the network.

        Args:
            images: An image source, array or tensor, or lists of them.
            position: How an error names `images`.

        Raises:
            ImageError: An image cannot be loaded; the message starts with its place, such as `images[1][0]`.
        """
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image, f"{position}[{index}]") for index, image in enumerate(images)]
        if isinstance(images, (np.ndarray, torch.Tensor)):
            return images
        try:
            return load_image(images)
        except ImageError as error:
            raise type(error)(f"{position}: {error}") from error

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        """Flattens nested lists, and arrays of more than `expected_ndims` axes, to single images."""
        flat = list(_flatten(self.fetch_images(images), expected_ndims))
        if not flat:
            raise ImageSourceError("got no image; expected at least one; pass images=None for text alone")
        return flat

    def _to_rgb_image(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        input_data_format: str | ChannelDimension | None,
    ) -> Image.Image:
        if isinstance(image, Image.Image):
            return load_image(image)
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
        if image.ndim == 3 and _is_channels_first(image.shape, input_data_format):
            image = np.moveaxis(image, 0, -1)
        return image_from_array(image)

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:  # type: ignore[override]
        contradictions = [name for name in _ALWAYS_ON if not kwargs[name]]
        contradictions += [name for name in _ALWAYS_OFF if kwargs[name]]
        for name in contradictions:
            raise ValueError(
                f"got {name}={kwargs[name]}; expected it unset, since the slice plan sets all sizes and "
                f"every image becomes RGB; use {', '.join(_SLICING_FIELDS)}"
            )
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        validate_preprocess_arguments(**{name: kwargs[name] for name in names})

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

        # What is padded in the mean colour normalises to about zero; black is black.
        red, green, blue = (int(level * 255) for level in np.broadcast_to(image_mean, 3))
        colors = {"black": (0, 0, 0), "mean": (red, green, blue)}

        def draw_views(image: Any, plan: SlicePlan) -> Iterator[torch.Tensor]:
            return self._draw_views(image, plan, resample, colors[plan.fill], config.patch_size)

        packed = pack_views(
            images,
            plans,
            draw_views,
            patch_size=config.patch_size,
            merge_size=config.merge_size,
            gain=(scale / std).tolist(),
            offset=(-mean / std).tolist(),
        )
        return BatchFeature(
            data={**packed, "plans": plans}, tensor_type=return_tensors, skip_tensor_conversion=["plans"]
        )

    def _draw_views(
        self,
        image: Any,
        plan: SlicePlan,
        resample: PILImageResampling,
        fill: tuple[int, int, int],
        patch_size: int,
    ) -> Iterator[torch.Tensor]:
        """`uint8[height, width, 3]` of each view of a plan.

        Slices are made from the pixels inside their boxes and no others, or cut from a canvas to which the whole image
        is resized (see `slicing_policies.Canvas`).
        """
        if plan.canvas is None:
            for view in plan.views:
                yield self._to_array(self._resize_box(image, view, resample, fill))
            return
        if plan.overview is not None:
            yield self._to_array(self._resize_box(image, plan.overview, resample, fill))
        slices = plan.canvas_boxes[-len(plan.slices) :]
        height, width = (side * patch_size for side in slices[-1][2:])
        top, left, bottom, right = plan.canvas.image_box
        resized = self._resize_in_steps(image, plan.image_size, (bottom - top, right - left), resample)
        canvas = self._to_array(self._pad(resized, (top, left, height - bottom, width - right), fill))
        for box in slices:
            top, left, bottom, right = (side * patch_size for side in box)
            yield canvas[top:bottom, left:right]

    def _resize_box(
        self, image: Any, view: View, resample: PILImageResampling, fill: tuple[int, int, int]
    ) -> Any:
        """The box of a view, at the view's size; what lies beyond the image is filled."""
        top, left, bottom, right = (int(edge) for edge in view.box)
        height, width = self._image_size(image)
        inside = (max(top, 0), max(left, 0), min(bottom, height), min(right, width))
        pixels, size = self._crop(image, inside), (inside[2] - inside[0], inside[3] - inside[1])
        if inside != (top, left, bottom, right):
            # First along the side that is not padded: padding at full size would make a 20,000 x 2 px image 1.2 GB.
            size = (
                (view.size[0], size[1])
                if (top, bottom) == (inside[0], inside[2])
                else (size[0], view.size[1])
            )
            padding = (inside[0] - top, inside[1] - left, bottom - inside[2], right - inside[3])
            pixels = self._pad(self._resize(pixels, size, resample), padding, fill)
            return self._resize(pixels, view.size, resample)
        return self._resize_in_steps(pixels, size, view.size, resample)

    def _resize_in_steps(
        self, pixels: Any, source: tuple[int, int], size: tuple[int, int], resample: PILImageResampling
    ) -> Any:
        """See `intermediate_size`."""
        for step in (intermediate_size(source, size), size):
            pixels = self._resize(pixels, step, resample)
        return pixels

    def _image_size(self, image: Any) -> tuple[int, int]:
        """(height, width) of an image in the backend's form."""
        raise NotImplementedError

    def _crop(self, image: Any, box: tuple[int, int, int, int]) -> Any:
        """The part of an image in `(top, left, bottom, right)`, in the backend's form."""
        raise NotImplementedError

    def _resize(self, image: Any, size: tuple[int, int], resample: PILImageResampling) -> Any:
        """An image at another `(height, width)`, by the filter of `resample` and nothing else."""
        raise NotImplementedError

    def _pad(self, image: Any, padding: tuple[int, int, int, int], fill: tuple[int, int, int]) -> Any:
        """An image with so many px of a colour above, before, below and behind it."""
        raise NotImplementedError

    def _to_array(self, image: Any) -> torch.Tensor:
        """`uint8[height, width, 3]` of an image in the backend's form."""
        raise NotImplementedError


def _is_channels_first(shape: tuple[int, ...], input_data_format: str | ChannelDimension | None) -> bool:
    """Whether `shape` has the channels in front; where both readings fit, it does, as in transformers."""
    if input_data_format is None:
        return shape[0] in (1, 3, 4)
    return ChannelDimension(input_data_format) == ChannelDimension.FIRST


def _flatten(images: Any, max_ndims: int) -> Iterator[Any]:
    is_batch = isinstance(images, list) or (not isinstance(images, Image.Image) and images.ndim > max_ndims)
    if not is_batch:
        yield images
        return
    for image in images:
        yield from _flatten(image, max_ndims)
