"""2D sine-cosine positions at any, also fractional, place (Vaswani et al., 2017, in two dimensions)."""

from __future__ import annotations

import math

import torch


def sincos_2d(
    positions: torch.Tensor, dim: int, longest: float = 200.0, shortest: float = 4.0
) -> torch.Tensor:
    """Embeds (y, x) positions.

    Half of the channels tell y, half x; each half holds sines and cosines of wavelengths from `shortest` to
    `longest`, spaced evenly in the logarithm. The product of two embeddings falls with the distance of the places.

    Args:
        positions: `[..., 2]` in any unit, (y, x).
        dim: width of the embedding, a multiple of 4.
        longest: longest wavelength, in the unit of `positions`.
        shortest: shortest wavelength; 4 patches tell neighbours apart without aliasing.

    Returns:
        `float[..., dim]`, of root mean square `sqrt(1/2)`.
    """
    if dim % 4:
        raise ValueError(f"dim is {dim}, expected a multiple of 4 (sine and cosine of y and of x)")
    steps = torch.linspace(0, 1, dim // 4, device=positions.device, dtype=torch.float32)
    frequencies = 2 * math.pi / (shortest * (longest / shortest) ** steps)
    angles = positions.float().unsqueeze(-1) * frequencies  # [..., 2, dim / 4]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
