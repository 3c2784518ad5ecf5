"""Width scaling: the rules of muP, what they are for (steps that change activations alike), and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import chat, encode, noise_image, tiny_config, tiny_processor
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from vlmslice import VlmSliceForConditionalGeneration
from vlmslice.dense_reader import DenseReader
from vlmslice.training import Stage, run_stage
from vlmslice.training.optimizer import MuonAdamW
from vlmslice.training.trainer import StageTrainer
from vlmslice.training.width_scaling import WidthScalingError, learning_rate_factors, scale_width, widen
from vlmslice.vision_encoder import VlmSliceVisionConfig

ROOT = Path(__file__).parent.parent
VISION = VlmSliceVisionConfig(
    hidden_size=32,
    stem="conv",
    canvas_dilations=[1],
    timm_kwargs={"depth": 2, "num_heads": 2, "global_pool": "", "pos_embed_grid_size": (4, 4)},
)


def small_config(connector: str = "spatial_resampler", tied: bool = True):
    """Every kind of part: convolutions, mixer, connector, a head that is tied or not, a dense head."""
    return tiny_config(
        connector,
        {"num_key_value_heads": 2, "tie_word_embeddings": tied},
        vision_config=VISION,
        dense_loss_weight=0.3,
        first_fit_layers=[1] if connector == "cross_attention" else [],
    )


def build(config, seed: int = 0) -> VlmSliceForConditionalGeneration:
    torch.manual_seed(seed)
    return VlmSliceForConditionalGeneration(config)


def build_text(seed: int = 0, **options) -> LlamaForCausalLM:
    """Widths of 64 by default, in heads of 16."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "vocab_size": 50,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | options))


def rms(x: torch.Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def optimizer_of(model: nn.Module, rate: float, factors: dict[str, float]) -> torch.optim.AdamW:
    groups = [{"params": [p], "lr": rate * factors.get(n, 1.0)} for n, p in model.named_parameters()]
    return torch.optim.AdamW(groups, weight_decay=0.0)


@pytest.mark.parametrize("tied", [True, False])
def test_initial_values_and_rates_follow_the_table(tied: bool) -> None:
    base, model = build(small_config(tied=tied)), build(widen(small_config(tied=tied), 4))
    before = {name: rms(p) for name, p in base.named_parameters()}
    scale_width(model, base)
    factors = learning_rate_factors(model, base)
    weights = dict(model.named_parameters())
    # name -> (growth of the initial RMS, factor on the rate), for four times the width
    table = {
        "vision_encoder.stem.pixels.weight": (1, 1),  # from RGB values
        "vision_encoder.stem.middle.0.inner.weight": (1 / 2, 1 / 4),  # a convolution is a matrix
        "vision_encoder.vit.blocks.1.attn.qkv.weight": (1 / 2, 1 / 4),
        "vision_encoder.mixer.blocks.0.narrow.weight": (1 / 2, 1 / 4),
        "vision_encoder.vit.blocks.1.norm1.weight": (1, 1),
        "connector.attention.value.weight": (1 / 2, 1 / 4),
        "connector.attention.sharpness": (1, 1),
        "connector.head.projection.weight": (1 / 2, 1 / 4),
        "canvas_position.projection.weight": (1 / 2, 1 / 4),
        "dense_head.projection.weight": (1 / 4, 1 / 4),
        "language_model.model.embed_tokens.weight": (1, 1),
        "language_model.model.layers.0.mlp.down_proj.weight": (1 / 2, 1 / 4),
        "language_model.model.layers.0.input_layernorm.weight": (1, 1),
        "language_model.model.norm.weight": (1 / 4, 1 / 4) if tied else (1, 1),
    }
    if not tied:
        table["language_model.lm_head.weight"] = (1 / 4, 1 / 4)
    for name, (growth, factor) in table.items():
        assert rms(weights[name]) == pytest.approx(growth * before[name], rel=1e-5), name
        assert factors.get(name, 1.0) == pytest.approx(factor), name
    assert ("language_model.lm_head.weight" in weights) is not tied


def test_muon_takes_the_root() -> None:
    base, model = build(small_config("cross_attention")), build(widen(small_config("cross_attention"), 4))
    factors = learning_rate_factors(model, base, muon=("cross_attention.", "vision_encoder."))
    assert factors["cross_attention.layers.0.query.weight"] == pytest.approx(1 / 2)
    assert factors["cross_attention.first_fit.1.key.weight"] == pytest.approx(
        1 / 4
    )  # its outputs do not grow
    assert factors.get("cross_attention.first_fit.1.output.weight", 1.0) == 1  # its inputs do not grow
    assert factors["language_model.model.layers.0.mlp.up_proj.weight"] == pytest.approx(
        1 / 4
    )  # left to AdamW


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2)])
def test_muon_steps_have_the_spectral_norm_they_should(shape: tuple[int, int]) -> None:
    """It grows like sqrt(outputs / inputs), whatever the width; with one rate for all widths it would double."""

    def spectral_norm_of_step(width: int, factor: float) -> float:
        torch.manual_seed(0)
        layer = nn.Linear(shape[1] * width, shape[0] * width, bias=False)
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer = MuonAdamW(
            [{"params": [layer.weight], "is_matrix": True}], lr=0.1 * factor, weight_decay=0.0
        )
        optimizer.step()
        return float(torch.linalg.matrix_norm(layer.weight.detach() - before, 2))

    narrow, wide = (
        nn.Sequential(nn.Linear(shape[1] * width, shape[0] * width, bias=False)) for width in (32, 128)
    )
    factor = learning_rate_factors(wide, narrow, muon=("",))["0.weight"]
    assert spectral_norm_of_step(128, factor) == pytest.approx(spectral_norm_of_step(32, 1.0), rel=0.1)
    assert spectral_norm_of_step(128, 1.0) > 1.8 * spectral_norm_of_step(32, 1.0)


