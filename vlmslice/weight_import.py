"""The parts of a composed model from local files: a vision encoder, and a language model with its tokenizer.

Only formats that are pure data are opened: safetensors, GGUF and ONNX. Pickles (`.bin`, `.pt`, `.pth`, `.ckpt`) can run
code when they are loaded and are refused. Nothing is fetched, and no code that lies beside weights is run.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg, naflexvit, vision_transformer
from timm.models.vision_transformer import VisionTransformer
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlmslice.errors import VlmSliceError, suggestion
from vlmslice.image_processing import VlmSliceImageProcessor
from vlmslice.onnx_vit import OnnxVit, onnx_image_size, read_onnx_vit, run_onnx_stream
from vlmslice.tokenization import build_byte_tokenizer
from vlmslice.view_packing import split_into_patches
from vlmslice.vision_encoder import VlmSliceVisionConfig, VlmSliceVisionEncoder, build_named_vit

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
# Parameters of a timm ViT that a vision encoder has no use for: what comes after the patch features.
_HEADS = re.compile(r"(head|attn_pool|fc_norm|head_dist)\.|mask_token$|logit_(scale|bias)$")

# Pre-tokenizers of GGUF files that set every digit apart before GPT-2's rule applies. transformers 5.23 knows most
# pre-tokenizers but not these, and would join what stands before a number otherwise ("\n\n1"): 46 of 82,275 tokens of
# source text with SmolLM2, none with this.
_DIGITS_APART = ("smollm",)

# Largest difference between our features and those of an ONNX graph, in units of their root mean square. Rounding in
# fp32 makes 2e-5 with a DINOv2 ViT-S; resizing its position table with antialiasing instead of without makes 0.4.
_PARITY_TOLERANCE = 1e-3


class ImportWeightsError(VlmSliceError, ValueError):
    """A part of a model cannot be made from the source that was given."""


@dataclass(frozen=True)
class ImportedVision:
    """A vision encoder and what an image processor must know of it.

    Attributes:
        encoder: Its config names the architecture.
        image_mean: What it was trained with, per channel.
        image_std: As `image_mean`.
        resolution: Side in px of the square that its position table covers.
        summary: One line on where the weights come from.
        record: The same for `composition.json`.
    """

    encoder: VlmSliceVisionEncoder
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    resolution: int
    summary: str
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImportedLanguage:
    """A causal language model and its tokenizer, as they were.

    Attributes:
        model: In fp32.
        tokenizer: Without the tokens of the spatial schema.
        summary: One line on where the weights come from.
        record: The same for `composition.json`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    summary: str
    record: dict[str, Any] = field(default_factory=dict)


def import_vision(
    source: str, architecture: str | None = None, feature_layer: int | None = None
) -> ImportedVision:
    """Makes a vision encoder.

    Args:
        source: One of

            - a timm name, such as `vit_small_patch14_dinov2`: random weights
            - a `.safetensors` file in timm's names (or in those of a release that timm converts): `architecture` is
              needed
            - an `.onnx` file: `architecture` is needed; the graph's own features are the check
            - a folder that timm saved for a hub (`config.json` with `architecture`, `model.safetensors`)
            - a folder of a vlmslice model: its encoder
        architecture: timm name.
        feature_layer: Number of transformer blocks to keep; None keeps all.

    Raises:
        ImportWeightsError: The source is none of these, is a pickle, or does not fit the architecture.
        OnnxImportError: An ONNX graph is not the architecture's.
    """
    path = Path(source)
    _refuse_pickle(path)
    if path.is_dir():
        config = _read_json(path / "config.json", "a timm or vlmslice model folder")
        if config.get("model_type") == "vlmslice":
            return _vision_of_vlmslice(path, config, feature_layer)
        if "architecture" not in config:
            raise ImportWeightsError(
                f"{path}/config.json has model_type {config.get('model_type')!r} and no timm architecture; expected a "
                "folder saved by timm or by vlmslice; give the .safetensors file and its timm architecture instead"
            )
        imported = _vision_of_safetensors(path / "model.safetensors", config["architecture"], feature_layer)
        return _with_statistics(imported, config.get("pretrained_cfg", {}))
    if path.suffix == ".onnx" and path.is_file():
        return _vision_of_onnx(path, _needed(architecture, path), feature_layer)
    if path.suffix == ".safetensors" and path.is_file():
        return _vision_of_safetensors(path, _needed(architecture, path), feature_layer)
    if path.suffix in (".onnx", ".safetensors"):
        raise ImportWeightsError(f"vision file {source!r} does not exist; check the path")
    if architecture not in (None, source):
        raise ImportWeightsError(
            f"vision is {source!r} and the architecture {architecture!r}; expected a file of weights beside an "
            "architecture; give either a timm name alone or a path"
        )
    encoder = VlmSliceVisionEncoder(_vision_config(source, feature_layer))
    return _imported_vision(
        encoder, "random weights, as no local file was given", {"architecture": source, "weights": "random"}
    )


