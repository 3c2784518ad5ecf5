"""Rendered task samples -> one training batch, with cell labels for the dense loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import BatchFeature

from vlmslice.data.collator import VlmSliceCollator
from vlmslice.data.dense import CELLS_PER_SIDE, HEADS, label_cells
from vlmslice.data.tasks import TaskSample
from vlmslice.processing import VlmSliceProcessor


class TaskCollator:
    """`VlmSliceCollator` for `TaskSample`s, plus `label_NAME`: `int64[V, T, cells]` for every name in `HEADS`.

    The cell labels follow the very plan by which the image processor cuts the picture.
    """

    def __init__(self, processor: VlmSliceProcessor, dense: bool = True):
        self.processor = processor
        self.dense = dense
        self._conversations = VlmSliceCollator(processor)

    def __call__(self, samples: Sequence[TaskSample]) -> BatchFeature:
        batch = self._conversations([{"messages": s.messages, "images": [s.scene.image]} for s in samples])
        if not self.dense:
            return batch
        num_views, num_patches = batch["pixel_values"].shape[:2]
        labels = {
            name: torch.zeros(num_views, num_patches, CELLS_PER_SIDE**2, dtype=torch.int64) for name in HEADS
        }
        row = 0
        for sample in samples:
            image = sample.scene.image
            for view in self.processor.image_processor.plan(image.height, image.width).views:
                for name, cells in label_cells(sample.scene, view.box, view.patch_grid).items():
                    labels[name][row, : len(cells)] = torch.from_numpy(cells)
                row += 1
        batch.update({f"label_{name}": value for name, value in labels.items()})
        return batch
