"""What to try against a gradient that vanishes or explodes through time, by kind of module."""

from __future__ import annotations

import math
from keyword import iskeyword

from lightning_gradguard.diagnose.findings import Remedy
from lightning_gradguard.readings import TimeReading

_GATED = ("lstm", "gru")
_RECTIFIED = ("relu", "leaky_relu", "prelu")
_MEASURED = "docs/remedies.md#"
# Share of the sequence that the longest dilation spans at least, so that the way back is a few
# steps long; and of them at most twice as much, so that there is more than one.
_DILATION_SHARE = 0.25

_KEPT = {
    "lstm": "Before training, set the biases so that the forget gates keep the state for up to the "
    "whole sequence (chrono initialization).",
    "gru": "Before training, raise the biases of the update gates, which keep the state, for up to "
    "the whole sequence (chrono initialization).",
}

# A reading does not know the optimizer: its line is made for it where the model is known.
SLOWER = Remedy(
    "Lower the learning rate, because large updates are what grows recurrent weights.",
    'for group in optimizer.param_groups: group["lr"] *= 0.1',
)
# Not for a run that is guarded already.
GUARD = Remedy(
    "Let the guard clip the gradient and cap the update.",
    "trainer = Trainer(callbacks=[GradGuard()])",
    _MEASURED + "clipping-and-capping",
)


def vanishing_remedies(reading: TimeReading) -> tuple[Remedy, ...]:
    """Returns the remedies for a gradient that vanishes, best first, with the module's own path."""
    if reading.kind not in (*_GATED, "tanh", *_RECTIFIED):
        return (_attention(reading), _shorter(reading))
    if reading.kind in _GATED and not reading.bias:
        # Nothing to start the gates from, and a module with biases is another one.
        others = (_attention(reading), _shorter(reading))
        return (_dilated(reading), *others) if _is_stack(reading) else others
    if _is_stack(reading):
        return (_dilated(reading), _kept(reading), _attention(reading))
    if reading.kind in _GATED:
        return (_kept(reading), _attention(reading), _shorter(reading))
    if _is_cell(reading):
        return (*_plain(reading, _gated(reading)), _shorter(reading))
    return _plain(reading, _dilated(reading), _gated(reading))


def _plain(reading: TimeReading, *others: Remedy) -> tuple[Remedy, ...]:
    """With a start of the recurrent weights, which for ReLU helped less than what replaces it."""
    if reading.kind == "tanh":
        return (_orthogonal(reading), *others)
    return (*others, _identity(reading))


def explosion_remedies(reading: TimeReading) -> tuple[Remedy, ...]:
    """Returns the remedies for a gradient that explodes, best first."""
    if reading.kind == "other":
        return (GUARD, SLOWER, _shorter(reading))
    return (GUARD, _orthogonal(reading), SLOWER)


def module_code(path: str) -> str:
    """Returns the expression for a module of `model`, whatever its path is made of.

    Example:
        >>> module_code("encoder.rnn"), module_code("layers.0"), module_code("")
        ('model.encoder.rnn', "model.get_submodule('layers.0')", 'model')
    """
    if not path:
        return "model"
    if all(name.isidentifier() and not iskeyword(name) for name in path.split(".")):
        return f"model.{path}"
    return f"model.get_submodule({path!r})"


def _is_cell(reading: TimeReading) -> bool:
    """Exact readings of a module name its layer, but where several share one skip gate.

    A line that is good for a cell is good for such a module too.
    """
    return reading.source == "exact" and not reading.part


def _is_stack(reading: TimeReading) -> bool:
    """Whether the reading is of all layers of a dilated stack."""
    return reading.part.startswith("layers")


def _parameter(reading: TimeReading, name: str) -> str:
    suffix = "" if _is_cell(reading) else f"_{reading.part or 'l0'}"
    return f"{module_code(reading.module)}.{name}{suffix}"


def _replaced(reading: TimeReading, new: str) -> str:
    """A line that puts `new`, made of the module `rnn`, in its place, and on its device."""
    code = module_code(reading.module)
    new = f"{new}.to(next(rnn.parameters()))"
    parent, _, name = reading.module.rpartition(".")
    if code.startswith("model.get_submodule"):
        return f"rnn = {code}; setattr({module_code(parent)}, {name!r}, {new})"
    return f"rnn = {code}; {code} = {new}"


def _kept(reading: TimeReading) -> Remedy:
    """A start from which the state is kept, in every layer and direction of the module."""
    if _is_stack(reading):
        return _kept_in_stack(reading) if reading.kind in _GATED else _orthogonal(reading)
    code, most = module_code(reading.module), reading.timesteps
    if reading.kind == "lstm":
        return Remedy(
            _KEPT["lstm"],
            f"from lightning_gradguard.nn.init import chrono_; chrono_({code}, t_max={most})",
            _MEASURED + "chrono-initialization-of-an-lstm",
        )
    # Not chrono_, which sets the other biases to zero: measured, a GRU learned more with them.
    return Remedy(
        _KEPT["gru"],
        f"H = {code}.hidden_size; {_chrono_gru(reading)}",
        _MEASURED + "chrono-initialization-of-a-gru",
    )


