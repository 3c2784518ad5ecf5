"""Compose a model from a vision encoder, a language model and a connector, and save it ready for training.

    timm ViT / .onnx / .safetensors ----> vision encoder --+
                                          connector (new) -+--> model, processor, generation config --> folder
    folder / .gguf / config.json -------> language model --+

What joins the parts is made here: the tokens of the spatial schema get rows in the embeddings, the connector speaks at
the loudness of those embeddings, and the image processor normalises as the encoder was taught.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
import transformers
import typer
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlmslice.config import VlmSliceConfig
from vlmslice.connectors import build_connector
from vlmslice.cross_attention import CrossAttentionLayers
from vlmslice.errors import VlmSliceError
from vlmslice.image_processing import VlmSliceImageProcessor
from vlmslice.modeling import CanvasPosition, VlmSliceForConditionalGeneration
from vlmslice.processing import VlmSliceProcessor
from vlmslice.slicing import SlicingConfig
from vlmslice.slicing_policies import POLICIES
from vlmslice.spatial_schema import add_special_tokens
from vlmslice.visual_expert import VisualExpertLayers
from vlmslice.weight_import import ImportedLanguage, ImportedVision, import_language, import_vision

# New rows are the mean of the old ones plus noise, of a tenth of their spread: close enough to the mean to be neutral
# (Hewitt, 2021, "Initializing New Word Embeddings"), far enough apart to be told apart from the first step.
_NEW_ROW_NOISE = 0.1

RECORD_FILE = "composition.json"


class ComposeError(VlmSliceError, ValueError):
    """The parts cannot be joined as asked."""


@dataclass(frozen=True)
class Composition:
    """A composed model.

    Attributes:
        model: In evaluation mode.
        processor: Its processor.
        num_parameters: By part.
        summary: What each part is, line by line.
        record: Origin and digests of the parts, measured parity and settings; saved as `composition.json`.
    """

    model: VlmSliceForConditionalGeneration
    processor: VlmSliceProcessor
    num_parameters: dict[str, int]
    summary: tuple[str, ...]
    record: dict[str, Any]

    def save(self, output: Path) -> None:
        """Saves model, processor, generation config and record to a folder, which appears only when it is complete."""
        partial = output.with_name(output.name + ".partial")
        if partial.exists():
            shutil.rmtree(partial)
        self.model.save_pretrained(partial)
        self.processor.save_pretrained(partial)
        (partial / RECORD_FILE).write_text(json.dumps(self.record, indent=2) + "\n")
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)


def compose(
    vision: str,
    language: str,
    output: str | Path | None = None,
    *,
    connector: str = "spatial_resampler",
    tokens_per_view: int | None = None,
    vision_architecture: str | None = None,
    feature_layer: int | None = None,
    tokenizer: str | None = None,
    policy: str = "adaptive",
    scale_resolution: int | None = None,
    overview_resolution: int | None = None,
    merge_size: int = 2,
    max_slice_nums: int = 36,
    max_visual_tokens: int = 2048,
    connector_heads: int = 8,
    connector_head_dim: int = 64,
    cross_attention_interval: int = 4,
    visual_expert_interval: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
    overwrite: bool = False,
) -> Composition:
    """Builds a model from parts; what was not loaded (the connector, new tokens) is random by `seed`.

    A DINOv2 ViT-S/14 at `scale_resolution=448` sees 32 x 32 patches in a slice; `merge_size=4` makes that 64 visual
    tokens, so nine slices and an overview cost 640.

    Args:
        vision: See `weight_import.import_vision`.
        language: See `weight_import.import_language`.
        output: Folder to save to; None saves nothing.
        connector: Name, see `connectors`.
        tokens_per_view: Visual tokens of every view, for the connector `"resampler"` and only for it.
        vision_architecture: timm name of the ViT in a file of weights.
        feature_layer: Blocks of the ViT to keep.
        tokenizer: Folder, or `"bytes"`; by default the language model's.
        policy: Slicing policy.
        scale_resolution: Side in px of the square whose area bounds a slice; by default what the position table of
            the encoder covers.
        overview_resolution: The same for the overview; by default as `scale_resolution`.
        merge_size: Side in patches of the block that becomes one visual token.
        max_slice_nums: Most slices of an image.
        max_visual_tokens: Most visual tokens of an image.
        connector_heads: Attention heads of a resampler or of cross-attention.
        connector_head_dim: Width of one such head.
        cross_attention_interval: With the connector `"cross_attention"`, every how many layers of the language model
            look at the image.
        visual_expert_interval: With another connector, every how many layers of the language model get weights of their
            own for visual tokens, at first copies; 0 for none. See `visual_expert`.
        dtype: Of the saved weights.
        seed: Of everything random.
        overwrite: Whether `output` may exist and is replaced.

    Raises:
        ComposeError: The parts cannot be joined as asked.
        ImportWeightsError: A part cannot be made.
    """
    if output is not None:
        _check_output(Path(output), overwrite)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        eye = import_vision(vision, vision_architecture, feature_layer)
        text = import_language(language, tokenizer)
        slicing = SlicingConfig(
            policy=policy,
            scale_resolution=eye.resolution if scale_resolution is None else scale_resolution,
            overview_resolution=overview_resolution,
            patch_size=eye.encoder.config.patch_size,
            merge_size=merge_size,
            max_slice_nums=max_slice_nums,
            tokens_per_view=tokens_per_view,
            max_visual_tokens=max_visual_tokens,
        )
        looks_beside = connector == "cross_attention"
        if not looks_beside:
            _check_context(text.model, slicing)
        embedding_rms = _embedding_rms(text.model)
        num_new = adopt_tokens(text.model, text.tokenizer)
        processor = _build_processor(eye, text.tokenizer, slicing, one_placeholder=looks_beside)
        try:
            config = VlmSliceConfig(
                vision_config=eye.encoder.config,
                text_config=text.model.config,
                slicing=slicing.to_dict(),
                connector=connector,
                connector_heads=connector_heads,
                connector_head_dim=connector_head_dim,
                connector_scale=embedding_rms,
                cross_attention_interval=cross_attention_interval,
                visual_expert_interval=visual_expert_interval,
                image_token_id=processor.image_token_id,  # type: ignore[arg-type]  # one token has one id
                tie_word_embeddings=text.model.config.tie_word_embeddings,
            )
            model = _join(config, eye, text).to(getattr(torch, dtype))
        except ValueError as error:
            raise ComposeError(str(error)) from error
    model.stop_as(text.tokenizer)
    model.generation_config.do_sample = False
    num_parameters = {
        "vision encoder": _count(model.vision_encoder),
        "connector": sum(
            _count(part) for part in (model.connector, model.canvas_position, model.cross_attention) if part
        ),
        "language model": _count(model.language_model),
    }
    if model.visual_expert is not None:
        num_parameters["visual expert"] = _count(model.visual_expert)
    summary = (
        f"vision encoder  {eye.summary}",
        f"connector       {connector}: random weights, scale {embedding_rms:.3f} (that of the text embeddings)",
        f"language model  {text.summary}; {num_new} tokens added",
    )
    composition = Composition(
        model=model.eval(),
        processor=processor,
        num_parameters=num_parameters,
        summary=summary,
        record={
            "vision": eye.record,
            "language": text.record,
            "connector": connector,
            "seed": seed,
            "num_parameters": num_parameters,
            "versions": {m.__name__: m.__version__ for m in (torch, timm, transformers)},
        },
    )
    if output is not None:
        composition.save(Path(output))
    return composition


@torch.no_grad()
def adopt_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Adds the tokens of the spatial schema to a language model and its tokenizer, and makes `<|end|>` its end.

    A token that the tokenizer had before (Phi-3 has `<|user|>`) keeps its row. The others get the mean of the rows
    that the tokenizer used, plus a little noise, in the input embeddings and in an untied output head alike. Rows that
    a model holds in reserve (Qwen2 has some 270) are used first.

    Returns:
        The number of tokens added.
    """
    num_old = len(tokenizer)
    num_new = add_special_tokens(tokenizer)
    if len(tokenizer) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = [model.get_input_embeddings().weight]
    if not model.config.tie_word_embeddings:
        tables.append(model.get_output_embeddings().weight)
    for table in tables:
        old = table[:num_old]
        noise = torch.randn_like(table[num_old : len(tokenizer)]) * old.std(dim=0)
        table[num_old : len(tokenizer)] = old.mean(dim=0) + _NEW_ROW_NOISE * noise
    for name in ("bos", "eos", "pad"):
        setattr(model.config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    return num_new


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise ComposeError(
            f"{output} exists; expected a new folder; choose another or pass overwrite=True (--overwrite)"
        )
    if not (output / RECORD_FILE).is_file():
        raise ComposeError(
            f"{output} holds no {RECORD_FILE}, so it is not a composed model and will not be replaced; choose another "
            "folder"
        )


def _check_context(model: PreTrainedModel, slicing: SlicingConfig) -> None:
    context = model.config.to_dict().get("max_position_embeddings")
    if context is not None and slicing.max_visual_tokens >= context:
        raise ComposeError(
            f"max_visual_tokens is {slicing.max_visual_tokens}, but the language model reads {context} tokens in all; "
            f"lower max_visual_tokens (--max-visual-tokens) well below {context}, to leave room for text"
        )


@torch.no_grad()
def _embedding_rms(model: Any) -> float:
    """Root mean square of the text embeddings as they enter the first layer (Gemma scales them on the way)."""
    embedding = model.get_input_embeddings()
    ids = torch.arange(len(embedding.weight))
    mean_squares = torch.cat([embedding(part).square().mean(dim=-1) for part in ids.split(16384)])
    return float(mean_squares.mean().sqrt())


def _build_processor(
    eye: ImportedVision, tokenizer: PreTrainedTokenizerBase, slicing: SlicingConfig, one_placeholder: bool
) -> VlmSliceProcessor:
    image_processor = VlmSliceImageProcessor(
        **slicing.to_dict(), image_mean=list(eye.image_mean), image_std=list(eye.image_std)
    )
    processor = VlmSliceProcessor(image_processor, tokenizer, one_placeholder=one_placeholder)
    # A chat template of the language model's own would be found by tools that ask the tokenizer.
    tokenizer.chat_template = processor.chat_template
    return processor


def _join(
    config: VlmSliceConfig, eye: ImportedVision, text: ImportedLanguage
) -> VlmSliceForConditionalGeneration:
    """The model of the loaded parts; the shell is built without memory, so a large language model is held once."""
    with torch.device("meta"):
        model = VlmSliceForConditionalGeneration(config)
    model.vision_encoder = eye.encoder
    model.connector = build_connector(config)
    model.canvas_position = CanvasPosition(config)
    model.language_model = text.model
    if model.cross_attention is not None:
        model.cross_attention = CrossAttentionLayers(config, text.model)
    if model.visual_expert is not None:
        model.visual_expert = VisualExpertLayers(config, text.model)
    return model


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def compose_command(
    vision: Annotated[
        str, typer.Option(help="timm name (random weights), .onnx or .safetensors file, or a model folder.")
    ],
    language: Annotated[
        str, typer.Option(help="Folder of safetensors, .gguf file, or config.json (random weights).")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to save the model to.")],
    connector: Annotated[
        str, typer.Option(help="spatial_resampler, resampler, pixel_unshuffle or cross_attention.")
    ] = "spatial_resampler",
    cross_attention_interval: Annotated[
        int,
        typer.Option(help="With cross_attention: every how many layers of the language model look.", min=1),
    ] = 4,
    visual_expert_interval: Annotated[
        int,
        typer.Option(
            help="Every how many layers of the language model get weights of their own for visual tokens; 0: none.",
            min=0,
        ),
    ] = 0,
    tokens_per_view: Annotated[
        int | None, typer.Option(help="Visual tokens of every view; for the resampler, and only for it.")
    ] = None,
    vision_architecture: Annotated[
        str | None, typer.Option(help="timm name of the ViT in a file of weights.")
    ] = None,
    feature_layer: Annotated[
        int | None, typer.Option(help="Blocks of the ViT to keep; all by default.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder, or 'bytes'; by default the language model's.")
    ] = None,
    policy: Annotated[str, typer.Option(help=f"{', '.join(POLICIES)}.")] = "adaptive",
    scale_resolution: Annotated[
        int | None,
        typer.Option(help="Side in px of the square that bounds a slice; the encoder's by default."),
    ] = None,
    overview_resolution: Annotated[int | None, typer.Option(help="The same for the overview.")] = None,
    merge_size: Annotated[
        int, typer.Option(help="Side in patches of the block that becomes a visual token.")
    ] = 2,
    max_slice_nums: Annotated[int, typer.Option(help="Most slices of an image.")] = 36,
    max_visual_tokens: Annotated[int, typer.Option(help="Most visual tokens of an image.")] = 2048,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of the saved weights.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Build a model from a ViT, a language model and a connector, and save it ready for training."""
    console = Console(stderr=True)
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"got {dtype!r}, expected float32 or bfloat16", param_hint="--dtype")
    try:
        composition = compose(
            vision,
            language,
            output,
            connector=connector,
            cross_attention_interval=cross_attention_interval,
            visual_expert_interval=visual_expert_interval,
            tokens_per_view=tokens_per_view,
            vision_architecture=vision_architecture,
            feature_layer=feature_layer,
            tokenizer=tokenizer,
            policy=policy,
            scale_resolution=scale_resolution,
            overview_resolution=overview_resolution,
            merge_size=merge_size,
            max_slice_nums=max_slice_nums,
            max_visual_tokens=max_visual_tokens,
            dtype=dtype,  # type: ignore[arg-type]  # checked above
            seed=seed,
            overwrite=overwrite,
        )
    except VlmSliceError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    for line in composition.summary:
        console.print(line, highlight=False, soft_wrap=True)
    counts = ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in composition.num_parameters.items())
    console.print(f"parameters      {counts}", highlight=False, soft_wrap=True)
    console.print(f"saved to        {output}", highlight=False, soft_wrap=True)
