"""Small recurrent modules and what autograd says of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_gradguard.measure.timesteps import TimestepProbe
from lightning_gradguard.readings import TimeReading

KINDS: dict[str, Callable[..., nn.Module]] = {
    "rnn": nn.RNN,
    "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}
T, B, I, H = 9, 4, 3, 5  # noqa: E741 - input


def root_mean_square(norms_TB: Tensor) -> list[float]:
    return norms_TB.double().square().mean(1).sqrt().tolist()


def input_gradient(rnn: nn.Module, x: Tensor, loss: Callable[[Any], Tensor], **call: Any) -> Tensor:
    """dL/dx as autograd gives it, of a copy of the module."""
    x = x.detach().clone().requires_grad_()
    loss(copy.deepcopy(rnn)(x, **call)).backward()
    return x.grad


def cheap(model: nn.Module, loss: Callable[[], Tensor], **options: Any) -> list[TimeReading]:
    with TimestepProbe(model, **options) as probe:
        probe.exact = False
        loss().backward()
        return probe.measure()
