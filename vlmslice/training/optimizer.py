"""Muon for the matrices of a network, AdamW for the rest, under one schedule.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) makes the update of a matrix nearly orthogonal,
so that directions with small gradients are learned as well as those with large ones. Its step is scaled to the size of
AdamW's (Liu et al., 2025, https://arxiv.org/abs/2502.16982), so both take the same learning rate and weight decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW as one optimizer, with one state dict.

    Args:
        groups: as any optimizer takes them. Those with `"is_matrix": True` hold matrices only and go to Muon; the
            others take `"is_matrix": False`.
        betas, eps: of AdamW.
        momentum: of Muon.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ):
        matrices = [group for group in groups if group["is_matrix"]]
        others = [group for group in groups if not group["is_matrix"]]
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            parts.append(
                torch.optim.Muon(
                    matrices, lr, weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
                )
            )
        if others:
            parts.append(torch.optim.AdamW(others, lr, betas, eps, weight_decay, fused=True))
        super().__init__([*matrices, *others], {"lr": lr, "weight_decay": weight_decay})
        self._parts = parts
        self._share()

    def _share(self) -> None:
        """Lets the parts work on the groups and the state of the whole."""
        first = 0
        for part in self._parts:
            last = first + len(part.param_groups)
            part.param_groups = self.param_groups[first:last]
            part.state = self.state
            first = last

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def find_matrices(model: nn.Module, prefixes: tuple[str, ...]) -> Iterator[torch.Tensor]:
    """Trainable weights of the `nn.Linear`s whose names begin with one of `prefixes`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(prefixes) and module.weight.requires_grad:
            yield module.weight
