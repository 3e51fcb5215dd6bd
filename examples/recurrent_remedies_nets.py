"""The model, the modules that are swapped into it, and what is kept of each training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from lightning_gradguard.nn import (
    GRU,
    LSTM,
    RNN,
    DilatedRNN,
    LayerNormGRU,
    SkipGRU,
    TemporalAttention,
    TemporalSkipRNN,
    skip_budget_loss,
    update_share,
)
from lightning_gradguard.readings import HORIZON_FACTOR, TimeReading
from lightning_gradguard.tasks import SequenceTask

HIDDEN = 32
LEARNING_RATE = 5e-3
COST_OF_UPDATE = 3e-4  # of a Skip RNN, in nats; the loss of whoever guesses is 1.39

# What model.rnn is, given the task; with attention, also what model.pool is.
Swap = Callable[[SequenceTask], nn.Module | tuple[nn.Module, nn.Module]]
SWAPS: Mapping[str, Swap] = {
    "nn.RNN": lambda t: nn.RNN(t.input_size, HIDDEN, batch_first=True),
    "RNN, ReLU, identity": lambda t: RNN(
        t.input_size, HIDDEN, batch_first=True, nonlinearity="relu", init="identity"
    ),
    "LSTM, forget bias 1": lambda t: LSTM(t.input_size, HIDDEN, batch_first=True, forget_bias=1.0),
    "LSTM, chrono": lambda t: LSTM(
        t.input_size, HIDDEN, batch_first=True, init="chrono", t_max=t.length
    ),
    "GRU": lambda t: GRU(t.input_size, HIDDEN, batch_first=True),
    "LayerNormGRU": lambda t: LayerNormGRU(t.input_size, HIDDEN, batch_first=True),
    "SkipGRU": lambda t: SkipGRU(t.input_size, HIDDEN, batch_first=True),
    "DilatedRNN": lambda t: DilatedRNN(t.input_size, HIDDEN, 5, batch_first=True, cell="rnn"),
    "TemporalSkipRNN": lambda t: TemporalSkipRNN(t.input_size, HIDDEN, batch_first=True, skip=10),
    "TemporalAttention": lambda t: (
        nn.RNN(t.input_size, HIDDEN, batch_first=True),
        TemporalAttention(HIDDEN, batch_first=True),
    ),
}


class OrderNamer(LightningModule):
    """A recurrent module whose last state, or all pooled by attention, names the class.

    Attributes:
        losses: Of each step, without the budget of a Skip RNN.
    """

    def __init__(self, task: SequenceTask, swap: Swap) -> None:
        super().__init__()
        made = swap(task)
        rnn, pool = made if isinstance(made, tuple) else (made, None)
        self.rnn: nn.Module = rnn
        self.pool: nn.Module | None = pool
        self.head = nn.Linear(HIDDEN, task.output_size)
        self.task = task
        self.losses: list[Tensor] = []

    @override
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.rnn, SkipGRU):
            states, _, gates = self.rnn(inputs, return_gates=True)
        else:
            (states, _), gates = self.rnn(inputs), None
        context = states[:, -1] if self.pool is None else self.pool(states)[0]
        return self.head(context), gates

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        outputs, gates = self(inputs)
        loss = self.task.loss(outputs, targets)
        self.losses.append(loss.detach())
        if gates is None:
            return loss
        return loss + skip_budget_loss(gates, COST_OF_UPDATE, batch_first=True)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        outputs, gates = self(inputs)
        self.log("test_accuracy", self.task.score(outputs, targets))
        if gates is not None:
            self.log("update_share", update_share(gates, batch_first=True))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), LEARNING_RATE)


@dataclass(frozen=True)
class Moment:
    """How the gradient travels at one step of training.

    Attributes:
        readings: Of every layer that could be read.
    """

    readings: Sequence[TimeReading]

    @property
    def slowest(self) -> TimeReading:
        """The layer in which it is lost slowest: the most dilated one."""
        return min(self.readings, key=lambda reading: -reading.half_life)

    @property
    def half_life(self) -> float:
        return self.slowest.half_life

    @property
    def horizon(self) -> float:
        return self.slowest.horizon

    @property
    def curve(self) -> list[float]:
        """Norm relative to that of the last timestep, by steps back, of the layer with the input.

        Whatever way the gradient takes, through time or around it, it arrives there.
        """
        profile = self.readings[0].profile
        return [norm / profile[-1] for norm in reversed(profile)]

    @property
    def first(self) -> float:
        """What the first timestep receives, times the last."""
        return self.curve[-1]

    @property
    def reach(self) -> int:
        """Timesteps, counted back from the last, from which on less than 1/1000 is left."""
        curve = self.curve
        return max((lag for lag, norm in enumerate(curve) if norm >= 1 / HORIZON_FACTOR)) + 1

    @property
    def ends(self) -> bool:
        """Whether it does not reach the first timestep."""
        return self.reach < len(self.curve)


@dataclass(frozen=True)
class Net:
    """One training.

    Attributes:
        name: Key of ``SWAPS``.
        code: The module as it prints itself.
        losses: Of each step.
        accuracy: On sequences of its own.
        updates: Share of timesteps at which a Skip RNN updates its state; NaN for others.
        readings: How the gradient traveled through time, each exact, oldest first.
        found: Whether the guard said that it vanishes through time.
        report: What the guard said.
        seconds: Of training.
    """

    name: str
    code: str
    losses: list[float]
    accuracy: float
    updates: float
    readings: list[TimeReading]
    found: bool
    report: str
    seconds: float

    @property
    def loss(self) -> float:
        """Mean over the last twentieth of training."""
        last = self.losses[-max(1, len(self.losses) // 20) :]
        return sum(last) / len(last)

    @property
    def start(self) -> Moment:
        """Before the first step."""
        return Moment([r for r in self.readings if r.step == self.readings[0].step])

    @property
    def end(self) -> Moment:
        """At the last measurement."""
        return Moment([r for r in self.readings if r.step == self.readings[-1].step])

    def both(self, text: Callable[[Moment], str]) -> str:
        """Before and after."""
        return f"{text(self.start)} → {text(self.end)}"
