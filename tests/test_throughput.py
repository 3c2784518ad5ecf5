"""What is counted: FLOPs by torch's formulas, without a change to any gradient, and tokens that are real."""

import contextlib

import pytest
import torch
from tiny_models import CONNECTORS, chat, encode, noise_image, tiny_model, tiny_processor
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlmslice.matmul_peak import matmul_peak
from vlmslice.training.throughput import FlopCounter, Throughput, count_tokens

IMAGES = noise_image(60, 100), noise_image(150, 90)


def make_batch(connector: str) -> dict[str, torch.Tensor]:
    """Two samples of unlike length, with labels on all ids."""
    batch = encode(
        tiny_processor(connector), chat("Read.", IMAGES[0]), chat("Which words are these?", IMAGES[1])
    )
    return batch | {"labels": batch["input_ids"].clone()}


class TestFlopCounter:
    def test_known_products(self) -> None:
        # 2 * 5 * 7 * 11 FLOPs forward; as many for the gradient of the weight and for that of the input.
        layer, x = nn.Linear(7, 11), torch.randn(5, 7, requires_grad=True)
        with FlopCounter() as counter:
            loss = layer(x).sum()
            assert counter.num_flops == 770
            loss.backward()
        assert counter.num_flops == 3 * 770

    @pytest.mark.parametrize(("part_is_trained", "times_forward"), [(True, 4), (False, 3)])
    def test_frozen_part_passes_gradients_on(self, part_is_trained: bool, times_forward: int) -> None:
        """Of two equal layers on an input without gradient, the first costs one product backward, the second two."""
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].requires_grad_(part_is_trained)
        with FlopCounter() as counter:
            model(torch.randn(4, 8)).sum().backward()
        forward = 2 * 4 * 8 * 8
        assert counter.num_flops == (times_forward + 1) * forward

    def test_fused_attention_of_the_cpu(self) -> None:
        # 2 products of 2 * 6 * 6 * 8 FLOPs in each of 3 heads; 5 backward, as the scores are computed again.
        query, key, value = (torch.randn(1, 3, 6, 8, requires_grad=True) for _ in range(3))
        with FlopCounter() as counter:
            found = nn.functional.scaled_dot_product_attention(query, key, value)
            assert counter.num_flops == 2 * 3 * 576
            found.sum().backward()
        assert counter.num_flops == 7 * 3 * 576

    @pytest.mark.parametrize("connector", CONNECTORS)
    def test_agrees_with_torch_and_leaves_gradients_alone(self, connector: str) -> None:
        model = tiny_model(connector).train()
        batch = make_batch(connector)
        gradients = []
        counters = [contextlib.nullcontext(), FlopCounter(), FlopCounterMode(display=False)]
        for counter in counters:
            model.zero_grad()
            # torch's counter knows no fused attention of the CPU.
            with sdpa_kernel(SDPBackend.MATH), counter:
                model(**batch).loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert counters[1].num_flops == counters[2].get_total_flops() > 1e6
        assert all(torch.equal(gradients[1][name], expected) for name, expected in gradients[0].items())


class TestCountTokens:
    @pytest.mark.parametrize("connector", CONNECTORS)
    def test_counts_what_is_real(self, connector: str) -> None:
        processor, model, batch = tiny_processor(connector), tiny_model(connector), make_batch(connector)
        plans = [processor.image_processor.plan(image.height, image.width) for image in IMAGES]
        visual, text = count_tokens(model, batch)
        assert visual == sum(plan.num_visual_tokens for plan in plans)
        placeholders = (batch["input_ids"] == model.config.image_token_id).sum()
        assert text == batch["attention_mask"].sum() - placeholders
        assert text < batch["input_ids"].numel() - placeholders  # one sample is padded
        # What the language model is shown of the images is what was counted.
        features = model.get_image_features(
            **{name: batch[name] for name in ("pixel_values", "target_sizes", "canvas_boxes", "num_views")}
        )
        assert visual == sum(len(tokens) for tokens in features.pooler_output)

    def test_without_images_or_mask(self) -> None:
        assert count_tokens(tiny_model(), {"input_ids": torch.full((2, 5), 7)}) == (0, 10)

    def test_patches_where_nothing_connects_them(self) -> None:
        assert count_tokens(nn.Linear(1, 1), {"target_sizes": torch.tensor([[2, 3], [4, 4]])}) == (22, 0)


class TestThroughput:
    def test_flops_follow_the_tokens(self) -> None:
        model = tiny_model().train()
        batch = make_batch("spatial_resampler")
        throughput = Throughput(model)
        for _ in range(3):
            with throughput.count(batch):
                model(**batch).loss.backward()
        with FlopCounter() as counter:
            model(**batch).loss.backward()
        assert throughput.num_tokens == 3 * sum(count_tokens(model, batch))
        assert throughput.num_flops == pytest.approx(3 * counter.num_flops)
        throughput.reset()
        assert throughput.num_tokens == throughput.num_flops == 0
        # An interval in which nothing is counted goes by what was.
        with throughput.count(batch):
            pass
        assert throughput.num_flops == pytest.approx(counter.num_flops)

    def test_compiled_model_is_not_counted(self) -> None:
        throughput = Throughput(nn.Linear(2, 2), counts_flops=False)
        with throughput.count({"input_ids": torch.ones(1, 4)}):
            torch.ones(2, 2) @ torch.ones(2, 2)
        assert (throughput.num_tokens, throughput.num_flops) == (4, 0)


def test_matmul_peak_is_measured_once() -> None:
    assert matmul_peak(torch.float32) == matmul_peak(torch.float32) > 1e8