@pytest.mark.parametrize(
    "connector", ["spatial_resampler", "resampler", "pixel_unshuffle", "cross_attention"]
)
def test_base_width_is_left_alone(connector: str) -> None:
    base, model = build(small_config(connector)), build(small_config(connector), seed=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    scale_width(model, base)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert learning_rate_factors(model, base) == {}
    assert learning_rate_factors(model, base, muon=("",), learning_rates={"a.": 0.3}) == {"a.": 0.3}


def dense_stage(width: int, scaled: bool) -> Stage:
    """Four steps on noise with random labels."""

    def build_reader() -> DenseReader:
        torch.manual_seed(0)
        return DenseReader(widen(VISION, width / 32))

    def build_model(previous: Path | None) -> DenseReader:
        model = build_reader()
        if scaled:
            torch.manual_seed(0)
            scale_width(model, DenseReader(VISION))
        return model

    def collate(samples: list[int]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(samples[0])
        batch = {
            "pixel_values": torch.randn(2, 4, 768, generator=generator),
            "target_sizes": torch.tensor([[2, 2]] * 2),
        }
        classes = {"character": 95, "kind": 3, "color": 3, "center": 2, "glyph": 95}
        return batch | {
            f"label_{name}": torch.randint(0, number, (2, 4, 4), generator=generator)
            for name, number in classes.items()
        }

    return Stage(
        name=f"{width}-{scaled}",
        model=build_model,
        dataset=list(range(8)),  # type: ignore[arg-type]
        collator=collate,
        arguments={
            "use_cpu": True,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            "weight_decay": 0.1,
            "max_steps": 4,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "seed": 0,
        },
        save=lambda model, folder: save_file(model.state_dict(), folder / "model.safetensors"),
        learning_rates=learning_rate_factors(build_reader(), DenseReader(VISION)) if scaled else {},
    )


def test_training_at_base_width_is_bit_identical(tmp_path: Path) -> None:
    def train(width: int, scaled: bool) -> dict[str, torch.Tensor]:
        return load_file(run_stage(dense_stage(width, scaled), tmp_path, None) / "model.safetensors")

    plain, scaled = train(32, False), train(32, True)
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)
    plain, scaled = train(64, False), train(64, True)  # at another width it is not
    assert not torch.equal(
        plain["encoder.vit.blocks.0.attn.qkv.weight"], scaled["encoder.vit.blocks.0.attn.qkv.weight"]
    )


def test_stage_trainer_uses_the_factors(tmp_path: Path) -> None:
    """A stage's own factor multiplies those of the width, and no name takes another's."""
    config, wide = small_config("cross_attention"), widen(small_config("cross_attention"), 2)
    base, model = build(config), build(wide)
    factors = learning_rate_factors(model, base, learning_rates={"vision_encoder.": 0.3})
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=0.1, report_to=[])
    optimizer = StageTrainer(model=model, args=arguments, learning_rates=factors).create_optimizer()
    rates = {id(p): group["lr"] / 0.1 for group in optimizer.param_groups for p in group["params"]}
    expected = {
        "vision_encoder.vit.blocks.0.attn.qkv.weight": 0.15,
        "vision_encoder.vit.blocks.0.attn.qkv.bias": 0.3,
        "vision_encoder.stem.pixels.weight": 0.3,
        "language_model.model.layers.0.mlp.up_proj.weight": 0.5,
        "language_model.model.embed_tokens.weight": 1.0,
        "language_model.model.norm.weight": 0.5,
    }
    for name, factor in expected.items():
        assert rates[id(model.get_parameter(name))] == pytest.approx(factor), name


