"""Recurrent nets for the digits, and what is kept of one that was trained under the monitor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from digits_task import SequenceClassifier
from torch import Tensor, nn
from typing_extensions import override

from lightning_gradguard.readings import HORIZON_FACTOR, TimeReading

KINDS = ("tanh RNN", "ReLU RNN", "LSTM", "GRU")
HIDDEN = 64
LEARNING_RATE = 3e-3
FACTOR, LAG = 0.8, 50  # of the linear RNN: what a step back leaves, and how many there are


def recurrent(kind: str) -> nn.RNNBase:
    if kind == "LSTM":
        return nn.LSTM(1, HIDDEN, batch_first=True)
    if kind == "GRU":
        return nn.GRU(1, HIDDEN, batch_first=True)
    nonlinearity = "relu" if kind == "ReLU RNN" else "tanh"
    return nn.RNN(1, HIDDEN, batch_first=True, nonlinearity=nonlinearity)


class Classifier(SequenceClassifier):
    """Any of torch's recurrent modules, default weights, read out after the last pixel."""

    def __init__(self, kind: str) -> None:
        super().__init__(LEARNING_RATE, HIDDEN)
        self.add_module("rnn", recurrent(kind))  # in place of the LSTM

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class LinearClassifier(Classifier):
    """A tanh RNN that never leaves its linear range, over the first 51 pixels.

    The states stay below 1e-3, where the slope of tanh is 1 to within 1e-6. Each step back then
    multiplies the gradient by the transposed recurrent weight, and an orthogonal matrix turns it
    without a change of length.
    """

    def __init__(self) -> None:
        super().__init__("tanh RNN")
        with torch.no_grad():
            for name, parameter in self.rnn.named_parameters():
                if name.startswith("bias"):
                    parameter.zero_()
                elif name.startswith("weight_hh"):
                    nn.init.orthogonal_(parameter, gain=FACTOR)

    @override
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(1e-4 * x[:, : LAG + 1])
        return logits


@dataclass(frozen=True)
class Net:
    """One net and how the gradient traveled through it, each reading exact, oldest first."""

    name: str
    accuracy: float
    readings: list[TimeReading]

    @property
    def start(self) -> TimeReading:
        """Before the first step."""
        return self.readings[0]

    @property
    def end(self) -> TimeReading:
        """Mean over the last tenth of training, since one batch differs from the next."""
        return mean_of(self.readings[-math.ceil(len(self.readings) / 10) :])


def mean_of(readings: Sequence[TimeReading]) -> TimeReading:
    """Means of the logarithms; no interval, because neighboring readings share their weights."""
    logs = torch.tensor([reading.profile for reading in readings], dtype=torch.float64).log()
    count = len(readings)
    return replace(
        readings[-1],
        sequences=sum(reading.sequences for reading in readings),
        decay_rate=sum(reading.decay_rate for reading in readings) / count,
        decay_error=readings[-1].decay_error if count == 1 else math.nan,
        recency=sum(reading.recency for reading in readings) / count,
        profile=tuple(logs.mean(0).exp().tolist()),
    )


def relative(reading: TimeReading) -> list[float]:
    """Norm relative to that of the last timestep, by the number of steps back from it."""
    return [norm / reading.profile[-1] for norm in reversed(reading.profile)]


def reached(reading: TimeReading) -> int:
    """Timesteps, counted back from the last, until the norm is below 1/1000 of the last one's."""
    below = (lag for lag, norm in enumerate(relative(reading)) if not norm >= 1 / HORIZON_FACTOR)
    return next(below, len(reading.profile))


def reaches_all(reading: TimeReading) -> bool:
    return reached(reading) == len(reading.profile)
