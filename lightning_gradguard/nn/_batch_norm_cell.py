"""The equations of :class:`BatchNormLSTM`, one timestep at a time.

Shape suffixes: ``R`` the sequences that are alive at a timestep, ``L`` the timesteps that have
statistics of their own, ``B`` batch, ``H`` hidden, ``G`` all gates together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, linear

from lightning_gradguard.nn._scan import Cell, States
from lightning_gradguard.nn.equations import GateWeights


@dataclass(frozen=True, eq=False)
class TimestepNorm:
    """Batch normalization with running statistics for each of the first L timesteps.

    Attributes:
        gain: γ.
        bias: β.
        mean: ``(L, features)``, as ``variance``.
        variance: Running variances.
        tracked: How many of the L timesteps have seen a batch, ``(1,)``.
        momentum: Weight of a batch in the running statistics.
        eps: Added to variances.
        training: Whether to take the statistics of the batch, and to note them.
    """

    gain: Tensor
    bias: Tensor | None
    mean: Tensor
    variance: Tensor
    tracked: Tensor
    momentum: float
    eps: float
    training: bool

    def settled(self) -> TimestepNorm:
        """For evaluation: timesteps without statistics have those of the last that has some."""
        L = self.mean.size(0)
        rows = torch.arange(L, device=self.mean.device)
        rows = torch.minimum(rows, (self.tracked - 1).clamp(min=0))
        return TimestepNorm(
            self.gain, self.bias, self.mean[rows], self.variance[rows],
            self.tracked, self.momentum, self.eps, training=False,
        )  # fmt: skip

    def __call__(self, number: int, x_RG: Tensor) -> Tensor:
        """Normalize what the alive sequences have at a timestep."""
        if not self.training:
            row = min(number, self.mean.size(0) - 1)
            return self._of(x_RG, self.mean[row], self.variance[row], training=False)
        if x_RG.size(0) == 1:
            # A batch of one has no variance: only what earlier batches had can tell.
            last = (self.tracked - 1).clamp(min=0, max=number)
            mean, variance = self.mean.index_select(0, last), self.variance.index_select(0, last)
            return self._of(x_RG, mean.squeeze(0), variance.squeeze(0), training=False)
        if number >= self.mean.size(0):
            return self._of(x_RG, None, None, training=True)
        return self._of(x_RG, self.mean[number], self.variance[number], training=True)

    def _of(
        self, x_RG: Tensor, mean: Tensor | None, variance: Tensor | None, *, training: bool
    ) -> Tensor:
        return batch_norm(
            x_RG, mean, variance, self.gain, self.bias, training, self.momentum, self.eps
        )


@dataclass(frozen=True, eq=False)
class BatchNormLSTMCell(Cell):
    """One layer and direction of :class:`BatchNormLSTM`."""

    weights: GateWeights
    norm_ih: TimestepNorm
    norm_hh: TimestepNorm
    norm_c: TimestepNorm

    def project(self, x: Tensor) -> States:
        """See :class:`Cell`."""
        return (linear(x, self.weights.weight_ih),)

    def step(self, number: int, projected: States, states: States) -> States:
        """See :class:`Cell`."""
        h_BH, c_BH = states
        recurrent_BG = linear(h_BH, self.weights.weight_hh)
        gates_BG = self.norm_ih(number, projected[0]) + self.norm_hh(number, recurrent_BG)
        i, f, g, o = gates_BG.chunk(4, 1)
        c = torch.addcmul(torch.sigmoid(i) * torch.tanh(g), torch.sigmoid(f), c_BH)
        return torch.sigmoid(o) * torch.tanh(self.norm_c(number, c)), c
