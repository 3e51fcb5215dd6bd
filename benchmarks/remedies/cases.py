"""Each remedy beside the program that fails without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.remedies.failing import (
    HIDDEN,
    TIMESTEPS,
    dead,
    deep_relu,
    deep_sigmoid,
    exploding,
    fast_sgd,
    forgotten,
    one_fast_layer,
    oscillating,
    poisoned,
    recurrent,
    saturated,
    slow_sgd,
    underflowing,
    unscaled,
)
from benchmarks.remedies.models import (
    Attending,
)
from benchmarks.remedies.programs import Program
from lightning_gradguard.diagnose import Remedy
from lightning_gradguard.diagnose.remedies import layer_remedies as layers
from lightning_gradguard.diagnose.remedies import step_remedies as steps
from lightning_gradguard.diagnose.time_remedies import vanishing_remedies
from lightning_gradguard.readings import TimeReading


@dataclass(frozen=True)
class Case:
    """A program that fails, and a remedy.

    Attributes:
        heading: Of ``docs/remedies.md``.
        program: The program in words.
        build: Makes it.
        remedy: The remedy as the library gives it for that program.
        apply: Changes the program as the remedy says.
        steps: Optimizer steps.
    """

    heading: str
    program: str
    build: Callable[[], Program]
    remedy: Callable[[Program], Remedy]
    apply: Callable[[Program, str], None]
    steps: int = 300

    @property
    def anchor(self) -> str:
        """The heading as a link's end."""
        return self.heading.lower().replace(" ", "-")


# -- how a remedy is applied ----------------------------------------------------------------------


def on_model(program: Program, code: str) -> None:
    program.run_on_model(code)


def on_optimizer(program: Program, code: str) -> None:
    program.line = code


def on_inputs(program: Program, code: str) -> None:
    program.input_line = code


def guarded(program: Program, code: str) -> None:
    program.guarded = True


def in_bfloat16(program: Program, code: str) -> None:
    program.autocast = torch.bfloat16


def in_float32(program: Program, code: str) -> None:
    program.autocast = None


def with_scaled_loss(program: Program, code: str) -> None:
    program.scale_loss = True


def with_attention(program: Program, code: str) -> None:
    program.run_on_model(code)
    rnn = program.model.get_submodule("rnn")
    program.model = Attending(rnn, program.scope["attention"], HIDDEN)
    program.scope["model"] = program.model


def _time(kind: str, anchor: str) -> Callable[[Program], Remedy]:
    reading = TimeReading("rnn", "l0", "exact", kind, TIMESTEPS, decay_rate=-0.5)

    def remedy(program: Program) -> Remedy:
        return next(r for r in vanishing_remedies(reading) if r.evidence.endswith("#" + anchor))

    return remedy


def _given(remedy: Remedy | None) -> Remedy:
    if remedy is None:
        raise ValueError("remedy must apply to the program that it is measured on, got None")
    return remedy


_SIGMOID = "12 layers of sigmoid units, SGD 0.02"
_RELU = "16 layers of ReLU units, SGD 0.01"
_DEAD = "ReLU layer with biases of -6, SGD 0.1"
_UNDERFLOW = "float16 gradients of a loss near 1e-6, AdamW 0.001"


def _memory(kind: str, name: str) -> str:
    return f"{name} asked for the first of {TIMESTEPS} inputs, AdamW 0.003"