def import_language(source: str, tokenizer: str | None = None) -> ImportedLanguage:
    """Makes a causal language model with its tokenizer.

    Args:
        source: One of

            - a folder with `config.json` and safetensors
            - a `.gguf` file; quantised weights become fp32
            - a `config.json`: random weights
        tokenizer: Folder of the tokenizer, or `"bytes"` for the byte tokenizer. By default it is the one beside the
            weights; random weights without any get the byte tokenizer.

    Raises:
        ImportWeightsError: The source is none of these, or has weights only as a pickle.
    """
    path = Path(source)
    _refuse_pickle(path)
    if path.is_dir():
        return _language_of_folder(path, tokenizer)
    if not path.is_file():
        raise ImportWeightsError(
            f"language model {source!r} does not exist; expected a folder of safetensors, a .gguf file or a "
            "config.json on this machine"
        )
    if path.suffix == ".gguf":
        return _language_of_gguf(path, tokenizer)
    if path.suffix == ".json":
        return _language_of_config(path, tokenizer)
    raise ImportWeightsError(
        f"language model {source!r} is a {path.suffix or 'nameless'} file; expected a folder of safetensors, a .gguf "
        "file or a config.json"
    )


def naflex_state_dict(
    state: Mapping[str, torch.Tensor], config: VlmSliceVisionConfig
) -> dict[str, torch.Tensor]:
    """Renames the parameters of a classic timm ViT to those of its NaFlex form.

    What an encoder has no use for is left out: heads, and the blocks after `config.feature_layer`.

    Args:
        state: Parameters under timm's classic names, under those of a release that timm converts (DINOv2), or of the
            NaFlex form already.
        config: Of the encoder.
    """
    with torch.device("meta"):
        vit = VlmSliceVisionEncoder(config).vit
    state = {name: value.clone() for name, value in state.items()}
    if "register_tokens" in state or "mask_token" in state:
        classic = _classic_vit(config.architecture, state["pos_embed"].shape[1], vit.embeds.patch_size[0])
        state = vision_transformer.checkpoint_filter_fn(state, classic)
    state = naflexvit.checkpoint_filter_fn(state, vit)
    wanted = {}
    for name, value in state.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        if not _HEADS.match(name) and not (block and int(block[1]) >= len(vit.blocks)):
            wanted[name] = value.float()
    return wanted


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _vision_of_safetensors(path: Path, architecture: str, feature_layer: int | None) -> ImportedVision:
    if not path.is_file():
        raise ImportWeightsError(f"{path} does not exist; expected the weights of the vision encoder there")
    state = _read_safetensors(path)
    encoder = _load_encoder(state, _table_side(state), architecture, feature_layer, {}, path)
    record = {"architecture": architecture, "weights": path.name, "sha256": file_digest(path)}
    return _imported_vision(encoder, f"weights of {path.name}", record)


