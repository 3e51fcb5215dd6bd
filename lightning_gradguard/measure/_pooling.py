"""Norms pooled over sequences and timesteps without underflow, on their device.

Shape suffixes: ``T`` time, ``S`` boundaries between timesteps, ``B`` batch, ``J`` subsets of it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """Values in the widest dtype that their device has."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def scale_of(peak: Tensor) -> Tensor:
    """What to divide by before squaring, so that small norms do not become 0."""
    return torch.where(peak.isfinite() & (peak > 0), peak, 1.0)


def log_pooled(norms_SB: Tensor, keep_BJ: Tensor) -> Tensor:
    """Log Frobenius norm over each subset of the sequences, shape ``(S, J)``."""
    wide_SB = wide(norms_SB)
    scale_S = scale_of(wide_SB.amax(1, keepdim=True))
    square_SJ = (wide_SB / scale_S).square() @ keep_BJ.to(wide_SB.dtype)
    return square_SJ.log() / 2 + scale_S.log()


def root_mean_square(values: Tensor, member: Tensor) -> Tensor:
    """Over the last dimension, of the members alone; NaN where there is none."""
    values = torch.where(member, values, 0.0)
    scale = scale_of(values.amax(-1, keepdim=True))
    mean = (values / scale).square().sum(-1) / member.sum(-1)
    return mean.sqrt() * scale.squeeze(-1)


def take(values_TB: Tensor, index_TB: Tensor) -> Tensor:
    """Values at an index of each sequence, 0 where the index is none of its timesteps."""
    inside_TB = (index_TB >= 0) & (index_TB < len(values_TB))
    return torch.where(inside_TB, values_TB.gather(0, index_TB.clamp(0, len(values_TB) - 1)), 0.0)
