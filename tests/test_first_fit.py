"""The look-up of the first token that fits, against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import chat, encode, noise_image, tiny_config, tiny_model, tiny_processor

from vlmslice.first_fit import FirstFit, PointingOrder, first_fit_loss, order_for_pointing
from vlmslice.modeling import VlmSliceForConditionalGeneration


def head_with(logits: list[float], candidates: list[bool]) -> torch.Tensor:
    """Probabilities of what is found where tokens fit with these logits; the last is nothing."""
    head = FirstFit(4, 4)
    with torch.no_grad():
        head.norm.weight.fill_(1.0)
        head.query.weight.copy_(torch.eye(4))
        head.threshold.zero_()
    hidden = torch.tensor([[[2.0, 0, 0, 0]]])  # norm makes it (2, 0, 0, 0); divided by sqrt(4): 1
    keys = torch.zeros(1, len(logits), 4)
    keys[0, :, 0] = torch.tensor(logits)
    with torch.no_grad():
        _, found = head(hidden, keys, torch.zeros(1, len(logits), 4), torch.tensor([[candidates]]))
    return found[0, 0].exp()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(-9, 9), st.booleans()), min_size=1, max_size=12))
def test_probabilities_are_those_of_a_plain_loop(tokens):
    """And with what is not found they sum to one."""
    found = head_with([logit for logit, _ in tokens], [is_candidate for _, is_candidate in tokens])
    expected, none_before = [], 1.0
    for logit, is_candidate in tokens:
        fits = 1 / (1 + math.exp(-logit)) if is_candidate else 0.0
        expected.append(none_before * fits)
        none_before *= 1 - fits
    assert found.tolist() == pytest.approx([*expected, none_before], abs=1e-5)
    assert found.sum() == pytest.approx(1, abs=1e-5)


def test_the_first_of_two_that_fit_is_found_however_far_the_other_stands_out():
    found = head_with([-20, 8, -20, 30, -20], [True] * 5)
    assert found[1] > 0.999 and found[3] < 1e-3


def test_thousands_that_do_not_fit_do_not_drown_the_one_that_does():
    found = head_with([-12.0] * 4095 + [6.0], [True] * 4096)
    assert found[4095] > 0.95


class TestOrder:
    PLACES = torch.tensor([[(0, 1), (3, 1), (0, 2), (3, 0), (1, 5)]])
    CAN_POINT = torch.tensor([[False, True, True, True, True]])

    def order(self) -> PointingOrder:
        return order_for_pointing(self.PLACES, self.CAN_POINT)

    def test_rows_then_columns_and_overviews_last(self):
        assert self.order().tokens.tolist() == [[2, 4, 3, 1, 0]]

    @pytest.mark.parametrize(
        ("point", "expected"),
        [
            (None, [2, 4, 3, 1]),
            ((-1, -1, -1), [2, 4, 3, 1]),
            ((0, 2, -1), [4, 3, 1]),
            ((3, 0, -1), [1]),
            ((3, 1, -1), []),
            ((0, 2, 3), [3, 1]),
            ((3, 0, 3), [1]),
            ((-1, -1, 1), [4]),
            ((3, 0, 1), []),
        ],
    )
    def test_candidates_lie_ahead_and_in_the_row_that_is_told(self, point, expected):
        order = self.order()
        seen = order.candidates(None if point is None else torch.tensor([[point]]))
        assert order.tokens[0][seen[0, 0]].tolist() == expected

    def test_loss_finds_tokens_by_their_numbers(self):
        order = self.order()
        log_probs = torch.log(
            torch.tensor([[[0.1, 0.2, 0.3, 0.15, 0.05, 0.2]]])
        )  # of 2, 4, 3, 1, 0 and nothing
        entries = torch.tensor([[0, 0, 4], [0, 0, 1], [0, 0, -1]])
        loss, found = first_fit_loss([log_probs], order, entries)
        assert loss == pytest.approx(-(math.log(0.2) + math.log(0.15) + math.log(0.2)) / 3)
        assert found == pytest.approx((0.2 + 0.15 + 0.2) / 3)
        log_probs[0, 0, 3] = -1e4  # what was passed
        loss, _ = first_fit_loss([log_probs], order, entries)
        assert loss == pytest.approx(-math.log(0.2))


def test_untrained_it_adds_nothing():
    torch.manual_seed(0)
    head, hidden, tokens = FirstFit(8, 4), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    order = torch.arange(5).expand(2, 5)
    changed, _ = head(hidden, *head.project(tokens, order), torch.ones(2, 1, 5, dtype=torch.bool))
    assert torch.equal(changed, hidden)


def test_layer_that_does_not_look_is_refused():
    with pytest.raises(
        ValueError, match=r"^first_fit_layers has 7, expected numbers of the 2 looking layers"
    ):
        VlmSliceForConditionalGeneration(tiny_config("cross_attention", first_fit_layers=[7]))


def test_every_weight_learns():
    model = tiny_model("cross_attention", first_fit_layers=[1], guide_loss_weight=1.0)
    torch.nn.init.normal_(model.cross_attention.first_fit["1"].output.weight)
    batch = encode(tiny_processor("cross_attention"), chat("How many?", noise_image(150, 170)))
    model.config.location_token_id = int(batch["input_ids"][0, -1])
    entries = torch.tensor([[0, 0, batch["input_ids"].shape[1] - 2, 3]])
    outputs = model(**batch, labels=batch["input_ids"], guide_entries=entries, guide_shares=torch.ones(1))
    assert outputs.metrics["first_fit_loss"] > 0 and 0 < outputs.metrics["next_found"] < 1
    outputs.loss.backward()
    head = model.cross_attention.first_fit["1"]
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []
