"""Recurrent modules with a head, all of one width.

Shape suffixes: ``B`` batch, ``T`` time, ``I`` input, ``H`` hidden, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from lightning_gradguard.nn import (
    GRU,
    LSTM,
    RNN,
    DilatedRNN,
    LayerNormGRU,
    LayerNormLSTM,
    SkipGRU,
    SkipLSTM,
    TemporalSkipRNN,
)
from lightning_gradguard.tasks import SequenceTask

HIDDEN = 64
Build = Callable[[int, int], nn.Module]


class Reader(nn.Module):
    """A recurrent module and a linear head on its outputs, or on the last one.

    Attributes:
        gates: Of the last forward pass, if the module skips.
    """

    def __init__(self, rnn: nn.Module, task: SequenceTask) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(HIDDEN, task.output_size)
        self.gates: Tensor | None = None
        self._every_step = task.kind == "per step"

    @property
    def skips(self) -> bool:
        """Whether the module decides at which timesteps to update its state."""
        return isinstance(self.rnn, SkipLSTM | SkipGRU)

    @override
    def forward(self, inputs_BTI: Tensor) -> Tensor:
        """Answers, (B, C) or (B, T, C)."""
        if self.skips:
            outputs_BTH, _, self.gates = self.rnn(inputs_BTI, return_gates=True)
        else:
            outputs_BTH = self.rnn(inputs_BTI)[0]
        answers: Tensor = self.head(outputs_BTH if self._every_step else outputs_BTH[:, -1])
        return answers


@dataclass(frozen=True)
class Model:
    """One recurrent module.

    Attributes:
        name: As in the tables.
        build: Makes it, batch first, from the number of inputs and the length of the sequences.
        rates: Learning rates that are tried.
        note: How it is set up, where the name does not tell.
    """

    name: str
    build: Build
    rates: tuple[float, ...]
    note: str = ""

    def make(self, task: SequenceTask) -> Reader:
        """The module with a head, from the global random numbers."""
        return Reader(self.build(task.input_size, task.length), task)


# Gates bear higher rates than none, and what may grow without bound only low ones.
_GATED, _PLAIN, _UNBOUNDED = (1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3), (1e-4, 3e-4, 1e-3)

MODELS = (
    Model("tanh RNN", lambda i, t: RNN(i, HIDDEN, batch_first=True), _PLAIN),
    Model(
        "IRNN",
        lambda i, t: RNN(i, HIDDEN, nonlinearity="relu", init="identity", batch_first=True),
        _UNBOUNDED,
        "ReLU, recurrent weights from the identity",
    ),
    Model("LSTM", lambda i, t: LSTM(i, HIDDEN, batch_first=True), _GATED, "as torch sets it up"),
    Model(
        "LSTM forget bias 1",
        lambda i, t: LSTM(i, HIDDEN, forget_bias=1.0, batch_first=True),
        _GATED,
    ),
    Model(
        "LSTM chrono",
        lambda i, t: LSTM(i, HIDDEN, init="chrono", t_max=t, batch_first=True),
        _GATED,
        "`t_max` is T",
    ),
    Model("GRU", lambda i, t: GRU(i, HIDDEN, batch_first=True), _GATED, "as torch sets it up"),
    Model("LayerNormLSTM", lambda i, t: LayerNormLSTM(i, HIDDEN, batch_first=True), _GATED),
    Model("LayerNormGRU", lambda i, t: LayerNormGRU(i, HIDDEN, batch_first=True), _GATED),
    Model("SkipLSTM", lambda i, t: SkipLSTM(i, HIDDEN, batch_first=True), _GATED),
    Model("SkipGRU", lambda i, t: SkipGRU(i, HIDDEN, batch_first=True), _GATED),
    Model(
        "DilatedRNN",
        lambda i, t: DilatedRNN(
            i, HIDDEN, t.bit_length(), cell="gru", residual=True, batch_first=True
        ),
        _GATED,
        "GRU layers with dilations 1, 2, 4, … up to the last that is at most T; residual, because "
        "without it copying was still at the baseline after 1,000 steps",
    ),
    Model(
        "TemporalSkipRNN",
        lambda i, t: TemporalSkipRNN(i, HIDDEN, skip=max(t // 10, 2), batch_first=True),
        _PLAIN,
        "tanh, with the state of T / 10 steps ago",
    ),
)


def select(names: Sequence[str]) -> list[Model]:
    """The models of these names; all for none."""
    known = {model.name: model for model in MODELS}
    return [known[name] for name in names] if names else list(MODELS)
