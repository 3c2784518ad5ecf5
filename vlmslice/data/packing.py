"""Packing: several whole samples share a row, so that a batch of long and short ones holds hardly any padding.

    row 0   | receipt ...................................... | 2+2? | line ... | . |     at most max_length positions
    row 1   | paragraph .................. | paragraph .................. | count  |

No sample sees another: position ids start at 0 in each, and the model keeps apart what they tell apart (see
`packed_rows`). Which samples share a row is planned beforehand from their sizes. (Krell et al., 2021, "Efficient
sequence packing without cross-contamination", https://arxiv.org/abs/2107.02027.)

A stage of packed rows, of which `per_device_train_batch_size` counts rows::

    sizes = measure_dataset(dataset.without_pixels(), partial(measure_conversation, processor), Path("sizes.json"))
    Stage(
        dataset=PackedDataset(dataset, sizes, max_length=2048),
        collator=PackingCollator(VlmSliceCollator(processor), processor, max_length=2048),
        ...
    )
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BatchFeature

from vlmslice.attention_guide import NOTHING
from vlmslice.data.collator import IGNORED
from vlmslice.data.lengths import SampleSize, check_sizes
from vlmslice.errors import VlmSliceError
from vlmslice.processing import VlmSliceProcessor

_OF_VIEWS = ("pixel_values", "target_sizes", "canvas_boxes", "num_views", "token_boxes", "guide_shares")
"""What stays as it is: it goes by images, which keep their order."""


class PackingError(VlmSliceError, ValueError):
    """A sample fits in no row, or a batch cannot be packed."""


def plan_packs(
    sizes: Sequence[SampleSize], max_length: int, max_visual_tokens: int | None = None, window: int = 512
) -> list[list[int]]:
    """Deals samples out to packs, each sample to one.

    First-fit decreasing in every `window` samples by themselves: from the largest on, each goes to the first pack with
    room for it. (Under one bound at most 11/9 of the fewest packs possible, and one: Dosa, 2007.) Of 9, 4, 6, 1 ids and
    rows of 10 it makes the packs (9, 1) and (4, 6).

    Args:
        sizes: of the samples.
        max_length: ids of a pack at most.
        max_visual_tokens: visual tokens of a pack at most, if that is bounded, too. With the connector
            `cross_attention` they do not count as ids, and every id of a row is matched with every one of them.
        window: samples dealt out together; the larger, the fuller the rows, and the further samples move.

    Returns:
        Numbers of the samples of each pack, rising; packs in the order of their first samples.

    Raises:
        PackingError: a sample is larger than a pack.
    """
    bounds = (max_length, math.inf if max_visual_tokens is None else max_visual_tokens)
    for number, size in enumerate(sizes):
        if any(part > bound for part, bound in zip(size, bounds, strict=True)):
            raise PackingError(
                f"sample {number} has {size.num_ids} ids and {size.num_visual_tokens} visual tokens; expected at most "
                f"max_length={max_length} and max_visual_tokens={max_visual_tokens} of a row; raise these, lower "
                "max_visual_tokens of the image processor, or leave the sample out"
            )

    def fill(number: int) -> float:
        return max(part / bound for part, bound in zip(sizes[number], bounds, strict=True))

    plan = []
    for start in range(0, len(sizes), window):
        packs: list[list[int]] = []
        room: list[tuple[float, float]] = []
        for number in sorted(range(start, min(start + window, len(sizes))), key=lambda i: (-fill(i), i)):
            num_ids, num_visual_tokens = sizes[number]
            for pack, (ids_left, tokens_left) in enumerate(room):
                if num_ids <= ids_left and num_visual_tokens <= tokens_left:
                    packs[pack].append(number)
                    room[pack] = ids_left - num_ids, tokens_left - num_visual_tokens
                    break
            else:
                packs.append([number])
                room.append((bounds[0] - num_ids, bounds[1] - num_visual_tokens))
        plan += sorted(sorted(pack) for pack in packs)
    return plan


class PackedDataset(Dataset):
    """Packs of another dataset's samples: item i is the list of the samples of pack i, always the same.

    Args:
        dataset: map-style; sample i must be the same at every call.
        sizes: of its samples, see `lengths.measure_dataset`.
        max_length, max_visual_tokens, window: see `plan_packs`.
    """

    def __init__(
        self,
        dataset: Sequence[Any],
        sizes: Sequence[SampleSize],
        max_length: int,
        max_visual_tokens: int | None = None,
        window: int = 512,
    ):
        check_sizes(dataset, sizes)
        self.dataset = dataset
        self.plan = plan_packs(sizes, max_length, max_visual_tokens, window)
        self.fill = sum(size.num_ids for size in sizes) / (max_length * len(self.plan))
        """Share of the positions of full rows that samples take."""

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> list[Any]:
        return [self.dataset[number] for number in self.plan[index]]


class PackingCollator:
    """Packs -> one row each, from what another collator makes of their samples.

    Of that batch, `input_ids`, `labels` and `loss_weights` are laid side by side, `guide_entries` are moved along, what
    goes by images stays, `attention_mask` goes, and `position_ids`, `int64[rows, L]`, come. A row is filled up with
    padding whose positions start at 0, like one more sample without an answer.

    Args:
        collator: of single samples, padding on the right: `VlmSliceCollator`, `TaskCollator`, or one of them in a
            `WeightingCollator`.
        processor: of that collator.
        max_length: positions of a row at most.
        pad_to_multiple_of: rows of a batch are as long as the longest, rounded up to a multiple of this.
    """

    def __init__(
        self,
        collator: Callable[[Sequence[Any]], Any],
        processor: VlmSliceProcessor,
        max_length: int,
        pad_to_multiple_of: int = 16,
    ):
        self.collator = collator
        self.processor = processor
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self._padding = {
            "input_ids": processor.tokenizer.pad_token_id,
            "labels": IGNORED,
            "loss_weights": 0.0,
        }

    def __call__(self, packs: Sequence[Sequence[Any]]) -> BatchFeature:
        """Builds the model inputs of packs, each a list of samples."""
        batch = self.collator([sample for pack in packs for sample in pack])
        lengths = batch["attention_mask"].sum(1)
        self._check(batch, lengths)
        lengths_of_packs = lengths.split([len(pack) for pack in packs])
        num_positions = self._row_length(lengths_of_packs)
        packed: dict[str, Any] = {}
        for name, value in batch.items():
            if name in self._padding:
                cut = iter([row[:length] for row, length in zip(value, lengths.tolist(), strict=True)])
                rows = value.new_full((len(packs), num_positions), self._padding[name])
                for row, pack in zip(rows, packs, strict=True):
                    joined = torch.cat([next(cut) for _ in pack])
                    row[: len(joined)] = joined
                packed[name] = rows
            elif name == "guide_entries":
                packed[name] = self._move_entries(value, batch, lengths_of_packs)
            elif name != "attention_mask":
                packed[name] = value
        packed["position_ids"] = _restarting_positions(lengths_of_packs, num_positions)
        return BatchFeature(packed)

    def _check(self, batch: Any, lengths: torch.Tensor) -> None:
        known = ("attention_mask", "guide_entries", *self._padding, *_OF_VIEWS)
        unknown = sorted(name for name in batch if name not in known and not name.startswith("label_"))
        if unknown:
            raise PackingError(
                f"the batch to be packed holds {', '.join(unknown)}, expected {', '.join(known)} and label_* only; "
                "leave it out of the collator, or teach PackingCollator to lay it side by side"
            )
        mask = batch["attention_mask"]
        if not torch.equal(mask.bool(), torch.arange(mask.shape[1]) < lengths[:, None]):
            raise PackingError(
                "the batch to be packed is not padded on the right; use VlmSliceCollator or TaskCollator"
            )
        # Else the first id of a sample would be foretold from the last of the sample before it.
        assert (batch["labels"][:, 0] == IGNORED).all()

    def _row_length(self, lengths_of_packs: Sequence[torch.Tensor]) -> int:
        totals = [int(lengths.sum()) for lengths in lengths_of_packs]
        for number, (total, lengths) in enumerate(zip(totals, lengths_of_packs, strict=True)):
            if total > self.max_length:
                raise PackingError(
                    f"row {number} of the batch has {total} positions, of samples of {lengths.tolist()}; expected at "
                    f"most max_length={self.max_length}; give PackedDataset the same max_length, and sizes measured "
                    "of this data with this processor"
                )
        multiple = self.pad_to_multiple_of
        return -(-max(totals) // multiple) * multiple

    def _move_entries(
        self, entries: torch.Tensor, batch: Any, lengths_of_packs: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Entries (sample, head, position, key) of the guide, see `attention_guide`, as entries of rows."""
        sample, head, position, key = entries.unbind(1)
        row = torch.cat([torch.full_like(lengths, row) for row, lengths in enumerate(lengths_of_packs)])
        starts = torch.cat([lengths.cumsum(0) - lengths for lengths in lengths_of_packs])
        key_starts = starts
        if self.processor.one_placeholder:  # a key is a visual token, counted within the row
            num_tokens = self._visual_tokens(batch).split([len(lengths) for lengths in lengths_of_packs])
            key_starts = torch.cat([counts.cumsum(0) - counts for counts in num_tokens])
        moved = torch.where(key == NOTHING, key, key + key_starts[sample])
        return torch.stack([row[sample], head, position + starts[sample], moved], dim=1)

    def _visual_tokens(self, batch: Any) -> torch.Tensor:
        """`int64[samples]`, of samples whose images stand in the prompt as one placeholder each."""
        num_images = (batch["input_ids"] == self.processor.image_token_id).sum(1)
        if "num_views" not in batch:
            return num_images
        image_processor = self.processor.image_processor
        of_views = (batch["target_sizes"] // image_processor.merge_size).prod(1)
        if "token_boxes" in batch:
            of_views = (batch["token_boxes"][:, 2:] - batch["token_boxes"][:, :2]).prod(1)
        if image_processor.tokens_per_view is not None:
            of_views = torch.full_like(of_views, image_processor.tokens_per_view)
        of_images = [views.sum() for views in of_views.split(batch["num_views"].tolist())]
        images = iter(of_images)
        return torch.stack(
            [sum((next(images) for _ in range(n)), of_views.new_zeros(())) for n in num_images]
        )


def _restarting_positions(lengths_of_packs: Sequence[torch.Tensor], num_positions: int) -> torch.Tensor:
    """`int64[rows, num_positions]`: 0 1 2 0 1 0 1 2 of samples of 3 and 2 ids and padding up to 8."""
    rows = []
    for lengths in lengths_of_packs:
        parts = [*lengths.tolist(), num_positions - int(lengths.sum())]
        rows.append(torch.cat([torch.arange(part) for part in parts]))
    return torch.stack(rows)
