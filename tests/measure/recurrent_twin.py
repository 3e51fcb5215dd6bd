"""A measurement of gradients through time beside its reference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_gradguard.measure.adjoint import RecurrentAdjoint, recurrent_adjoint
from tests.measure.recurrent_cases import Built
from tests.measure.recurrent_reference import Reference, recurrent_reference

TENSORS = ("hidden", "cell", "input", "arriving", "transported", "input_norms")


def largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def assert_near(
    ours: Tensor, theirs: Tensor, tolerance: float, what: str, scale: float | None = None
) -> None:
    """Relative to the largest entry, or to ``scale``."""
    scale = largest(theirs) if scale is None else scale
    assert ours.shape == theirs.shape, what
    error = largest(ours.double() - theirs)
    assert error <= tolerance * scale, f"{what}: off by {error} of {scale}"


def assert_twin(ours: RecurrentAdjoint, theirs: Reference, tolerance: float) -> None:
    # The input's gradient may be a small rest of what the directions send, which cancels out.
    scales = {"input": max(largest(theirs.input), largest(theirs.input_norms))}
    for name in TENSORS:
        value, expected = getattr(ours, name), getattr(theirs, name)
        assert (value is None) == (expected is None), name
        if value is not None:
            assert_near(value, expected, tolerance, name, scales.get(name))
    # What arrives may be a small rest of large summands, and then its quotient is not as precise.
    arriving = theirs.arriving.square().sum(-1).sqrt()
    precise = arriving > 1e-2 * largest(arriving)
    assert ours.gain.shape == theirs.gain.shape
    if precise.any():
        assert_near(ours.gain[precise], theirs.gain[precise], tolerance, "gain")


def adjoint_of(built: Built, **options: Any) -> RecurrentAdjoint:
    return recurrent_adjoint(built.rnn, built.input, built.hx, **built.grads, **options)


def reference_of(built: Built, **options: Any) -> Reference:
    return recurrent_reference(built.rnn, built.input, built.hx, **built.grads, **options)
