"""The guide loss: shows the language model where on the picture the characters of an answer stand.

From the language loss alone, a small model that must find the k-th character among hundreds of visual tokens stays for
tens of thousands of pictures on the plateau on which it writes likely words. A renderer knows the place. So the first
head of some layers is taught to look there (Liu et al., 2016, "Neural Machine Translation with Supervised Attention",
https://arxiv.org/abs/1609.04186): the divergence of its attention from the true places is added to the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmslice.process_group import average_over_processes


def guided_layers(num_layers: int) -> range:
    """From a third of the depth to the last layer but one: the question is read by then, and what was found is used.

    6 layers -> 2, 3, 4.
    """
    return range(num_layers // 3, max(num_layers - 1, num_layers // 3 + 1))


def guide_loss(
    attentions: Sequence[torch.Tensor], entries: torch.Tensor, shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence of the guided heads' attention from the true places, in nats per guided character.

    Args:
        attentions: of every layer, rows summing to 1: `[B, heads, L, L]`, or `[B, heads, L, visual tokens + 1]` of
            cross-attention.
        entries: `int64[M, 3]` (sample, position that predicts the character, position of a visual token among the
            keys).
        shares: `float[M]` share of that token in the character's places; they sum to 1 for each character.

    Returns:
        The loss, and the share of attention on true places in the last guided layer.
    """
    samples, queries, keys = entries.unbind(1)
    layers = guided_layers(len(attentions))
    total = shares.new_zeros(())
    for layer in layers:
        weights = attentions[layer][samples, 0, queries, keys].float()
        total = total + (shares * (shares.log() - weights.clamp_min(1e-9).log())).sum()
    num_characters = average_over_processes(shares.sum()).clamp_min(1)
    found = weights.detach().sum() / shares.sum().clamp_min(1)
    return total / len(layers) / num_characters, found
