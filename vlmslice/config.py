"""VlmSliceConfig: the one place where the parts of a model agree on their sizes."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from vlmslice.errors import suggestion
from vlmslice.slicing import SlicingConfig
from vlmslice.vision_encoder import VlmSliceVisionConfig

CONNECTORS = ("spatial_resampler", "resampler", "pixel_unshuffle", "cross_attention")


@strict
class VlmSliceConfig(PreTrainedConfig):
    """Slicing, vision encoder, connector and language model.

    `slicing` holds the fields of `SlicingConfig`; the image processor is built from it, and so are the connectors,
    so that tokens planned and tokens made cannot differ.

    Attributes:
        connector: one of `CONNECTORS`.
        connector_heads: attention heads of the resamplers and of cross-attention, each `connector_head_dim` wide.
        connector_scale: root mean square of a visual token as it enters the language model. Embeddings of a language
            model are often small; visual tokens much larger than them drown the text.
        cross_attention_interval: with the connector `cross_attention`, every how many layers of the language model look
            at the visual tokens.
        cross_attention_gate: where their gates start. From 0 the language model is at first exactly the one without
            images, as suits a trained one.
        first_fit_layers: which of these, counted from 0, have a head that finds the next object to point at, too (see
            `first_fit`).
        coverage_penalty: with the connector `cross_attention`, by up to how many logits what an answer has read is
            held back from being read again (see `coverage`), if trained with the guide loss. 0 holds nothing back.
        visual_expert_interval: with the other connectors, every how many layers of the language model have weights of
            their own for visual tokens (see `visual_expert`); 0 for none.
        canvas_position: add to every visual token an embedding of its place on the whole image, so that a line of
            text which runs on in the next slice can be followed there.
        dense_loss_weight: weight of the dense (per-cell) loss beside the language loss in training; 0 builds no head.
        guide_loss_weight: weight of the guide loss (see `attention_guide`) in training, for batches that carry places.
        image_token_id: id of the placeholder of the images.
        location_token_id: id of the first of `spatial_schema.LOCATION_TOKENS`, if answers may point; the others follow.
    """

    model_type = "vlmslice"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": VlmSliceVisionConfig,  # type: ignore[dict-item]  # transformers takes a class, too
    }

    vision_config: Any = None  # a VlmSliceVisionConfig; may be given as a dict, like the next
    text_config: Any = None
    slicing: dict[str, Any] = field(default_factory=dict)
    connector: str = "spatial_resampler"
    connector_heads: int = 8
    connector_head_dim: int = 64
    connector_scale: int | float = 0.2
    cross_attention_interval: int = 1
    cross_attention_gate: int | float = 0.0
    first_fit_layers: list[int] = field(default_factory=list)
    coverage_penalty: int | float = 0.0
    visual_expert_interval: int = 0
    canvas_position: bool = True
    dense_loss_weight: int | float = 0.0
    guide_loss_weight: int | float = 0.0
    image_token_id: int = 0
    location_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.slicing = SlicingConfig.from_dict(self.slicing).to_dict()
        if self.connector not in CONNECTORS:
            raise ValueError(
                f"connector is {self.connector!r}, expected one of {', '.join(CONNECTORS)}"
                f"{suggestion(self.connector, CONNECTORS)}"
            )
        if self.slicing["patch_size"] != self.vision_config.patch_size:
            raise ValueError(
                f"slicing.patch_size is {self.slicing['patch_size']}, the vision encoder's is "
                f"{self.vision_config.patch_size}; both must be the encoder's"
            )
        fixed = self.slicing["tokens_per_view"]
        if (self.connector == "resampler") != (fixed is not None):
            raise ValueError(
                f"connector {self.connector!r} with slicing.tokens_per_view={fixed}: the resampler needs a number of "
                "tokens per view, the other connectors give one token per block and take None"
            )
        if self.visual_expert_interval and self.connector == "cross_attention":
            raise ValueError(
                f"visual_expert_interval is {self.visual_expert_interval} with connector 'cross_attention', whose "
                "visual tokens do not stand in the prompt; set it to 0, or choose another connector"
            )

        if self.coverage_penalty < 0 or (self.coverage_penalty and self.connector != "cross_attention"):
            raise ValueError(
                f"coverage_penalty is {self.coverage_penalty} with connector {self.connector!r}, expected 0, or more "
                "with connector 'cross_attention'"
            )

    @property
    def slicing_config(self) -> SlicingConfig:
        return SlicingConfig.from_dict(self.slicing)
