"""Modules that note their states, on a GPU: what is read there is what is read on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_gradguard.measure import TimestepProbe
from lightning_gradguard.nn import LSTM, BatchNormLSTM, DilatedRNN, LayerNormGRU, SkipLSTM
from lightning_gradguard.readings import TimeReading

MAKERS = {
    "residual": lambda: LSTM(3, 16, 3, residual=True),
    "normalized": lambda: LayerNormGRU(3, 16, 2),
    "batch norm": lambda: BatchNormLSTM(3, 16, max_length=30),
    "skip": lambda: SkipLSTM(3, 16, 2),
    "dilated": lambda: DilatedRNN(3, 16, 3, cell="gru"),
}


def read(model: nn.Module, x: torch.Tensor) -> list[TimeReading]:
    with TimestepProbe(model) as probe:
        model(x)[0].square().sum().backward()
        return probe.measure()


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAKERS)
def test_on_cuda_as_on_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    model, x = MAKERS[name](), torch.randn(24, 8, 3)
    there = copy.deepcopy(model).cuda()
    with torch.backends.cudnn.flags(allow_tf32=False):
        measured = read(there, x.cuda())
    for theirs, ours in zip(measured, read(model, x), strict=True):
        assert (theirs.name, theirs.source, theirs.note) == (ours.name, "exact", "")
        assert theirs.decay_rate == pytest.approx(ours.decay_rate, rel=0.02)
        assert theirs.recency == pytest.approx(ours.recency, rel=0.02)
