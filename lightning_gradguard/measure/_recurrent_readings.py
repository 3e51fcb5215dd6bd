"""Readings of a fused recurrent module from what its calls have left behind.

Shape suffixes: ``T`` time, ``B`` batch (of all calls), ``K`` layers times directions, ``S``
boundaries between timesteps.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gradguard.measure._call_shape import CallShape
from lightning_gradguard.measure._capture import RecurrentModule
from lightning_gradguard.measure._drafts import (
    SEVERAL_ENTRIES,
    Draft,
    decay_numbers,
    doubts,
    entry_shares,
    reached,
    stacked,
)
from lightning_gradguard.measure._recurrent_calls import RecurrentCall, RecurrentWatch
from lightning_gradguard.measure._recurrent_kinds import has_biases, recurrent_kind
from lightning_gradguard.measure._taps import feature_norms
from lightning_gradguard.measure._traced_calls import TracedCall
from lightning_gradguard.measure.adjoint import (
    RecurrentAdjoint,
    ReplayError,
    recurrent_adjoint,
)
from lightning_gradguard.measure.decay import (
    bin_profile,
    float_floor,
    lag_decay,
    recency,
    transport_decay,
)
from lightning_gradguard.readings import TimeReading

_ONE_STEP = "it was called with sequences of one timestep, through which nothing travels"
_STEP_BY_STEP = "it was called one timestep at a time; the way from call to call is not measured"
_TOO_DILATED = (
    "its sequences are shorter than two of its steps of {stride} timesteps, too few for a rate"
)
_NO_INPUT_GRADIENT = "the backward pass did not compute the gradient of its input"


def recurrent_drafts(watch: RecurrentWatch) -> list[Draft]:
    """Readings of each layer and direction if they were captured, or else of the whole module."""
    calls = sorted(watch.calls, key=lambda call: call.number)
    rnn = watch.module
    reading = TimeReading(watch.name, "", "input", recurrent_kind(rnn), bias=has_biases(rnn))
    if not calls:
        stride = _stride(rnn)
        note = _single_steps_in_words(watch.single_steps, stride)
        return [Draft(replace(reading, timesteps=stride, note=note))] if watch.single_steps else []
    if not any(call.exact for call in calls):
        return [_whole(reading, watch, calls)]
    adjoints, why_not = _adjoints(rnn, calls)
    if why_not:
        why_not = f"not measured exactly: {why_not}"
        return [_whole(replace(reading, note=why_not), watch, calls)]
    entry_TB = stacked([_entry(call, rnn) for call in calls])
    parts = _parts(rnn)
    if len(parts) != len(adjoints[0].hidden):  # all layers in one state
        parts = [""]
    return [
        _part(replace(reading, part=part, source="exact"), k, adjoints, entry_TB, rnn)
        for k, part in enumerate(parts)
    ]


def _single_steps_in_words(calls: int, stride: int) -> str:
    """Why calls of a single step give no rate."""
    if stride > 1:
        return _TOO_DILATED.format(stride=stride)
    return _ONE_STEP if calls == 1 else _STEP_BY_STEP


def _parts(rnn: RecurrentModule) -> list[str]:
    directions = ("", "_reverse") if rnn.bidirectional else ("",)
    return [f"l{layer}{way}" for layer in range(rnn.num_layers) for way in directions]


def _adjoints(
    rnn: RecurrentModule, calls: list[RecurrentCall]
) -> tuple[list[RecurrentAdjoint], str]:
    """The adjoint of each captured call, or why there is none."""
    adjoints = []
    for call in calls:
        if isinstance(call, TracedCall):
            if call.exact and call.adjoint is None:
                return [], call.refusal
            adjoints += [] if call.adjoint is None else [call.adjoint]
            continue
        if call.capture is None:
            continue
        why_not = call.capture.why_not()
        if why_not:
            return [], why_not
        try:
            adjoints.append(_adjoint(rnn, call))
        except (ReplayError, TypeError, ValueError) as error:
            return [], str(error)
    return adjoints, ""


def _adjoint(rnn: RecurrentModule, call: RecurrentCall) -> RecurrentAdjoint:
    capture = call.capture
    if capture is None:
        raise ValueError("call must have been captured, got one that was not")
    rows, grad, output = capture.rows, capture.grad_output, capture.output
    return recurrent_adjoint(
        rnn,
        rows.sequence(capture.input),
        capture.hx,
        grad_output=None if grad is None else rows.sequence(grad),
        grad_hn=capture.grad_states[0],
        grad_cn=capture.grad_states[1],
        output=None if output is None else rows.sequence(output),
        rng_state=capture.rng_state,
        autocast_dtype=capture.autocast_dtype,
    )


def _part(
    reading: TimeReading,
    k: int,
    adjoints: list[RecurrentAdjoint],
    entry_TB: Tensor,
    rnn: RecurrentModule,
) -> Draft:
    """One layer and direction, over all calls."""
    reverse = reading.part.endswith("_reverse")
    input_TB = stacked([adjoint.input_norms[k] for adjoint in adjoints])
    hidden_TB = stacked([feature_norms(adjoint.hidden[k]) for adjoint in adjoints])
    lengths_B = torch.cat([adjoint.lengths for adjoint in adjoints])
    followed_TB = stacked([adjoint.followed[k] for adjoint in adjoints])
    if reverse:  # in the order in which the module runs
        followed_TB = followed_TB.flip(0)
    floor = float_floor(adjoints[0].hidden.dtype, rnn.hidden_size)
    decay = transport_decay(followed_TB[1:], followed_TB[:-1], floor)
    if not reverse:
        lengths_B = reached(hidden_TB).sum(0)
    names = adjoints[0].causes[k]
    stride = _stride(rnn)
    return Draft(
        reading=_sized(reading, hidden_TB, stride),
        numbers={
            **decay_numbers(decay, stride),
            "recency": recency(input_TB, lengths_B, reverse=reverse),
            "profile": bin_profile(hidden_TB, lengths_B),
            "entry": entry_shares(entry_TB),
        },
        causes={n: torch.stack([a.causes[k][n] for a in adjoints]).mean() for n in names},
        doubts=doubts(hidden_TB),
    )


def _whole(reading: TimeReading, watch: RecurrentWatch, calls: list[RecurrentCall]) -> Draft:
    """The module as a whole, from the gradient of its input."""
    seen = [(call, call.input_norms) for call in calls if call.input_norms is not None]
    if not seen:
        longest = max(call.shape.timesteps for call in calls)
        return Draft(replace(reading, timesteps=longest, note=reading.note or _NO_INPUT_GRADIENT))
    norms_TB = stacked([call.shape.per_step(norms) for call, norms in seen])
    entry_TB = stacked([_entry(call, watch.module) for call, _ in seen])
    reached_TB = reached(norms_TB + entry_TB)
    floor = max(call.floor for call, _ in seen)
    decay, single_entry = lag_decay(norms_TB, entry_TB, floor)
    stride = _stride(watch.module)
    return Draft(
        reading=_sized(reading, norms_TB, stride),
        numbers={
            **decay_numbers(decay, stride),
            "recency": recency(norms_TB, reached_TB.sum(0)),
            "profile": bin_profile(norms_TB, reached_TB),
            "entry": entry_shares(entry_TB),
        },
        doubts={**doubts(norms_TB), SEVERAL_ENTRIES: ~single_entry},
    )


def _entry(call: RecurrentCall, rnn: RecurrentModule) -> Tensor:
    """(T, B) norm of what enters at each timestep from outside the module.

    The last states are those of a sequence's end, and of its start in a reverse direction.
    """
    shape = call.shape
    known = [] if call.entry_norms is None else [shape.per_step(call.entry_norms)]
    directions = 2 if rnn.bidirectional else 1
    ends = (shape.per_sequence(norms) for norms in call.end_norms if norms is not None)
    known += [_at_ends(shape, ends_KB, directions) for ends_KB in ends]
    if not known and call.input_norms is not None:  # a subclass that returns something else
        known.append(torch.zeros_like(shape.per_step(call.input_norms)))
    return functools.reduce(torch.hypot, known)


def _at_ends(shape: CallShape, ends_KB: Tensor, directions: int) -> Tensor:
    """(T, B) with the norm over the layers at the end at which each direction arrives."""
    ends_TB = ends_KB.new_zeros((shape.timesteps, ends_KB.shape[1]))
    last_B = torch.full((ends_KB.shape[1],), shape.timesteps - 1, device=ends_KB.device)
    if shape.lengths is not None:
        last_B = shape.lengths.to(ends_KB.device, non_blocking=True) - 1
    for direction in range(directions):
        norm_B = torch.linalg.vector_norm(ends_KB[direction::directions], dim=0)
        at_B = last_B if direction == 0 else torch.zeros_like(last_B)
        here_TB = torch.zeros_like(ends_TB).scatter_(0, at_B.unsqueeze(0), norm_B.unsqueeze(0))
        ends_TB = torch.hypot(ends_TB, here_TB)
    return ends_TB


def _stride(rnn: RecurrentModule) -> int:
    """Timesteps of the sequence in one step of the module: more than 1 in a dilated layer."""
    return int(getattr(rnn, "timesteps_per_step", 1))


def _sized(reading: TimeReading, norms_TB: Tensor, stride: int) -> TimeReading:
    return replace(reading, timesteps=norms_TB.shape[0] * stride, sequences=norms_TB.shape[1])
