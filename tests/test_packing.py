"""Packing: every sample in one pack, and a packed row the same to the model as its samples by themselves.

Gradients of packed and of separate samples are compared by norm: the largest difference found was 3e-6 of a gradient's
norm in fp32; the tests allow 1e-5.
"""

import importlib.util
import json
import runpy
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import CONNECTORS, noise_image, tiny_model, tiny_processor
from typer.testing import CliRunner

from vlmslice.data.collator import IGNORED, VlmSliceCollator
from vlmslice.data.fonts import FontLibrary, matplotlib_font_dir
from vlmslice.data.lengths import LengthError, SampleSize, measure_conversation, measure_dataset
from vlmslice.data.packing import PackedDataset, PackingCollator, PackingError, plan_packs
from vlmslice.data.task_collator import TaskCollator
from vlmslice.data.tasks import Curriculum, TaskConfig, TaskDataset
from vlmslice.loss_weighting import WEIGHTINGS, WeightingCollator
from vlmslice.training import Stage, run_stage

TOLERANCE = 1e-5


def conversation(question: str, answer: str | list, *images) -> dict:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    if isinstance(answer, str):
        answer = [{"type": "text", "text": answer}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(images)}


def pointing(*points: tuple[int, int]) -> list[dict]:
    return [{"type": "points", "points": list(points)}, {"type": "text", "text": str(len(points))}]


SAMPLES = [
    conversation("2+2?", "It is four."),
    conversation("Count.", pointing((1, 2), (1, 5), (3, 0)), noise_image(100, 200, seed=1)),
    conversation("Read.", "A long line of text, and another.", noise_image(60, 60, seed=2)),
    conversation("Same?", "No.", noise_image(90, 60, seed=3), noise_image(40, 130, seed=4)),
    conversation("Count.", pointing((0, 1)), noise_image(64, 128, seed=5)),
    conversation("Hm?", "!"),
]
PLAN = [[0, 1, 3], [2, 4, 5]]
PICTURES = [noise_image(60, 60, seed=2), noise_image(64, 128, seed=5)]


def packs_of(samples: list[dict], plan: list[list[int]] = PLAN) -> list[list[dict]]:
    return [[samples[number] for number in pack] for pack in plan]