def _chrono_gru(reading: TimeReading) -> str:
    """A line for a GRU with H units in the module's place."""
    # torch's update gate z keeps the old state: h = (1 - z) * n + z * h.
    return (
        f"[p.data[H : 2 * H].uniform_(1, {reading.timesteps - 1}).log_() for n, p in "
        f"{module_code(reading.module)}.named_parameters() if n.startswith('bias_hh')]"
    )


def _kept_in_stack(reading: TimeReading) -> Remedy:
    """Each layer counts its own steps."""
    layers = f"{module_code(reading.module)}.{reading.part}"
    return Remedy(
        _KEPT[reading.kind],
        "from lightning_gradguard.nn.init import chrono_; "
        f"[chrono_(m, t_max=max(3, {reading.timesteps} / m.timesteps_per_step)) for m in {layers}]",
    )


def _dilated(reading: TimeReading) -> Remedy:
    """Of tanh units, as measured: gated ones forget as fast at first, if with longer steps."""
    layers = 1 + max(1, math.ceil(math.log2(_DILATION_SHARE * reading.timesteps)))
    cell = "rnn.cell" if _is_stack(reading) else "'rnn'"
    new = (
        f"DilatedRNN(rnn.input_size, rnn.hidden_size, {layers}, rnn.bias, rnn.batch_first, "
        f"rnn.dropout, rnn.bidirectional, cell={cell})"
    )
    line = f"from lightning_gradguard.nn import DilatedRNN; {_replaced(reading, new)}"
    if _is_stack(reading):
        return Remedy(
            "Before the optimizer is made, use more dilated layers, each of which takes steps "
            "twice as long as the one below.",
            line,
        )
    return Remedy(
        "Before the optimizer is made, use dilated layers, which step over 1, 2, 4 and more "
        "timesteps, so that the way back is that much shorter.",
        line,
        _MEASURED + "dilated-layers",
    )


def _gated(reading: TimeReading) -> Remedy:
    # Its gates are started by biases, whether or not there were any before.
    bias = "rnn.bias" if reading.bias else "True"
    if _is_cell(reading):
        new = f"torch.nn.GRUCell(rnn.input_size, rnn.hidden_size, {bias})"
    else:
        new = (
            f"torch.nn.GRU(rnn.input_size, rnn.hidden_size, rnn.num_layers, {bias}, "
            "rnn.batch_first, rnn.dropout, rnn.bidirectional)"
        )
    return Remedy(
        "Before the optimizer is made, use a gated module with chrono initialization, whose state "
        "keeps the gradient over many steps.",
        # Without a start of its own a GRU forgets at first about as fast as what it replaces.
        f"{_replaced(reading, new)}; H = rnn.hidden_size; {_chrono_gru(reading)}",
        _MEASURED + "gated-module",
    )


def _orthogonal(reading: TimeReading) -> Remedy:
    whole = (
        "from lightning_gradguard.nn.init import orthogonal_recurrent_; "
        f"orthogonal_recurrent_({module_code(reading.module)})"
    )
    if reading.kind in _GATED:  # the gates, or a norm, scale what the weights keep
        return Remedy(
            "Start the recurrent weights orthogonal, so that no direction of the state grows "
            "faster through them than the others.",
            whole,
        )
    sentence = "Start the recurrent weights orthogonal, so that they keep the size of the gradient."
    if _is_stack(reading):
        return Remedy(sentence, whole)
    line = f"torch.nn.init.orthogonal_({_parameter(reading, 'weight_hh')})"
    return Remedy(sentence, line, _MEASURED + "orthogonal-recurrence")


def _identity(reading: TimeReading) -> Remedy:
    return Remedy(
        "Start the recurrent weights as the identity, so that ReLU units copy their state.",
        f"torch.nn.init.eye_({_parameter(reading, 'weight_hh')})",
        _MEASURED + "identity-recurrence",
    )


def _attention(reading: TimeReading) -> Remedy:
    code = module_code(reading.module)
    if reading.kind == "other":
        new = "TemporalAttention(output.shape[-1], batch_first=True)"
    elif _is_cell(reading):
        new = f"TemporalAttention({code}.hidden_size)"
    else:
        width = f"(1 + {code}.bidirectional) * {code}.hidden_size"
        new = f"TemporalAttention({width}, batch_first={code}.batch_first)"
    return Remedy(
        "Read the result out by attention over all steps, a path back whose length does not grow "
        "with the sequence.",
        f"from lightning_gradguard.nn import TemporalAttention; attention = {new}",
        _MEASURED + "attention-readout",
    )


def _shorter(reading: TimeReading) -> Remedy:
    keep = max(2, math.ceil(min(reading.horizon, reading.timesteps)))
    return Remedy(
        "Train first on sequences no longer than the horizon, and lengthen them as the loss falls.",
        f"sequence = sequence[-{keep}:]",
    )