def test_a_name_that_begins_another_comes_after_it() -> None:
    class Container(nn.Linear):
        """Has a `weight` and, in a layer inside, `weight_of.weight` and `weight_of.bias`."""

        def __init__(self, width: int):
            super().__init__(width, width, bias=False)
            self.weight_of = nn.Linear(width, 2 * width)

    factors = learning_rate_factors(
        Container(8), Container(4), learning_rates={"weight_of": 0.5, "other": 0.1}
    )
    expected = [("weight_of.weight", 0.25), ("weight_of.bias", 0.5), ("weight", 0.5)]
    assert list(factors.items()) == [*expected, ("weight_of", 0.5), ("other", 0.1)]


def test_factors_need_no_weights() -> None:
    base, model = small_config(), widen(small_config(), 4)
    with torch.device("meta"):
        from_shapes = learning_rate_factors(
            VlmSliceForConditionalGeneration(model), VlmSliceForConditionalGeneration(base)
        )
    assert from_shapes == learning_rate_factors(build(model), build(base))


def test_gain_before_a_tied_head_is_granites_divisor() -> None:
    """Trained, a Llama whose gain holds the divisor is the Granite that divides its logits."""
    base, model = (
        build_text(hidden_size=16, num_attention_heads=1, num_key_value_heads=1, intermediate_size=32),
        build_text(),
    )
    fresh_gain = model.model.norm.weight.detach().clone()
    scale_width(model, base)
    shared = {k: getattr(model.config, k) for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    granite = GraniteForCausalLM(
        GraniteConfig(
            **shared,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=50,
            tie_word_embeddings=True,
            attention_multiplier=0.25,
            logits_scaling=4.0,
        )
    )
    granite.load_state_dict(model.state_dict() | {"model.norm.weight": fresh_gain})
    factors = learning_rate_factors(model, base)
    optimizers = [
        optimizer_of(model, 0.01, factors),
        optimizer_of(granite, 0.01, factors | {"model.norm.weight": 1.0}),
    ]
    ids = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    losses: list[list[float]] = [[], []]
    for _ in range(8):
        for number, (one, optimizer) in enumerate(zip((model, granite), optimizers, strict=True)):
            loss = one(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[number].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.3
    torch.testing.assert_close(4 * model.model.norm.weight, granite.model.norm.weight, rtol=1e-3, atol=1e-4)


def changes(connector: str, factor: int, scaled: bool) -> dict[str, float]:
    """RMS of what 5 steps of AdamW change in the outputs of each part of the whole model, on one batch."""
    config = tiny_config(connector, {"num_key_value_heads": 2, "tie_word_embeddings": True})
    config.vision_config = VlmSliceVisionConfig(
        **VISION.to_diff_dict() | {"stem": "timm", "canvas_dilations": None}
    )
    base, model = build(config), build(widen(config, factor))
    factors = {}
    if scaled:
        scale_width(model, base)
        factors = learning_rate_factors(model, base)
    inputs = encode(
        tiny_processor(connector), chat("Read.", noise_image(64, 96)), chat("Count.", noise_image(64, 96, 1))
    )
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] > 255, -100)
    parts = {
        "vision encoder": model.vision_encoder.vit.blocks[-1],
        "connector": model.connector,
        "canvas position": model.canvas_position,
        "first layer": model.language_model.model.layers[0],
        "last layer": model.language_model.model.layers[-1],
        "logits": model.language_model.lm_head,
    }
    outputs: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        part.register_forward_hook(
            lambda _, args, output, name=name: outputs.__setitem__(
                name, (output[0] if isinstance(output, tuple) else output).detach()
            )
        )
    optimizer = optimizer_of(model, 0.01, factors)
    first: dict[str, torch.Tensor] = {}
    for _ in range(6):
        loss = model(**inputs, labels=labels).loss
        first = first or dict(outputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: rms(outputs[name] - first[name]) for name in parts}


@pytest.mark.parametrize("connector", ["spatial_resampler", "cross_attention"])
def test_steps_change_activations_alike_at_all_widths(connector: str) -> None:
    """The coordinate check (Yang et al., 2022, section D.1), and its failure without muP.

    Measured at 4 times the width: 0.75 to 1.08 of the base's change with muP, 3.6 to 10 of it without in these parts.
    """
    narrow = changes(connector, 1, scaled=False)
    for factor in (2, 4):
        scaled = changes(connector, factor, scaled=True)
        for name, value in scaled.items():
            assert 0.65 < value / narrow[name] < 1.4, f"{name} at {factor} x 32"
    standard = changes(connector, 4, scaled=False)
    grown = {name: value / narrow[name] for name, value in standard.items()}
    for name in ("canvas position", "first layer", "last layer", "logits"):
        assert grown[name] > 2.5, name