def packing_model(connector: str, **options):
    """With a head of first fit, where there is cross-attention."""
    if connector == "cross_attention":
        first = tiny_processor(connector).location_token_id
        options |= {"first_fit_layers": [1], "location_token_id": first}
    model = tiny_model(connector, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "first_fit" in name and name.endswith("output.weight"):
                parameter.normal_(std=0.3)  # else this head adds nothing
            elif name.endswith("threshold"):
                parameter.fill_(-0.5)
    return model


def collators(connector: str, weighting: str = "per_token"):
    processor = tiny_processor(connector)
    single = WeightingCollator(VlmSliceCollator(processor), weighting)
    return single, PackingCollator(single, processor, max_length=512)


def gradients(model, *batches) -> dict[str, torch.Tensor]:
    """Of the batches' losses, added up by the share of each in the weight of all."""
    total = sum(batch["loss_weights"].sum() for batch in batches)
    model.zero_grad()
    for batch in batches:
        (model(**batch).loss * batch["loss_weights"].sum() / total).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        scale = max(gradient.norm(), 1e-3 * largest)  # a gradient that is rounding errors only has no digits
        assert (got[name] - gradient).norm() / scale < TOLERANCE, name


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("connector", CONNECTORS)
def test_gradients_of_packed_rows_are_those_of_separate_samples(connector, weighting):
    model = packing_model(connector)
    single, packing = collators(connector, weighting)
    separate = gradients(model, *(single([sample]) for sample in SAMPLES))
    assert_same_gradients(gradients(model, packing(packs_of(SAMPLES))), separate)
    # Accumulated: one row after the other.
    assert_same_gradients(gradients(model, *(packing([pack]) for pack in packs_of(SAMPLES))), separate)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_dense_and_guide_losses_of_packed_rows_are_those_of_separate_samples(connector):
    model = packing_model(connector, dense_loss_weight=0.5, guide_loss_weight=0.5)
    model.set_attn_implementation({"text_config": "eager"})
    steps = [Curriculum(6, TaskConfig(megapixels=(0.004, 0.02)), {"count": 0.5, "read": 0.5})]
    samples = list(TaskDataset(steps, FontLibrary("train", [matplotlib_font_dir()]), seed=1, group=1))
    assert {sample.task for sample in samples} == {"count", "read"}
    processor = tiny_processor(connector)
    single = TaskCollator(processor)
    packing = PackingCollator(single, processor, max_length=1024)
    outputs = []
    # In one order, so that both batches hold the views in it.
    for batch in (single(samples), packing(packs_of(samples, [[0, 1, 2], [3, 4], [5]]))):
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        outputs.append(
            (output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (separate, expected), (packed, got) = outputs
    assert float(packed.auxiliary_loss.detach()) > 0.1
    assert packed.metrics.keys() == separate.metrics.keys()
    assert ("first_fit_loss" in packed.metrics) == (connector == "cross_attention")
    for name, value in separate.metrics.items():
        torch.testing.assert_close(packed.metrics[name], value, atol=1e-5, rtol=1e-5)
    assert_same_gradients(got, expected)


def logits_of_samples(model, packing, samples) -> dict[int, torch.Tensor]:
    batch = packing(packs_of(samples))
    with torch.no_grad():
        logits = model(**batch).logits
    found = {}
    for row, pack in enumerate(PLAN):
        starts = (batch["position_ids"][row] == 0).nonzero()[:, 0].tolist()
        for number, start, end in zip(pack, starts, [*starts[1:], None], strict=False):
            found[number] = logits[row, start:end]
    return found


@pytest.mark.parametrize("connector", CONNECTORS)
def test_a_sample_does_not_change_what_the_model_makes_of_its_neighbours(connector):
    model, (_, packing) = packing_model(connector), collators(connector)
    before = logits_of_samples(model, packing, SAMPLES)
    # Of the same length and the same plan: another picture, question and place to point at.
    changed = list(SAMPLES)
    changed[1] = conversation("Whose?", pointing((1, 2), (2, 7), (3, 9)), noise_image(100, 200, seed=9))
    after = logits_of_samples(model, packing, changed)
    assert not torch.allclose(before[1], after[1], atol=0.1)
    for number in set(before) - {1}:
        torch.testing.assert_close(after[number], before[number], atol=1e-5, rtol=1e-5)


def test_positions_start_again_and_samples_stay_whole():
    single, packing = collators("spatial_resampler", "per_sample")
    batch = packing(packs_of(SAMPLES))
    assert "attention_mask" not in batch
    num_positions = batch["input_ids"].shape[1]
    assert num_positions % 16 == 0
    for row, pack in enumerate(PLAN):
        expected_ids, expected_positions = [], []
        for number in pack:
            alone = single([SAMPLES[number]])
            length = int(alone["attention_mask"].sum())
            start = len(expected_ids)
            for name in ("input_ids", "labels", "loss_weights"):
                assert torch.equal(batch[name][row, start : start + length], alone[name][0, :length])
            expected_ids += alone["input_ids"][0, :length].tolist()
            expected_positions += range(length)
        rest = num_positions - len(expected_ids)
        assert batch["position_ids"][row].tolist() == [*expected_positions, *range(rest)]
        assert (batch["labels"][row, len(expected_ids) :] == IGNORED).all()
        assert (batch["loss_weights"][row, len(expected_ids) :] == 0).all()


sizes_strategy = st.lists(
    st.builds(SampleSize, st.integers(1, 100), st.integers(0, 50)), min_size=0, max_size=60
)


@given(sizes_strategy, st.integers(1, 30), st.sampled_from([None, 50, 80]))
def test_every_sample_is_in_one_pack_and_no_pack_is_too_large(sizes, window, max_visual_tokens):
    plan = plan_packs(sizes, 100, max_visual_tokens, window)
    assert Counter(number for pack in plan for number in pack) == Counter(range(len(sizes)))
    for pack in plan:
        assert pack == sorted(pack)
        assert len({number // window for number in pack}) == 1
        assert sum(sizes[number].num_ids for number in pack) <= 100
        if max_visual_tokens is not None:
            assert sum(sizes[number].num_visual_tokens for number in pack) <= max_visual_tokens
    assert plan == plan_packs(sizes, 100, max_visual_tokens, window)
    # No two packs of a window would fit in one.
    if max_visual_tokens is None:
        loads = [(pack[0] // window, sum(sizes[number].num_ids for number in pack)) for pack in plan]
        for first, (window_of_first, load) in enumerate(loads):
            assert all(load + other > 100 for w, other in loads[first + 1 :] if w == window_of_first)
    # What comes later moves nothing in whole windows before.
    whole = len(sizes) // window * window
    before = [pack for pack in plan if pack[0] < whole]
    assert before == plan_packs(sizes[:whole], 100, max_visual_tokens, window)


def test_packs_of_the_docstring():
    assert plan_packs([SampleSize(n, 0) for n in (9, 4, 6, 1)], 10) == [[0, 3], [1, 2]]


def test_dataset_gives_the_samples_of_a_pack():
    dataset = list("abcdef")
    sizes = [SampleSize(n, 0) for n in (60, 50, 40, 100, 30, 20)]
    packed = PackedDataset(dataset, sizes, max_length=100)
    assert [packed[i] for i in range(len(packed))] == [["a", "c"], ["b", "e", "f"], ["d"]]
    assert packed.fill == 1.0


def test_a_stage_of_packed_rows_resumes_bit_exactly(tmp_path):
    processor = tiny_processor()
    samples = [conversation(f"{n}?", "x" * (n % 7 + 1), *PICTURES[: n % 3]) for n in range(24)]
    sizes = measure_dataset(samples, partial(measure_conversation, processor))
    dataset = PackedDataset(samples, sizes, max_length=128, window=12)
    assert 4 <= len(dataset) < 12

    def train(run: str, max_steps: int) -> dict[str, torch.Tensor]:
        stage = Stage(
            name="packed",
            model=lambda previous: tiny_model(),
            dataset=dataset,
            collator=PackingCollator(
                WeightingCollator(VlmSliceCollator(processor), "per_sample"), processor, max_length=128
            ),
            arguments={
                "per_device_train_batch_size": 2,
                "max_steps": max_steps,
                "save_steps": 2,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "constant",
                "use_cpu": True,
                "disable_tqdm": True,
                "report_to": [],
            },
            save=lambda model, folder: model.save_pretrained(folder),
        )
        return load_file(run_stage(stage, tmp_path / run, None) / "model.safetensors")

    straight = train("straight", 4)
    halfway = train("resumed", 2)
    shutil.rmtree(tmp_path / "resumed" / "packed" / "final")
    resumed = train("resumed", 4)
    for name, weight in straight.items():
        assert torch.equal(resumed[name], weight), name
    assert any(not torch.equal(halfway[name], weight) for name, weight in straight.items())


def test_a_sample_longer_than_a_row_is_refused_by_its_number():
    with pytest.raises(PackingError, match=r"sample 1 has 120 ids and 3 visual tokens; .*max_length=100"):
        plan_packs([SampleSize(9, 0), SampleSize(120, 3)], 100)
    with pytest.raises(PackingError, match="sample 0 has 9 ids and 70 visual tokens; .*max_visual_tokens=50"):
        plan_packs([SampleSize(9, 70)], 100, max_visual_tokens=50)


def test_sizes_of_other_data_are_refused():
    with pytest.raises(LengthError, match="got 1 sizes for 2 samples"):
        PackedDataset(["a", "b"], [SampleSize(1, 0)], 10)
    processor = tiny_processor()
    packing = PackingCollator(VlmSliceCollator(processor), processor, max_length=40)
    lengths = [measure_conversation(processor, sample).num_ids for sample in SAMPLES[:2]]
    with pytest.raises(PackingError, match=rf"row 0 .* has {sum(lengths)} positions, of samples of"):
        packing([SAMPLES[:2]])


def test_batches_that_cannot_be_packed_are_refused():
    processor = tiny_processor()
    collator = VlmSliceCollator(processor)

    def with_more(samples):
        return collator(samples) | {"token_scores": torch.zeros(2, 3)}

    with pytest.raises(PackingError, match="holds token_scores, expected"):
        PackingCollator(with_more, processor, 512)([SAMPLES[:2]])

    def flipped(samples):
        return {
            name: value.flip(1) if value.ndim == 2 else value for name, value in collator(samples).items()
        }

    with pytest.raises(PackingError, match="not padded on the right"):
        PackingCollator(flipped, processor, 512)([[SAMPLES[0], SAMPLES[5]]])


def test_code_of_the_docs_runs(tmp_path, monkeypatch):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Four."}]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for _ in range(3)))
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "packing.md").read_text()
    Path("code.py").write_text(text.split("```python\n")[1].split("```")[0])
    names = runpy.run_path("code.py", {"processor": tiny_processor()})
    batch = names["collator"]([names["dataset"][0]])
    assert (batch["position_ids"] == 0).sum() == 4  # three samples and the padding


def test_benchmark_prints_all_three_ways():
    path = Path(__file__).parent.parent / "benchmarks" / "packing.py"
    spec = importlib.util.spec_from_file_location("packing_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runner = CliRunner()
    assert "Example: python benchmarks/packing.py" in runner.invoke(module.app, ["--help"]).output
    options = ["--num-samples", "8", "--batch-size", "4", "--hidden-size", "32", "--rounds", "1"]
    result = runner.invoke(module.app, options, catch_exceptions=False)
    for way in ("padded, random order", "padded, length-sorted", "packed"):
        assert f"| {way} |" in result.output
