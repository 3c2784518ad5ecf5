"""vlmslice: a high-resolution vision-language model with adaptive slicing.

Importing the package registers its classes with transformers' Auto classes, after which
`AutoModelForImageTextToText.from_pretrained`, `AutoProcessor.from_pretrained` and
`pipeline("image-text-to-text")` take vlmslice models.
"""

import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Assistant",
    "SlicePlan",
    "SlicingConfig",
    "View",
    "VlmSliceConfig",
    "VlmSliceError",
    "VlmSliceForConditionalGeneration",
    "VlmSliceImageProcessor",
    "VlmSliceImageProcessorPil",
    "VlmSliceProcessor",
    "VlmSliceVisionConfig",
    "draw_plan",
    "load_image",
    "plan_slices",
    "read_image_size",
]

# The `vlmslice` command imports modules as it needs them, so that what needs no torch does not wait for it.
if TYPE_CHECKING or "vlmslice_command" not in sys.modules:
    import vlmslice.registration  # noqa: F401  # for its side effect
    from vlmslice.config import VlmSliceConfig
    from vlmslice.drawing import draw_plan
    from vlmslice.errors import VlmSliceError
    from vlmslice.image_loading import load_image, read_image_size
    from vlmslice.image_processing import VlmSliceImageProcessor
    from vlmslice.image_processing_pil import VlmSliceImageProcessorPil
    from vlmslice.inference import Answer, Assistant
    from vlmslice.modeling import VlmSliceForConditionalGeneration
    from vlmslice.processing import VlmSliceProcessor
    from vlmslice.slicing import SlicePlan, SlicingConfig, View, plan_slices
    from vlmslice.vision_encoder import VlmSliceVisionConfig
