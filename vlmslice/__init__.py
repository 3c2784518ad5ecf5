"""vlmslice: a high-resolution vision-language model with adaptive slicing.

Importing the package registers its classes with transformers' Auto classes, after which
`AutoModelForImageTextToText.from_pretrained`, `AutoProcessor.from_pretrained` and
`pipeline("image-text-to-text")` take vlmslice models.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from vlmslice.config import VlmSliceConfig
from vlmslice.errors import VlmSliceError
from vlmslice.image_loading import load_image
from vlmslice.image_processing import VlmSliceImageProcessor
from vlmslice.image_processing_pil import VlmSliceImageProcessorPil
from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.processing import VlmSliceProcessor
from vlmslice.slicing import SlicePlan, SlicingConfig, View, plan_slices
from vlmslice.vision_encoder import VlmSliceVisionConfig

__version__ = "0.1.0"

__all__ = [
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
    "load_image",
    "plan_slices",
]

AutoConfig.register("vlmslice_vision", VlmSliceVisionConfig)
AutoConfig.register("vlmslice", VlmSliceConfig)
AutoModelForImageTextToText.register(VlmSliceConfig, VlmSliceForConditionalGeneration)
AutoImageProcessor.register(
    VlmSliceConfig,
    image_processor_classes={"torchvision": VlmSliceImageProcessor, "pil": VlmSliceImageProcessorPil},
)
AutoProcessor.register(VlmSliceConfig, VlmSliceProcessor)
