"""Recurrent modules in which gradients live longer, and what goes with them.

They are drop-in: recurrent modules take and return what :class:`torch.nn.LSTM` does, but for states
that have to hold more, which their classes describe. What happens to the gradient in them is
measured exactly by :class:`~lightning_gradguard.measure.TimestepProbe`.

Example:
    >>> import torch
    >>> from lightning_gradguard.nn import SkipGRU
    >>> gru = SkipGRU(3, 16, batch_first=True)
    >>> output, state = gru(torch.randn(8, 50, 3))
    >>> output.shape
    torch.Size([8, 50, 16])
"""

from __future__ import annotations

from lightning_gradguard.nn import init
from lightning_gradguard.nn.attention import TemporalAttention
from lightning_gradguard.nn.batch_norm import BatchNormLSTM
from lightning_gradguard.nn.convert import from_torch
from lightning_gradguard.nn.dilated import DilatedRNN
from lightning_gradguard.nn.normalized import LayerNormGRU, LayerNormLSTM
from lightning_gradguard.nn.rnn import GRU, LSTM, RNN
from lightning_gradguard.nn.skip import SkipGRU, SkipLSTM, skip_budget_loss, update_share
from lightning_gradguard.nn.stack import RecurrentStack
from lightning_gradguard.nn.temporal_skip import TemporalSkipRNN
from lightning_gradguard.nn.weight_decay import weight_decay_groups

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BatchNormLSTM",
    "DilatedRNN",
    "LayerNormGRU",
    "LayerNormLSTM",
    "RecurrentStack",
    "SkipGRU",
    "SkipLSTM",
    "TemporalAttention",
    "TemporalSkipRNN",
    "from_torch",
    "init",
    "skip_budget_loss",
    "update_share",
    "weight_decay_groups",
]
