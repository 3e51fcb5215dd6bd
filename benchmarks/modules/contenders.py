"""What is compared, and with which fused module of torch.

Shape suffixes: ``T`` time, ``B`` batch, ``I`` input, ``H`` hidden.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from benchmarks.timesteps.models import CELLS, FUSED, Shape
from lightning_gradguard import nn as recurrent

Make = Callable[[Shape], nn.Module]
Target = Literal["cell", "dilated"]

DEEP = 4  # layers of what is only worth it in a stack: dilations 1, 2, 4 and 8
SKIP = 8  # timesteps of a skip
PEER = "torchrecurrent"


@dataclass(frozen=True)
class Contender:
    """A module that is measured.

    Args:
        name: In the tables.
        beside: Key of ``BASELINES``.
        make: Makes it for given sizes.
        target: Which aim it has to meet, if any.
        package: What has to be installed for it.
    """

    name: str
    beside: str
    make: Make
    target: Target | None = None
    package: str | None = None

    @property
    def installed(self) -> bool:
        """Whether it can be made here."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


class Loop(nn.Module):
    """A cell of torch, called once for each timestep."""

    def __init__(self, kind: str, shape: Shape) -> None:
        super().__init__()
        self.cell = CELLS[kind](shape.input_size, shape.hidden_size)

    @override
    def forward(self, input_TBI: Tensor) -> tuple[Tensor, Any]:
        state: Any = None
        outputs = []
        for input_BI in input_TBI.unbind(0):
            state = self.cell(input_BI, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs), state


class Pooled(nn.Module):
    """The fused GRU of torch, and attention over its states."""

    def __init__(self, shape: Shape, score: Literal["additive", "dot"]) -> None:
        super().__init__()
        self.rnn = nn.GRU(shape.input_size, shape.hidden_size)
        self.attention = recurrent.TemporalAttention(shape.hidden_size, score=score)

    @override
    def forward(self, input_TBI: Tensor) -> tuple[Tensor, Any]:
        output_TBH, _ = self.rnn(input_TBI)
        context_BH, _ = self.attention(output_TBH, need_weights=False)
        return context_BH, None


def _of(kind: Callable[..., nn.Module], **options: Any) -> Make:
    return lambda shape: kind(shape.input_size, shape.hidden_size, **options)


def _of_peer(name: str) -> Make:
    def make(shape: Shape) -> nn.Module:
        kind: type[nn.Module] = getattr(importlib.import_module(PEER), name)
        return _of(kind)(shape)

    return make


def _deep(kind: str) -> str:
    return f"{kind}, {DEEP} layers"


BASELINES: Mapping[str, Make] = {
    **{kind: _of(fused) for kind, fused in FUSED.items()},
    **{_deep(kind): _of(fused, num_layers=DEEP) for kind, fused in FUSED.items()},
}


def _by_kind(kind: str, fused: type[nn.Module]) -> list[Contender]:
    """What there is of every kind."""
    skip = _of(recurrent.TemporalSkipRNN, cell=kind, skip=SKIP)
    dilated = _of(recurrent.DilatedRNN, num_layers=DEEP, cell=kind)
    residual = _of(fused, num_layers=DEEP, residual=True)
    return [
        Contender(f"nn.{FUSED[kind].__name__} again", kind, _of(FUSED[kind])),
        Contender(fused.__name__, kind, _of(fused)),
        Contender(f"TemporalSkipRNN {kind}", kind, skip, "cell"),
        Contender(f"nn.{CELLS[kind].__name__} in a loop", kind, lambda s: Loop(kind, s)),
        Contender(f"DilatedRNN {kind}", _deep(kind), dilated, "dilated"),
        Contender(f"{fused.__name__} residual", _deep(kind), residual),
    ]


def _batch_norm(shape: Shape) -> nn.Module:
    return _of(recurrent.BatchNormLSTM, max_length=shape.timesteps)(shape)


# Of the modules of others those that have as many gates: no one else has the same equations.
CONTENDERS: tuple[Contender, ...] = (
    *_by_kind("lstm", recurrent.LSTM),
    Contender("LayerNormLSTM", "lstm", _of(recurrent.LayerNormLSTM), "cell"),
    Contender("BatchNormLSTM", "lstm", _batch_norm, "cell"),
    Contender("SkipLSTM", "lstm", _of(recurrent.SkipLSTM), "cell"),
    Contender(f"{PEER} PeepholeLSTM", "lstm", _of_peer("PeepholeLSTM"), package=PEER),
    *_by_kind("gru", recurrent.GRU),
    Contender("LayerNormGRU", "gru", _of(recurrent.LayerNormGRU), "cell"),
    Contender("SkipGRU", "gru", _of(recurrent.SkipGRU), "cell"),
    Contender("TemporalAttention additive", "gru", lambda shape: Pooled(shape, "additive")),
    Contender("TemporalAttention dot", "gru", lambda shape: Pooled(shape, "dot")),
    Contender(f"{PEER} MUT1", "gru", _of_peer("MUT1"), package=PEER),
    *_by_kind("rnn", recurrent.RNN),
    Contender("RNN leaky_relu", "rnn", _of(recurrent.RNN, nonlinearity="leaky_relu"), "cell"),
    Contender("RNN prelu", "rnn", _of(recurrent.RNN, nonlinearity="prelu"), "cell"),
    Contender(f"{PEER} FastRNN", "rnn", _of_peer("FastRNN"), package=PEER),
)