def _vision_of_onnx(path: Path, architecture: str, feature_layer: int | None) -> ImportedVision:
    vit = read_onnx_vit(path, _classic_vit(architecture))
    kwargs = {} if vit.pos_embed_antialias is None else {"pos_embed_antialias": vit.pos_embed_antialias}
    encoder = _load_encoder(vit.state_dict, vit.table_side, architecture, feature_layer, kwargs, path)
    size, difference, rms = _onnx_parity(path, vit, encoder)
    if not difference <= _PARITY_TOLERANCE * rms:
        raise ImportWeightsError(
            f"{path.name}: at {size[0]}x{size[1]} px the features of {architecture} differ from those of the graph by "
            f"up to {difference:.2g} (root mean square {rms:.2g}), expected at most {_PARITY_TOLERANCE * rms:.2g}; "
            "the graph computes something else, such as another activation; give the architecture that was exported"
        )
    parity = {"image_size": size, "max_abs_difference": difference, "rms": rms}
    record = {
        "architecture": architecture,
        "weights": path.name,
        "sha256": file_digest(path),
        "parity": parity,
    }
    summary = (
        f"weights of {path.name}; features equal onnxruntime's at {size[0]}x{size[1]} px to {difference:.1e} "
        f"(root mean square {rms:.2f})"
    )
    return _imported_vision(encoder, summary, record)