def test_widen_keeps_the_width_of_heads() -> None:
    config = small_config("cross_attention")
    wide = widen(config, 4)
    assert (wide.text_config.hidden_size, wide.vision_config.hidden_size) == (128, 128)
    assert (wide.text_config.head_dim, wide.text_config.num_attention_heads) == (16, 8)
    assert (wide.connector_heads, wide.connector_head_dim) == (16, 16)
    assert wide.vision_config.timm_kwargs["num_heads"] == 8
    assert config.text_config.hidden_size == 32
    assert widen(wide, 0.25).to_dict() == config.to_dict()


def test_widen_refuses_parts_of_heads_and_named_encoders() -> None:
    with pytest.raises(
        WidthScalingError, match="num_heads is 2, and 0.25 of it is 0.5, expected a whole number"
    ):
        widen(VISION, 0.25)
    named = VlmSliceVisionConfig(architecture="vit_small_patch14_dinov2", hidden_size=384, patch_size=14)
    with pytest.raises(
        WidthScalingError, match="'vit_small_patch14_dinov2' has the width that timm gives it"
    ):
        widen(named, 2)


@pytest.mark.parametrize("kind", ["convolution", "bare matrix", "bilinear"])
def test_unknown_kinds_are_refused(kind: str) -> None:
    def model(width: int) -> nn.Module:
        unknown = {
            "convolution": nn.Conv2d(3, width, 2),
            "bare matrix": nn.ParameterDict({"weight": torch.zeros(width, width)}),
            "bilinear": nn.Bilinear(width, width, 4),
        }
        return nn.Sequential(nn.Linear(4, width), unknown[kind])

    for call in (scale_width, learning_rate_factors):
        with pytest.raises(WidthScalingError, match=r"belongs to the \w+ '1', and it is not known how"):
            call(model(8), model(4))


def test_models_that_differ_in_more_than_width_are_refused() -> None:
    base = build_text()
    cases = {
        "parameters are in one of model and base only": build_text(num_hidden_layers=3),
        "has 60 rows, in the base 50; give both one vocabulary": build_text(vocab_size=60),
        "are 32 wide, in the base 16; keep their width": build_text(head_dim=32),
    }
    for message, model in cases.items():
        for call in (scale_width, learning_rate_factors):
            with pytest.raises(WidthScalingError, match=message):
                call(model, base)


def test_tied_heads_need_a_fresh_norm_that_multiplies() -> None:
    base, model = build_text(), build_text(hidden_size=128, num_attention_heads=8, num_key_value_heads=8)
    scale_width(model, base)
    with pytest.raises(
        WidthScalingError, match="'model.norm', before a tied head, is not 1.*scale a model once"
    ):
        scale_width(model, base)

    class HeadFirst(nn.Module):
        """A head before its embedding, so that the shared weight has the name of the head."""

        def __init__(self, width: int, has_norm: bool):
            super().__init__()
            self.head = nn.Linear(width, 5, bias=False)
            self.model = nn.ModuleDict({"embedding": nn.Embedding(5, width)})
            self.model["embedding"].weight = self.head.weight
            if has_norm:
                self.model["norm"] = nn.RMSNorm(width)

    assert learning_rate_factors(HeadFirst(8, True), HeadFirst(4, True)) == {"model.norm.weight": 0.5}
    with pytest.raises(WidthScalingError, match="'head' shares its weight.*no 'model.norm'.*untie"):
        learning_rate_factors(HeadFirst(8, False), HeadFirst(4, False))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["width_scaling", "schedules"])
def test_benchmarks_run_and_go_on(script: str, tmp_path: Path) -> None:
    options = [
        "--steps",
        "20",
        "--seeds",
        "1",
        "--lowest",
        "-7",
        "--highest",
        "-7",
        "--output-dir",
        str(tmp_path),
    ]
    if script == "width_scaling":
        options += ["--objective", "dense", "--width", "32", "--width", "64"]
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run() -> dict:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((tmp_path / f"{script}.json").read_text())

    results = run()
    assert (tmp_path / f"{script}.png").stat().st_size > 5000
    states = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/trainer_state.json")}
    assert len(states) == (3 if script == "width_scaling" else 8)
    first = min(states)
    if script == "width_scaling":
        assert results["losses"]["dense"]["mup"]["32"] == results["losses"]["dense"]["standard"]["32"]
        assert results["losses"]["dense"]["mup"]["64"] != results["losses"]["dense"]["standard"]["64"]
    else:
        # One trunk, three branches; the branch of the whole length is the run that is compared at equal steps.
        assert results["by_length"]["wsd"]["20"] == results["by_peak"]["wsd"]["0.0078125"]
    # What is there is not trained again, and what is missing is.
    for path in (first.parent / "final").iterdir():
        path.unlink()
    (first.parent / "final").rmdir()
    assert run() == results
    trained_again = {path for path, time in states.items() if path.stat().st_mtime_ns != time}
    assert trained_again == {first}
