"""The programs that fail, each for one reason."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks.remedies.models import (
    HalfForgotten,
    LastStep,
    WithLargeHead,
    dead_net,
    deep_net,
    exploding_rnn,
    saturated_net,
)
from benchmarks.remedies.programs import MakeOptimizer, Program
from benchmarks.remedies.tasks import digits, digits_with_nan, first_input, raw_digits

HIDDEN, TIMESTEPS = 32, 60


def sgd(lr: float, momentum: float = 0.9) -> MakeOptimizer:
    return partial(torch.optim.SGD, lr=lr, momentum=momentum)


def adamw(lr: float) -> MakeOptimizer:
    return partial(torch.optim.AdamW, lr=lr)


def deep_sigmoid() -> Program:
    return Program(deep_net(nn.Sigmoid), sgd(0.02), digits())


def deep_relu() -> Program:
    return Program(deep_net(nn.ReLU, 16), sgd(0.01), digits())


def fast_sgd() -> Program:
    return Program(deep_net(nn.ReLU, 3), sgd(1.5), digits())


def slow_sgd() -> Program:
    return Program(deep_net(nn.ReLU, 3), sgd(1e-3), digits())


def dead() -> Program:
    return Program(dead_net(), sgd(0.1), digits())


def saturated() -> Program:
    return Program(saturated_net(), sgd(0.02), digits())


def unscaled() -> Program:
    return Program(deep_net(nn.Tanh, 3), sgd(0.02), raw_digits())


def recurrent(kind: str) -> Program:
    rnn: nn.Module
    if kind in ("tanh", "relu"):
        rnn = nn.RNN(4, HIDDEN, nonlinearity=kind)
    else:
        rnn = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](4, HIDDEN)
    return Program(LastStep(rnn, HIDDEN), adamw(3e-3), first_input(TIMESTEPS))


def exploding() -> Program:
    return Program(exploding_rnn(), sgd(0.1), first_input(20))


def underflowing() -> Program:
    program = Program(deep_net(nn.ReLU, 3), adamw(1e-3), digits(), autocast=torch.float16)
    program.loss_factor = 1e-6
    return program


def forgotten() -> Program:
    model = HalfForgotten()
    return Program(model, sgd(0.1), digits(), trained=model.head)


def poisoned() -> Program:
    return Program(deep_net(nn.ReLU, 3), sgd(0.1), digits_with_nan())


def one_fast_layer() -> Program:
    return Program(WithLargeHead(), sgd(0.03), digits())


def oscillating() -> Program:
    return Program(deep_net(nn.ReLU, 3), adamw(0.02), digits(batch_size=8))
