"""Coverage: what an answer has read is held back from being read again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import answer, chat, encode, noise_image, tiny_model, tiny_processor

from vlmslice.config import VlmSliceConfig
from vlmslice.coverage import LAG, Coverage
from vlmslice.first_fit import BEYOND

GRID = torch.cartesian_prod(torch.arange(12), torch.arange(8))
NOWHERE = torch.tensor([[BEYOND, BEYOND]])


def coverage(num_samples: int = 1, penalty: float = 20.0) -> Coverage:
    """Of 12 x 8 blocks and the place where nothing is."""
    return Coverage(torch.cat([GRID, NOWHERE]).expand(num_samples, -1, 2), penalty)


def at(row: int, col: int, share: float = 1.0) -> torch.Tensor:
    """Attention to one block, and the rest to nothing."""
    weights = torch.zeros(1, len(GRID) + 1)
    weights[0, row * 8 + col] = share
    weights[0, -1] = 1 - share
    return weights


def read(seen: Coverage, row: int, looks_per_block: int = 1) -> None:
    for col in range(8):
        for _ in range(looks_per_block):
            seen.look(at(row, col))


def held_back(seen: Coverage) -> torch.Tensor:
    return seen.held_back()[:, :-1].unflatten(1, (12, 8))


class TestCoverage:
    def test_reading_on_is_never_held_back(self):
        seen = coverage()
        for row in range(0, 12, 2):
            read(seen, row)
            assert not seen.held_back().any()

    def test_reading_again_is_held_back_within_a_dozen_letters(self):
        seen = coverage()
        for row in (0, 3, 6, 0):
            assert not seen.is_held_back.any()
            read(seen, row)
        seen.look(at(3, 0))
        seen.look(at(3, 1))
        held = held_back(seen)
        assert seen.is_held_back.all()
        assert (held[0, [0, 3]] >= 20 * 0.7).all(), "what was read"
        assert not held[0, 10].any(), "where nothing was read"

    def test_what_is_looked_at_while_nothing_is_read_does_not_count(self):
        """Brackets and quotes of JSON: the gaze wanders over the page, and goes on from where it has read."""
        seen = coverage()
        read(seen, 0)
        distance = seen.distance
        for step in range(40):
            seen.look(at(step * 7 % 12, step * 5 % 8, share=0.3))
        assert torch.equal(seen.distance, distance) and not seen.again.any()
        read(seen, 3)
        assert not seen.is_held_back.any()

    def test_fine_print_is_no_reading_again(self):
        """Three letters to a block, and lines that share their blocks in pairs."""
        seen = coverage()
        for line in range(10):
            read(seen, line // 2, looks_per_block=3)
            assert not seen.is_held_back.any()

    def test_glances_in_passing_hold_nothing_back(self):
        seen = coverage()
        for row in (0, 3, 6):
            read(seen, row)
        seen.look(at(10, 3, share=0.25))
        for row in (0, 3, 6):
            read(seen, row)
        held = held_back(seen)
        assert seen.is_held_back.all() and held[0, 0].all() and not held[0, 10, 3]

    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_large_letters_are_covered_from_top_to_bottom(self, step):
        """Letters that are a block wide are about two high: half of it covers a block above and one below."""
        page = torch.cartesian_prod(torch.arange(12), torch.arange(200))
        seen = Coverage(torch.cat([page, NOWHERE])[None], 20.0)
        for _ in range(2):
            for col in range(0, 200, step):
                weights = torch.zeros(1, len(page) + 1)
                weights[0, 5 * 200 + col] = 1
                seen.look(weights)
        assert seen.distance.item() == pytest.approx(step, abs=0.1)
        rows = seen.held_back()[0, :-1].unflatten(0, (12, 200))[:, 100 // step * step]
        assert rows.nonzero().flatten().tolist() == list(range(5 - step, 6 + step))

    @settings(max_examples=30)
    @given(st.lists(st.integers(0, 96), min_size=1, max_size=60), st.integers(0, 2**31 - 1))
    def test_invariants(self, gaze, seed):
        """0 to the penalty, never less than before, nothing for nothing; a row of a batch is what it is alone."""
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand(len(gaze), 3, 97, generator=generator).softmax(-1)
        weights[torch.arange(len(gaze)), 0, torch.tensor(gaze)] += 1
        weights /= weights.sum(-1, keepdim=True)
        together, alone, before = coverage(3), coverage(1), torch.zeros(3, 97)
        for step in weights:
            together.look(step)
            alone.look(step[:1])
            held = together.held_back()
            assert (held >= before).all() and held.max() <= 20 and not held[:, -1].any()
            before = held
        assert torch.equal(held[:1], alone.held_back())

    def test_rows_go_on_from_others(self):
        seen, expected = coverage(2), coverage(2)
        first, second = [at(0, col) for col in range(8)] * 5, [at(4, col) for col in range(8)] * 5
        for one, other in zip(first, second, strict=True):
            seen.look(torch.cat([one, other]))
            expected.look(torch.cat([other, other]))
        seen.reorder(torch.tensor([1, 1]))
        for one in first:
            seen.look(torch.cat([one, one]))
            expected.look(torch.cat([one, one]))
        assert seen.held_back().any() and torch.equal(seen.held_back(), expected.held_back())
        for part in ("covered", "distance", "again", "is_held_back"):
            assert torch.equal(getattr(seen, part), getattr(expected, part))


CHATS = (
    chat("read", noise_image(100, 200)),
    chat("what?", noise_image(70, 60, seed=1), noise_image(40, 300, seed=2)),
    chat("no picture here"),
)
LENGTH = 96


def batch(*chats) -> dict:
    return encode(tiny_processor("cross_attention"), *(chats or CHATS))


def model(**options):
    return tiny_model("cross_attention", cross_attention_gate=1.0, **options)


@pytest.fixture
def every_look_counts(monkeypatch) -> None:
    """Models that nobody has taught look at all tokens alike."""
    monkeypatch.setattr("vlmslice.coverage.SHARP", 0.0)


@pytest.mark.usefixtures("every_look_counts")
class TestGeneration:
    def test_answers_change_once_something_is_held_back(self):
        without = answer(model(), batch(), num_tokens=LENGTH)
        held = answer(model(coverage_penalty=20.0), batch(), num_tokens=LENGTH)
        assert all(a[: LAG + 2] == b[: LAG + 2] for a, b in zip(without, held, strict=True))
        assert without[0] != held[0] and without[2] == held[2]

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
    def test_batch_is_single(self, options):
        options = {"num_tokens": LENGTH} | options
        held = model(coverage_penalty=20.0)
        assert [answer(held, batch(one), **options)[0] for one in CHATS] == answer(held, batch(), **options)

    def test_likeliest_samples_are_the_greedy_answer(self):
        """Every answer of `num_return_sequences` has a coverage of its own."""
        held = model(coverage_penalty=20.0)
        greedy = held.generate(**batch(CHATS[0]), max_new_tokens=LENGTH, do_sample=False)
        torch.manual_seed(0)
        sampled = held.generate(
            **batch(CHATS[0]), max_new_tokens=LENGTH, do_sample=True, top_k=1, num_return_sequences=2
        )
        assert torch.equal(sampled, greedy.expand(2, -1))

    def test_without_cache_says_so(self):
        with pytest.warns(UserWarning, match="coverage_penalty has no effect without a cache"):
            answer(model(coverage_penalty=20.0), batch(CHATS[0]), use_cache=False)

    def test_several_ids_at_once_are_refused(self):
        with pytest.raises(ValueError, match="got .* ids at once; generate without an assistant"):
            answer(model(coverage_penalty=20.0), batch(CHATS[0]), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    "wrong", [{"coverage_penalty": -1.0}, {"coverage_penalty": 5.0, "connector": "pixel_unshuffle"}]
)
def test_config_refuses(wrong):
    options = model().config.to_dict() | wrong
    with pytest.raises(ValueError, match="coverage_penalty is .* expected 0, or more with connector"):
        VlmSliceConfig(**options)