CASES = (
    Case(
        "ReLU with He initialization",
        _SIGMOID,
        deep_sigmoid,
        lambda p: _given(layers.relu_instead(p.facts)),
        on_model,
    ),
    Case(
        "Batch normalization",
        _SIGMOID,
        deep_sigmoid,
        lambda p: _given(layers.normalization(p.facts)),
        on_model,
    ),
    Case(
        "He initialization",
        _RELU,
        deep_relu,
        lambda p: _given(layers.he_weights(p.facts)),
        on_model,
    ),
    Case(
        "Skip connections",
        _RELU,
        deep_relu,
        lambda p: _given(layers.skip_connections(p.facts)),
        on_model,
    ),
    Case(
        "Adaptive optimizer",
        "3 layers of ReLU units, SGD 0.001",
        slow_sgd,
        lambda p: _given(steps.adaptive_optimizer(p.facts)),
        on_optimizer,
    ),
    Case(
        "Higher learning rate",
        "3 layers of ReLU units, SGD 0.001",
        slow_sgd,
        lambda p: steps.raise_rate(p.facts),
        on_optimizer,
    ),
    Case(
        "Lower learning rate",
        "3 layers of ReLU units, SGD 1.5",
        fast_sgd,
        lambda p: steps.lower_rate(p.facts),
        on_optimizer,
    ),
    Case(
        "Own learning rate",
        "a layer whose inputs are 30 times too large, SGD 0.03",
        one_fast_layer,
        lambda p: _given(steps.own_rate("head", p.facts, 0.1)),
        on_optimizer,
    ),
    Case(
        "Learning rate decay",
        "3 layers of ReLU units, batches of 8, AdamW 0.02",
        oscillating,
        lambda p: steps.decay_rate(p.facts),
        on_optimizer,
        400,
    ),
    Case(
        "Clipping and capping",
        "tanh RNN with recurrent weights of gain 3, SGD 0.1",
        exploding,
        lambda p: steps.guard_bounds(),
        guarded,
    ),
    Case(
        "Dropping bad steps",
        "one batch in 25 holds a NaN, SGD 0.1",
        poisoned,
        lambda p: steps.guard_skips(),
        guarded,
    ),
    Case(
        "Leaky ReLU",
        _DEAD,
        dead,
        lambda p: _given(layers.leaky_relu("3", p.facts)),
        on_model,
    ),
    Case(
        "Fresh layer",
        _DEAD,
        dead,
        lambda p: _given(layers.fresh_layer("3", p.facts)),
        on_model,
    ),
    Case(
        "Standardized inputs",
        "3 layers of tanh units, inputs up to 1600, SGD 0.02",
        unscaled,
        lambda p: _given(steps.standardized_inputs(p.facts)),
        on_inputs,
    ),
    Case(
        "Xavier initialization",
        "tanh layers with weights 60 times too large, SGD 0.02",
        saturated,
        lambda p: _given(layers.xavier_weights(p.facts)),
        on_model,
    ),
    Case(
        "bfloat16",
        _UNDERFLOW,
        underflowing,
        lambda p: _given(steps.bfloat16(p.facts)),
        in_bfloat16,
    ),
    Case(
        "Loss scaling",
        _UNDERFLOW,
        underflowing,
        lambda p: _given(steps.loss_scaling(p.facts)),
        with_scaled_loss,
    ),
    Case(
        "float32",
        _UNDERFLOW,
        underflowing,
        lambda p: _given(steps.float32(p.facts)),
        in_float32,
    ),
    Case(
        "Parameters for the optimizer",
        "an encoder that the optimizer was not given, SGD 0.1",
        forgotten,
        lambda p: layers.into_optimizer("encoder"),
        on_optimizer,
    ),
    Case(
        "Gated module",
        _memory("tanh", "tanh RNN"),
        partial(recurrent, "tanh"),
        _time("tanh", "gated-module"),
        on_model,
    ),
    Case(
        "Orthogonal recurrence",
        _memory("tanh", "tanh RNN"),
        partial(recurrent, "tanh"),
        _time("tanh", "orthogonal-recurrence"),
        on_model,
    ),
    Case(
        "Dilated layers",
        _memory("tanh", "tanh RNN"),
        partial(recurrent, "tanh"),
        _time("tanh", "dilated-layers"),
        on_model,
    ),
    Case(
        "Identity recurrence",
        _memory("relu", "ReLU RNN"),
        partial(recurrent, "relu"),
        _time("relu", "identity-recurrence"),
        on_model,
    ),
    Case(
        "Chrono initialization of an LSTM",
        _memory("lstm", "LSTM"),
        partial(recurrent, "lstm"),
        _time("lstm", "chrono-initialization-of-an-lstm"),
        on_model,
    ),
    Case(
        "Chrono initialization of a GRU",
        _memory("gru", "GRU"),
        partial(recurrent, "gru"),
        _time("gru", "chrono-initialization-of-a-gru"),
        on_model,
    ),
    Case(
        "Attention readout",
        _memory("lstm", "LSTM"),
        partial(recurrent, "lstm"),
        _time("lstm", "attention-readout"),
        with_attention,
    ),
)