@torch.no_grad()
def _onnx_parity(
    path: Path, vit: OnnxVit, encoder: VlmSliceVisionEncoder
) -> tuple[tuple[int, int], float, float]:
    """Image size, largest difference of patch features, and their root mean square, on a fixed random image."""
    patch_size, native = encoder.config.patch_size, vit.table_side * encoder.config.patch_size
    height, width = onnx_image_size(path) or (native, native)
    image = np.random.default_rng(0).standard_normal((1, 3, height, width), dtype=np.float32)
    num_blocks = len(encoder.vit.blocks)
    (stream,) = run_onnx_stream(path, [vit.stream[num_blocks]], image)
    expected = encoder.vit.norm(torch.from_numpy(stream))[:, encoder.vit.num_prefix_tokens :]
    patches = split_into_patches(torch.from_numpy(image[0]).permute(1, 2, 0), patch_size)
    grid = torch.tensor([[height // patch_size, width // patch_size]])
    features, _ = encoder.eval()(patches[None], grid)
    return (height, width), float((features - expected).abs().max()), float(expected.square().mean().sqrt())


def _vision_of_vlmslice(path: Path, config: dict[str, Any], feature_layer: int | None) -> ImportedVision:
    vision_config = VlmSliceVisionConfig(**config["vision_config"])
    if feature_layer is not None:
        vision_config.feature_layer = feature_layer
    prefix = "vision_encoder.vit."
    state: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors = _read_safetensors(file)
        state |= {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    encoder = VlmSliceVisionEncoder(vision_config)
    _load_strictly(encoder, naflex_state_dict(state, vision_config), path)
    record = {"architecture": vision_config.architecture, "weights": f"encoder of {path.name}"}
    processor = VlmSliceImageProcessor.from_pretrained(path)
    imported = _imported_vision(encoder, f"encoder of the vlmslice model {path.name}", record)
    statistics = {"mean": processor.image_mean, "std": processor.image_std}
    return _with_statistics(imported, statistics)


def _load_encoder(
    state: Mapping[str, torch.Tensor],
    table_side: int | None,
    architecture: str,
    feature_layer: int | None,
    timm_kwargs: dict[str, Any],
    path: Path,
) -> VlmSliceVisionEncoder:
    config = _vision_config(architecture, feature_layer, timm_kwargs)
    encoder = VlmSliceVisionEncoder(config)
    table = encoder.vit.embeds.pos_embed
    if table is not None and table_side is not None and table.shape[1] != table_side:
        # A checkpoint fine-tuned at another resolution brings a table of another size; keep it as it is.
        kwargs = timm_kwargs | {"img_size": table_side * config.patch_size}
        config = _vision_config(architecture, feature_layer, kwargs)
        encoder = VlmSliceVisionEncoder(config)
    _load_strictly(encoder, naflex_state_dict(state, config), path)
    return encoder


def _load_strictly(encoder: VlmSliceVisionEncoder, state: Mapping[str, torch.Tensor], path: Path) -> None:
    own = encoder.vit.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not known" for name in state if name not in own]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:3])
        raise ImportWeightsError(
            f"{path.name} does not fit the vision architecture {encoder.config.architecture!r}: {shown}"
            f"{f'; and {len(problems) - 3} more' if len(problems) > 3 else ''}; give the timm architecture that the "
            "file was saved from"
        )
    encoder.vit.load_state_dict(state)


def _vision_config(
    architecture: str, feature_layer: int | None, timm_kwargs: dict[str, Any] | None = None
) -> VlmSliceVisionConfig:
    """The config of a timm architecture, with width and patch size read off timm's module."""
    if not timm.is_model(architecture):
        hint = suggestion(architecture, timm.list_models())
        raise ImportWeightsError(
            f"vision is {architecture!r}, neither a file nor a model of timm {timm.__version__}{hint}; expected a timm "
            "ViT, an .onnx or .safetensors file, or a model folder"
        )
    try:
        with torch.device("meta"):
            vit = build_named_vit(architecture)
    except ValueError as error:
        raise ImportWeightsError(
            f"vision architecture {architecture!r} has no NaFlex form in timm; expected a ViT such as "
            "'vit_small_patch14_dinov2'"
        ) from error
    config = VlmSliceVisionConfig(
        architecture=architecture,
        hidden_size=vit.embed_dim,
        patch_size=vit.embeds.patch_size[0],
        timm_kwargs=timm_kwargs or None,
        feature_layer=feature_layer,
    )
    if feature_layer is not None and not 1 <= feature_layer <= len(vit.blocks):
        raise ImportWeightsError(
            f"feature_layer is {feature_layer}, expected 1 to {len(vit.blocks)}, the blocks of {architecture!r}"
        )
    return config


def _classic_vit(architecture: str, num_table: int | None = None, patch_size: int = 0) -> VisionTransformer:
    """The classic form of a timm ViT without weights, its position table of `num_table` rows."""
    _vision_config(architecture, None)  # names what is wrong with the architecture
    kwargs: dict[str, Any] = {}
    if num_table is not None:
        kwargs["img_size"] = math.isqrt(num_table) * patch_size
    with torch.device("meta"):
        vit = timm.create_model(architecture, pretrained=False, num_classes=0, **kwargs)
    if not isinstance(vit, VisionTransformer):
        raise ImportWeightsError(
            f"vision architecture {architecture!r} is a {type(vit).__name__}; expected one of timm's "
            "VisionTransformer family (`vit_*`) for this kind of file"
        )
    return vit


def _table_side(state: Mapping[str, torch.Tensor]) -> int | None:
    """Side of a checkpoint's square position table, whether or not it counts the class token and the registers."""
    table = state.get("pos_embed", state.get("embeds.pos_embed"))
    if table is None:
        return None
    if table.ndim == 4:
        return table.shape[1]
    num_prefix = sum(state[name].shape[1] for name in ("cls_token", "reg_token") if name in state)
    for rows in (table.shape[1], table.shape[1] - num_prefix, table.shape[1] - 1):
        if math.isqrt(rows) ** 2 == rows:
            return math.isqrt(rows)
    return None


def _imported_vision(encoder: VlmSliceVisionEncoder, summary: str, record: dict[str, Any]) -> ImportedVision:
    config, table = encoder.config, encoder.vit.embeds.pos_embed
    defaults = get_pretrained_cfg(config.architecture, allow_unregistered=True)
    mean, std = (defaults.mean, defaults.std) if defaults is not None else ((0.5,) * 3, (0.5,) * 3)
    side = 224 // config.patch_size if table is None else table.shape[1]
    blocks = "" if config.feature_layer is None else f", first {config.feature_layer} blocks"
    return ImportedVision(
        encoder=encoder,
        image_mean=tuple(mean),
        image_std=tuple(std),
        resolution=side * config.patch_size,
        summary=f"{config.architecture}{blocks}: {summary}",
        record=record | {"feature_layer": config.feature_layer},
    )


def _with_statistics(imported: ImportedVision, statistics: Mapping[str, Any]) -> ImportedVision:
    values = vars(imported)
    if statistics.get("mean") is not None:
        values = values | {"image_mean": tuple(statistics["mean"]), "image_std": tuple(statistics["std"])}
    return ImportedVision(**values)


def _language_of_folder(path: Path, tokenizer: str | None) -> ImportedLanguage:
    _read_json(path / "config.json", "a language model folder")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES)
        for name in pickles:
            _refuse_pickle(path / name)
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = (
            f"give the file {path.name}/{ggufs[0]}" if ggufs else "give config.json itself for random weights"
        )
        raise ImportWeightsError(
            f"{path} holds no safetensors; expected the weights of the language model; {hint}"
        )
    model = _load_causal_lm(path, use_safetensors=True)
    record = {
        "model_type": model.config.model_type,
        "weights": {file.name: file_digest(file) for file in weights},
    }
    return ImportedLanguage(
        model, _load_tokenizer(path, tokenizer), f"{model.config.model_type}: weights of {path.name}", record
    )


def _language_of_gguf(path: Path, tokenizer: str | None) -> ImportedLanguage:
    if find_spec("gguf") is None:
        raise ImportWeightsError(
            "a GGUF file needs the package gguf, which is not installed; pip install gguf, or give a folder of "
            "safetensors"
        )
    model = _load_causal_lm(path.parent, gguf_file=path.name)
    # transformers notes the file as the model's quantisation, which a reload of the dequantised weights would look for.
    del model.config.quantization_config
    loaded = _tokenizer_of_gguf(path) if tokenizer is None else _load_tokenizer(path.parent, tokenizer)
    record = {
        "model_type": model.config.model_type,
        "weights": {path.name: file_digest(path)},
    }
    return ImportedLanguage(
        model, loaded, f"{model.config.model_type}: weights of {path.name}, dequantised to fp32", record
    )


def _tokenizer_of_gguf(path: Path) -> PreTrainedTokenizerBase:
    from gguf import GGUFReader

    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    rule = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    if rule is not None and rule.contents() in _DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    return tokenizer


def _language_of_config(path: Path, tokenizer: str | None) -> ImportedLanguage:
    beside = any((path.parent / name).exists() for name in _TOKENIZER_FILES)
    loaded = _load_tokenizer(path.parent, tokenizer if beside or tokenizer else "bytes")
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    config.vocab_size = max(config.vocab_size, len(loaded)) if beside else len(loaded)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    words = "its tokenizer" if beside or tokenizer else "the byte tokenizer, as there is none beside it"
    return ImportedLanguage(
        model,
        loaded,
        f"{config.model_type}: random weights, as {path.name} is a config alone; {words}",
        {"model_type": config.model_type, "weights": "random"},
    )


def _load_causal_lm(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """Loads a language model whole: transformers would fill what is missing with random weights and go on."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **kwargs,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ImportWeightsError(
            f"the language model in {folder} cannot be loaded: {error}; expected a causal language model that "
            "transformers has built in"
        ) from error
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ImportWeightsError(
            f"the language model in {folder} lacks {len(missing)} weights, such as {missing[0]}; expected all of a "
            f"{type(model).__name__}; fetch the folder again"
        )
    return model


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ImportWeightsError(f"{path} is no whole safetensors file ({error}); fetch it again") from error


def _load_tokenizer(folder: Path, tokenizer: str | None) -> PreTrainedTokenizerBase:
    if tokenizer == "bytes":
        return build_byte_tokenizer()
    source = folder if tokenizer is None else Path(tokenizer)
    if not any((source / name).exists() for name in _TOKENIZER_FILES):
        raise ImportWeightsError(
            f"no tokenizer in {source}; expected one of {', '.join(_TOKENIZER_FILES)}; give a tokenizer folder, or "
            "'bytes' for the byte tokenizer"
        )
    return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)


def _refuse_pickle(path: Path) -> None:
    if path.suffix in _PICKLES:
        raise ImportWeightsError(
            f"{path.name} is a pickle, which can run code when it is loaded; expected safetensors, GGUF or ONNX; where "
            "you trust the file, convert it once: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        )


def _needed(architecture: str | None, path: Path) -> str:
    if architecture is None:
        raise ImportWeightsError(
            f"{path.name} does not say which ViT it holds; give its timm name, such as "
            "vision_architecture='vit_small_patch14_dinov2' (--vision-architecture)"
        )
    return architecture


def _read_json(path: Path, expected: str) -> dict[str, Any]:
    if not path.is_file():
        raise ImportWeightsError(f"{path} does not exist; expected {expected}")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ImportWeightsError(f"{path} is not JSON ({error}); expected {expected}") from error
