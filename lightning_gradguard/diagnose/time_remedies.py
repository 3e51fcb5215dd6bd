"""What to try against a gradient that vanishes or explodes through time, by kind of module."""

from __future__ import annotations

import math
from keyword import iskeyword

from lightning_gradguard.diagnose.findings import Remedy
from lightning_gradguard.readings import TimeReading

# Gates whose recurrent weights torch keeps in one matrix, one block of rows each.
_GATES = {"lstm": 4, "gru": 3}
_MEASURED = "docs/remedies.md#"

# A reading does not know the optimizer: its line is made for it where the model is known.
SLOWER = Remedy(
    "Lower the learning rate, because large updates are what grows recurrent weights.",
    'for group in optimizer.param_groups: group["lr"] *= 0.1',
)


def vanishing_remedies(reading: TimeReading) -> tuple[Remedy, ...]:
    """Returns the remedies for a gradient that vanishes, best first, with the module's own path."""
    if reading.kind == "lstm":
        return (_chrono_lstm(reading), _attention(reading), _shorter(reading))
    if reading.kind == "gru":
        return (_chrono_gru(reading), _attention(reading), _shorter(reading))
    if reading.kind == "tanh":
        return (_orthogonal(reading), _gated(reading), _shorter(reading))
    if reading.kind == "relu":
        return (_gated(reading), _identity(reading), _shorter(reading))
    return (_attention(reading), _shorter(reading))


def explosion_remedies(reading: TimeReading) -> tuple[Remedy, ...]:
    """Returns the remedies for a gradient that explodes, best first."""
    clip = Remedy(
        "Let the guard clip the gradient and cap the update.",
        "trainer = Trainer(callbacks=[GradGuard()])",
        _MEASURED + "clipping-and-capping",
    )
    if reading.kind == "other":
        return (clip, SLOWER, _shorter(reading))
    return (clip, _orthogonal(reading), SLOWER)


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
    """Exact readings of a fused module name their layer, so one that does not is of a cell."""
    return reading.source == "exact" and not reading.part


def _parameter(reading: TimeReading, name: str) -> str:
    suffix = "" if _is_cell(reading) else f"_{reading.part or 'l0'}"
    return f"{module_code(reading.module)}.{name}{suffix}"


def _chrono_lstm(reading: TimeReading) -> Remedy:
    bias, most = _parameter(reading, "bias_hh"), reading.timesteps - 1
    return Remedy(
        "Before training, set the biases so that the forget gates keep the state for up to the "
        "whole sequence (chrono initialization).",
        f"H, b = {module_code(reading.module)}.hidden_size, {bias}.data; "
        f"b[:H] = -b[H : 2 * H].uniform_(1, {most}).log_()",
        _MEASURED + "chrono-initialization-of-an-lstm",
    )


def _chrono_gru(reading: TimeReading) -> Remedy:
    bias, most = _parameter(reading, "bias_hh"), reading.timesteps - 1
    # torch's update gate z keeps the old state: h = (1 - z) * n + z * h.
    return Remedy(
        "Before training, raise the biases of the update gates, which keep the state, for up to "
        "the whole sequence (chrono initialization).",
        f"H = {module_code(reading.module)}.hidden_size; "
        f"{bias}.data[H : 2 * H].uniform_(1, {most}).log_()",
        _MEASURED + "chrono-initialization-of-a-gru",
    )


def _gated(reading: TimeReading) -> Remedy:
    if _is_cell(reading):
        new = "torch.nn.GRUCell(rnn.input_size, rnn.hidden_size, rnn.bias)"
    else:
        new = (
            "torch.nn.GRU(rnn.input_size, rnn.hidden_size, rnn.num_layers, rnn.bias, "
            "rnn.batch_first, rnn.dropout, rnn.bidirectional)"
        )
    code = module_code(reading.module)
    parent, _, name = reading.module.rpartition(".")
    if code.startswith("model.get_submodule"):
        put = f"setattr({module_code(parent)}, {name!r}, {new})"
    else:
        put = f"{code} = {new}"
    # Without it a GRU forgets at first about as fast as what it replaces.
    chrono = (
        f"H = rnn.hidden_size; [p.data[H : 2 * H].uniform_(1, {reading.timesteps - 1}).log_() "
        f"for n, p in {code}.named_parameters() if n.startswith('bias_hh')]"
    )
    return Remedy(
        "Use a gated module with chrono initialization, whose state keeps the gradient over many "
        "steps.",
        f"rnn = {code}; {put}; {chrono}",
        _MEASURED + "gated-module",
    )


def _orthogonal(reading: TimeReading) -> Remedy:
    weight = _parameter(reading, "weight_hh")
    gates = _GATES.get(reading.kind)
    if gates:
        code = f"[torch.nn.init.orthogonal_(w) for w in {weight}.data.chunk({gates})]"
    else:
        code = f"torch.nn.init.orthogonal_({weight})"
    return Remedy(
        "Start the recurrent weights orthogonal, so that they keep the size of the gradient.",
        code,
        _MEASURED + "orthogonal-recurrence",
    )


def _identity(reading: TimeReading) -> Remedy:
    return Remedy(
        "Start the recurrent weights as the identity, so that ReLU units copy their state.",
        f"torch.nn.init.eye_({_parameter(reading, 'weight_hh')})",
        _MEASURED + "identity-recurrence",
    )


def _attention(reading: TimeReading) -> Remedy:
    known = reading.kind != "other"
    width = f"{module_code(reading.module)}.hidden_size" if known else "output.shape[-1]"
    return Remedy(
        "Read the result out by attention over all steps, a path back whose length does not grow "
        "with the sequence.",
        f"attention = torch.nn.MultiheadAttention({width}, num_heads=1, batch_first=True)",
        _MEASURED + "attention-readout",
    )


def _shorter(reading: TimeReading) -> Remedy:
    keep = max(2, math.ceil(min(reading.horizon, reading.timesteps)))
    return Remedy(
        "Train first on sequences no longer than the horizon, and lengthen them as the loss falls.",
        f"sequence = sequence[-{keep}:]",
    )
