"""Several datasets as one, by share; sample i is always the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vlmslice.data.scenes import sample_rng


class MixedDataset(Dataset):
    """Groups of consecutive samples, each group from one source.

    Every source is gone through in its order; one whose end is reached begins again. With `group` a multiple of the
    batch size, a batch has samples of one source only.

    Args:
        sources: (dataset, share) pairs; shares are of groups and need not sum to 1.
        num_samples: length of the mixture.
        group: samples of a group.
        seed: of the order of the sources.
    """

    def __init__(
        self, sources: Sequence[tuple[Sequence[Any], float]], num_samples: int, group: int, seed: int = 0
    ):
        self.sources, self.seed = list(sources), seed
        self.datasets = [dataset for dataset, _ in sources]
        self.num_samples, self.group = num_samples, group
        shares = [share for _, share in sources]
        rng = sample_rng(seed, "mixture", 0)
        num_groups = -(-num_samples // group)
        self._source = rng.choices(range(len(sources)), shares, k=num_groups)
        chosen = np.array(self._source)[:, None] == np.arange(len(sources))
        self._before = (chosen.cumsum(0) - chosen)[np.arange(num_groups), self._source]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        number, inside = divmod(index, self.group)
        dataset = self.datasets[self._source[number]]
        return dataset[(int(self._before[number]) * self.group + inside) % len(dataset)]


class ShuffledDataset(Sequence[Any]):
    """The samples of another dataset in an order drawn from a seed."""

    def __init__(self, dataset: Sequence[Any], seed: int = 0):
        self.dataset, self.seed = dataset, seed
        self._order = list(range(len(dataset)))
        sample_rng(seed, "shuffle", 0).shuffle(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]  # no slices
        return self.dataset[self._order[index]]
