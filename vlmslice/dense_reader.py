"""The dense stage's model: the vision encoder with a linear head that labels every cell of every patch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from vlmslice.data.dense import CELLS_PER_SIDE, HEADS, UNKNOWN
from vlmslice.process_group import average_over_processes
from vlmslice.vision_encoder import VlmSliceVisionConfig, VlmSliceVisionEncoder

# Most cells show nothing; what is there weighs more than where nothing is.
_EMPTY_WEIGHTS = {"character": 0.15, "kind": 0.15, "color": 0.15, "center": 0.05, "glyph": 0.1}
_LOSS_WEIGHTS = {"character": 1.0, "kind": 0.3, "color": 0.3, "center": 1.0, "glyph": 1.0}


class DenseHead(nn.Module):
    """Cell labels from patch features: one linear layer for all of `HEADS`."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.cells = CELLS_PER_SIDE**2
        self.projection = nn.Linear(hidden_size, self.cells * sum(HEADS.values()))

    def reset_parameters(self) -> None:
        self.projection.reset_parameters()

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits `[V, T, cells, classes]` by name, from features `[V, T, D]`."""
        logits = self.projection(features).unflatten(-1, (self.cells, -1))
        return dict(zip(HEADS, logits.split(list(HEADS.values()), dim=-1), strict=True))


def dense_loss(
    logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor], valid: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted cross-entropy over real patches, and the share of labelled cells told right, by name.

    While several processes train, the weights are those of the cells of all of them, so that the mean of the losses
    is the loss of one process with all samples.

    Args:
        logits: `[V, T, cells, classes]` by name.
        labels: `int64[V, T, cells]` by name; 0 where nothing is, `UNKNOWN` where nobody knows.
        valid: `bool[V, T]`, False at padding.
    """
    sums, weights, right = [], [], {}
    full = bool(valid.all())
    for name, label in labels.items():
        label, logit = (x.flatten(0, 1) if full else x[valid] for x in (label, logits[name]))
        logit = logit.float()
        weight = torch.ones(logit.shape[-1], device=logit.device)
        weight[0] = _EMPTY_WEIGHTS[name]
        sums.append(
            _LOSS_WEIGHTS[name]
            * F.cross_entropy(
                logit.flatten(0, 1), label.flatten(), weight, ignore_index=UNKNOWN, reduction="sum"
            )
        )
        weights.append(weight[label[label != UNKNOWN]].sum())
        with torch.no_grad():
            present = label > 0
            hits = (logit.argmax(-1) == label)[present]
            right[name] = hits.float().mean() if len(hits) else torch.tensor(float("nan"))
    divisors = average_over_processes(torch.stack(weights)).clamp_min(1e-6)
    return (torch.stack(sums) / divisors).sum(), right


class DenseReader(nn.Module):
    """Encoder and head, in the form that transformers' Trainer takes."""

    def __init__(self, config: VlmSliceVisionConfig):
        super().__init__()
        self.encoder = VlmSliceVisionEncoder(config)
        self.head = DenseHead(config.hidden_size)
        self.config = config

    def forward(self, pixel_values: torch.Tensor, target_sizes: torch.Tensor, **labels: torch.Tensor) -> dict:
        features, valid = self.encoder(pixel_values, target_sizes)
        logits = self.head(features)
        labels = {name: labels[f"label_{name}"] for name in HEADS}
        loss, right = dense_loss(logits, labels, valid)
        return {"loss": loss, "metrics": {f"{name}_right": value for name, value in right.items()}}


_WEIGHTS = "model.safetensors"


def save_dense_reader(reader: nn.Module, folder: Path) -> None:
    """Saves the weights of a `DenseReader`, for `adopt_dense_reader`."""
    save_file(reader.state_dict(), folder / _WEIGHTS)


def adopt_dense_reader(folder: Path, encoder: VlmSliceVisionEncoder, head: DenseHead | None = None) -> None:
    """Loads what `save_dense_reader` saved into an encoder and, if there is one, a head."""
    weights = load_file(folder / _WEIGHTS)
    for prefix, module in (("encoder.", encoder), ("head.", head)):
        if module is not None:
            part = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            module.load_state_dict(part)
