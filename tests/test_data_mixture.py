import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmslice.data.mixture import MixedDataset, ShuffledDataset


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 200), st.integers(0, 3), st.integers(1, 40))
def test_every_source_in_its_order_in_whole_groups(group, num_samples, seed, length):
    """Of 1000 + i and i: groups are pure, and each source is gone through from its first sample on, round and round."""
    sources = [(range(1000, 2000), 0.7), (range(length), 0.3)]
    mixed = MixedDataset(sources, num_samples, group, seed)
    samples = [mixed[i] for i in range(len(mixed))]
    assert len(samples) == num_samples
    for start in range(0, num_samples, group):
        assert len({sample >= 1000 for sample in samples[start : start + group]}) == 1
    long = [sample for sample in samples if sample >= 1000]
    short = [sample for sample in samples if sample < 1000]
    assert long == list(range(1000, 1000 + len(long)))
    assert short == [i % length for i in range(len(short))]


def test_shares_are_of_groups():
    mixed = MixedDataset([(range(10), 3.0), (range(100, 110), 1.0)], 40_000, 4)
    share = sum(mixed[i] >= 100 for i in range(40_000)) / 40_000
    assert share == pytest.approx(0.25, abs=0.02)


def test_mixture_is_the_same_every_time():
    sources = [(range(1000), 0.5), (range(1000, 2000), 0.5)]
    first, second, other = (MixedDataset(sources, 400, 2, seed) for seed in (0, 0, 1))
    assert [first[i] for i in range(400)] == [second[i] for i in range(400)] != [other[i] for i in range(400)]


def test_end():
    mixed = MixedDataset([(range(10), 1.0)], 5, 2)
    with pytest.raises(IndexError, match="^sample 5 of 5$"):
        mixed[5]


def test_shuffled_dataset_is_a_permutation():
    shuffled = ShuffledDataset(range(100), seed=1)
    assert sorted(shuffled) == list(range(100)) != list(shuffled)
    assert list(shuffled) == list(ShuffledDataset(range(100), seed=1)) != list(ShuffledDataset(range(100), 2))
