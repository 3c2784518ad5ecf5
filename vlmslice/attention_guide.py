"""The guide loss: shows the language model where on the picture the characters of an answer stand.

From the language loss alone, a small model that must find the k-th character among hundreds of visual tokens stays for
tens of thousands of pictures on the plateau on which it writes likely words. A renderer knows the place. So the first
head of some layers is taught to look there (Liu et al., 2016, "Neural Machine Translation with Supervised Attention",
https://arxiv.org/abs/1609.04186): the divergence of its attention from the true places is added to the loss.

Where an answer counts, the second head of these layers is taught to look at all objects that are counted, evenly, from
each of its ids: which objects are meant is a question of its own, beside which of them is the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmslice.process_group import average_over_processes

NOTHING = -1
"""Among the keys of cross-attention, the place where nothing is."""


def guided_layers(num_layers: int) -> range:
    """From a third of the depth to the last layer but one: the question is read by then, and what was found is used.

    6 layers -> 2, 3, 4.
    """
    return range(num_layers // 3, max(num_layers - 1, num_layers // 3 + 1))


def guide_loss(
    attentions: Sequence[torch.Tensor], entries: torch.Tensor, shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence of the guided heads' attention from the true places, in nats per guided head and id.

    Args:
        attentions: of every layer, rows summing to 1: `[B, heads, L, L]`, or `[B, heads, L, visual tokens + 1]` of
            cross-attention.
        entries: `int64[M, 4]` (sample, head, position that predicts the id, position of a visual token among the keys).
        shares: `float[M]` share of that token in the places of that id and head; they sum to 1 for each.

    Returns:
        The loss, and the share of attention on true places of the first head in the last guided layer.
    """
    samples, heads, queries, keys = entries.unbind(1)
    layers = guided_layers(len(attentions))
    total = shares.new_zeros(())
    for layer in layers:
        weights = attentions[layer][samples, heads, queries, keys].float()
        total = total + (shares * (shares.log() - weights.clamp_min(1e-9).log())).sum()
    num_guided = average_over_processes(shares.sum()).clamp_min(1)
    first = heads == 0
    found = weights.detach()[first].sum() / shares[first].sum().clamp_min(1)
    return total / len(layers) / num_guided, found
