"""The modules under DDP: two ranks with half a batch each get the gradients of the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_gradguard.measure import TimestepProbe
from lightning_gradguard.nn import (
    LSTM,
    RNN,
    DilatedRNN,
    LayerNormGRU,
    LayerNormLSTM,
    SkipGRU,
    SkipLSTM,
    TemporalSkipRNN,
)
from tests.distributed import run_on_ranks

RANKS = 2
MAKERS = {
    "residual": lambda: LSTM(3, 4, 2, residual=True),
    "prelu": lambda: RNN(3, 4, nonlinearity="prelu"),
    "normalized": lambda: LayerNormLSTM(3, 4, 2),
    "normalized gru": lambda: LayerNormGRU(3, 4),
    "skip": lambda: SkipLSTM(3, 4, 2),
    "skip gru": lambda: SkipGRU(3, 4),
    "dilated": lambda: DilatedRNN(3, 4, 2, cell="gru"),
    "temporal skip": lambda: TemporalSkipRNN(3, 4, skip=2),
}


def model_and_batch(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MAKERS[name]().double(), torch.randn(8, 2 * RANKS, 3, dtype=torch.float64)


def gradients_on_a_rank() -> dict[str, tuple[dict[str, Any], int]]:
    results = {}
    for name in MAKERS:
        model, x = model_and_batch(name)
        shared = DistributedDataParallel(model)
        with TimestepProbe(model) as probe:  # what it does beside training must not disturb DDP
            shared(x[:, 2 * dist.get_rank() :][:, :2])[0].square().mean().backward()
            exact = sum(reading.source == "exact" for reading in probe.measure())
        named = model.named_parameters()
        gradients = {key: p.grad.tolist() for key, p in named if p.grad is not None}
        results[name] = (gradients, exact)
    return results


def test_gradients_are_those_of_the_whole_batch() -> None:
    ranks = run_on_ranks(gradients_on_a_rank, RANKS)
    for name in MAKERS:
        model, x = model_and_batch(name)
        model(x)[0].square().mean().backward()
        for results in ranks:
            gradients, exact = results[name]
            assert exact > 0, name
            assert gradients.keys() == dict(model.named_parameters()).keys()
            for key, parameter in model.named_parameters():
                found = torch.tensor(gradients[key], dtype=torch.float64)
                torch.testing.assert_close(found, parameter.grad, msg=f"{name} {key}")
