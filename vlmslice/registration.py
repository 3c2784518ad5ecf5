"""Makes vlmslice models known to transformers' Auto classes, as a side effect of its import."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

import vlmslice.shrinking.quantisation  # noqa: F401  # registers int8 models
from vlmslice.config import VlmSliceConfig
from vlmslice.image_processing import VlmSliceImageProcessor
from vlmslice.image_processing_pil import VlmSliceImageProcessorPil
from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.processing import VlmSliceProcessor
from vlmslice.vision_encoder import VlmSliceVisionConfig

AutoConfig.register("vlmslice_vision", VlmSliceVisionConfig)
AutoConfig.register("vlmslice", VlmSliceConfig)
AutoModelForImageTextToText.register(VlmSliceConfig, VlmSliceForConditionalGeneration)
AutoImageProcessor.register(
    VlmSliceConfig,
    image_processor_classes={"torchvision": VlmSliceImageProcessor, "pil": VlmSliceImageProcessorPil},
)
AutoProcessor.register(VlmSliceConfig, VlmSliceProcessor)
