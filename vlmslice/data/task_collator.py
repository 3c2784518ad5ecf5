"""Rendered task samples -> one training batch, with cell labels for the dense loss and places for the guide loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from transformers import BatchFeature

from vlmslice.connectors import query_grid
from vlmslice.data.collator import IGNORED, VlmSliceCollator
from vlmslice.data.dense import CELLS_PER_SIDE, HEADS, label_cells
from vlmslice.data.tasks import TaskSample
from vlmslice.processing import VlmSliceProcessor
from vlmslice.slicing import SlicePlan, View
from vlmslice.spatial_schema import IMAGE_TOKEN


class TaskCollator:
    """`VlmSliceCollator` for `TaskSample`s, with what the renderer knows besides.

    - `label_NAME`: `int64[V, T, cells]` for every name in `HEADS`, following the very plan by which the image
      processor cuts the picture; left out with `dense=False`
    - `guide_entries`, `guide_shares`: see `attention_guide.guide_loss`; left out with `guide=False`. The place of a
      character is the visual token of the slice that covers its centre. Needs a tokenizer with one id per UTF-8 byte
      of the answers.
    """

    def __init__(self, processor: VlmSliceProcessor, dense: bool = True, guide: bool = True):
        self.processor = processor
        self.dense = dense
        self.guide = guide
        self._conversations = VlmSliceCollator(processor)
        self._image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def __call__(self, samples: Sequence[TaskSample]) -> BatchFeature:
        batch = self._conversations([{"messages": s.messages, "images": [s.scene.image]} for s in samples])
        plans = [
            self.processor.image_processor.plan(s.scene.image.height, s.scene.image.width) for s in samples
        ]
        if self.dense:
            batch.update(self._cell_labels(samples, plans, batch["pixel_values"].shape[:2]))
        if self.guide:
            batch.update(self._guide(samples, plans, batch["input_ids"], batch["labels"]))
        return batch

    @staticmethod
    def _cell_labels(
        samples: Sequence[TaskSample], plans: list[SlicePlan], shape: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        labels = {name: torch.zeros(*shape, CELLS_PER_SIDE**2, dtype=torch.int64) for name in HEADS}
        views = [
            (sample.scene, view) for sample, plan in zip(samples, plans, strict=True) for view in plan.views
        ]
        for row, (scene, view) in enumerate(views):
            for name, cells in label_cells(scene, view.box, view.patch_grid).items():
                labels[name][row, : len(cells)] = torch.from_numpy(cells)
        return {f"label_{name}": value for name, value in labels.items()}

    def _guide(
        self,
        samples: Sequence[TaskSample],
        plans: list[SlicePlan],
        input_ids: torch.Tensor,
        labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        entries, shares = [], []
        for row, (sample, plan) in enumerate(zip(samples, plans, strict=True)):
            if not any(sample.places):
                continue
            places_of_bytes = [
                places
                for character, places in zip(sample.answer, sample.places, strict=True)
                for _ in character.encode()
            ]
            answer = _positions(labels[row] != IGNORED)
            if len(answer) != len(places_of_bytes) + 1:
                raise ValueError(
                    f"the answer {sample.answer!r} has {len(answer)} ids, expected one per byte and the end; "
                    "leave `places` out of samples for this tokenizer"
                )
            placeholders = _positions(input_ids[row] == self._image_id)
            for position, places in zip(answer, places_of_bytes, strict=False):
                tokens = [self._find_visual_token(plan, y, x) for y, x in places]
                for token, number in Counter(tokens).items():
                    entries.append([row, position - 1, placeholders[token]])
                    shares.append(number / len(tokens))
        return {
            "guide_entries": torch.tensor(entries, dtype=torch.int64).reshape(-1, 3),
            "guide_shares": torch.tensor(shares, dtype=torch.float32),
        }

    def _find_visual_token(self, plan: SlicePlan, y: float, x: float) -> int:
        """Index, among the visual tokens of an image, of the one in the slices that covers a point of the image."""
        first = plan.overview.num_visual_tokens if plan.overview is not None else 0
        height, width = plan.image_size
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        for view in plan.slices:
            top, left, bottom, right = view.box
            if y < bottom and x < right:
                rows, cols = self._token_grid(view)
                row, col = int((y - top) / (bottom - top) * rows), int((x - left) / (right - left) * cols)
                return first + row * cols + col
            first += view.num_visual_tokens
        raise AssertionError(f"no slice covers {(y, x)}")

    def _token_grid(self, view: View) -> tuple[int, int]:
        image_processor = self.processor.image_processor
        if image_processor.tokens_per_view is not None:
            return query_grid(view.num_visual_tokens)
        rows, cols = view.patch_grid
        return rows // image_processor.merge_size, cols // image_processor.merge_size


def _positions(mask: torch.Tensor) -> list[int]:
    return torch.nonzero(mask)[:, 0].tolist()
