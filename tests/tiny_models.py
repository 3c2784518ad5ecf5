"""Tiny models whose answers depend on their inputs, and the chats to ask them with."""

from __future__ import annotations

import torch
from PIL import Image
from transformers import LlamaConfig

from vlmslice.config import VlmSliceConfig
from vlmslice.image_processing import VlmSliceImageProcessor
from vlmslice.modeling import VlmSliceForConditionalGeneration
from vlmslice.processing import VlmSliceProcessor
from vlmslice.slicing import SlicingConfig
from vlmslice.tokenization import build_byte_tokenizer
from vlmslice.vision_encoder import VlmSliceVisionConfig

CONNECTORS = ("spatial_resampler", "resampler", "pixel_unshuffle", "cross_attention")

_VIT = {"depth": 2, "num_heads": 2, "global_pool": "", "pos_embed_grid_size": (4, 4)}


def tiny_slicing(connector: str = "spatial_resampler", **options) -> SlicingConfig:
    """Slices of up to 4 x 4 patches, so 4 visual tokens, and an overview of up to 2 x 2 patches, so 1."""
    if connector == "resampler":
        options.setdefault("tokens_per_view", 3)
    return SlicingConfig(
        **{"scale_resolution": 64, "overview_resolution": 32, "max_slice_nums": 12, "max_visual_tokens": 64}
        | options
    )


def tiny_config(connector: str = "spatial_resampler", text: dict | None = None, **options) -> VlmSliceConfig:
    tokenizer = build_byte_tokenizer()
    text_config = LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": None,  # answers have a fixed length
            "pad_token_id": tokenizer.pad_token_id,
        }
        | (text or {})
    )
    defaults = {
        "vision_config": VlmSliceVisionConfig(hidden_size=32, timm_kwargs=_VIT),
        "text_config": text_config,
        "slicing": tiny_slicing(connector).to_dict(),
        "connector": connector,
        "connector_heads": 4,
        "connector_head_dim": 16,
        "connector_scale": 1.0,
        "cross_attention_gate": 0.6,
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image|>"),
    }
    return VlmSliceConfig(**defaults | options)


def tiny_model(
    connector: str = "spatial_resampler", seed: int = 0, **options
) -> VlmSliceForConditionalGeneration:
    """A model with random weights, large enough that its greedy answers differ from prompt to prompt.

    Llama's own initialisation (0.02) makes every block nearly the identity; such a model repeats one token, and tests
    that compare its answers would compare constants.
    """
    torch.manual_seed(seed)
    model = VlmSliceForConditionalGeneration(tiny_config(connector, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(50.0 if "embed_tokens" in name or "lm_head" in name else 10.0)
    return model


def tiny_processor(connector: str = "spatial_resampler") -> VlmSliceProcessor:
    image_processor = VlmSliceImageProcessor(**tiny_slicing(connector).to_dict())
    return VlmSliceProcessor(
        image_processor, build_byte_tokenizer(), one_placeholder=connector == "cross_attention"
    )


def noise_image(height: int, width: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(
        0, 256, (height // 8 + 1, width // 8 + 1, 3), generator=generator, dtype=torch.uint8
    )
    return Image.fromarray(coarse.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def chat(text: str, *images: Image.Image) -> list[dict]:
    content: list[dict] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def encode(processor: VlmSliceProcessor, *chats: list[dict]) -> dict[str, torch.Tensor]:
    """Model inputs of a batch of chats."""
    return dict(
        processor.apply_chat_template(
            list(chats), add_generation_prompt=True, tokenize=True, return_dict=True
        )
    )


def answer(model: VlmSliceForConditionalGeneration, inputs: dict, num_tokens: int = 10, **options) -> list:
    """Greedy ids, `num_tokens` of each sample, after its prompt."""
    ids = model.generate(**inputs, max_new_tokens=num_tokens, **{"do_sample": False} | options)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()
