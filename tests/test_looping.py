"""Answers that go round in circles."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmslice.looping import LEAST_LENGTH, LEAST_REPEATS, StopLoops, ends_in_loop

IDS = st.lists(st.integers(0, 9), min_size=1, max_size=60)


@given(IDS, IDS)
def test_a_piece_written_over_and_over(before, piece):
    repeats = max(LEAST_REPEATS, -(-LEAST_LENGTH // len(piece)))
    assert ends_in_loop(before + repeats * piece)


@given(IDS, st.integers(1, 60), st.randoms(use_true_random=False))
def test_what_is_too_short_or_too_rare_goes_on(before, length, random):
    piece = [10 + k for k in range(length)]  # no part of it repeats
    random.shuffle(piece)
    most = min(LEAST_REPEATS - 1, (LEAST_LENGTH - 1) // length)
    assert not ends_in_loop(before + most * piece)
    assert not ends_in_loop(before + (LEAST_REPEATS + LEAST_LENGTH) * piece + [99])


def test_a_dotted_line_is_no_loop_and_a_longer_one_is():
    assert not ends_in_loop((LEAST_LENGTH - 1) * [7])
    assert ends_in_loop(LEAST_LENGTH * [7])


def test_only_the_answer_is_looked_at_and_each_row_for_itself():
    loops = StopLoops(100)
    ids = torch.arange(2 * 400).reshape(2, 400)
    ids[0, :100] = 1  # the prompt
    ids[1, 150:] = 2
    assert loops(ids[:, : 100 + LEAST_LENGTH], torch.empty(0)).tolist() == [False, False]
    assert loops(ids, torch.empty(0)).tolist() == [False, True]
    assert loops.stopped == {1: 300}
