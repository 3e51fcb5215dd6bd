"""Which families thresholds may be tuned on, and which are there to judge them.

Drawn up with the programs and before any threshold was tuned. A family is held out whole. Both
sides share the digits, the sum of the last inputs and kinds of layers; what differs for each
pathology is the mistake and the network that it is made in.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.detection.records import Program

DEVELOPMENT = frozenset(
    {
        "recurrent_adding",
        "recurrent_explosion",
        "deep_sigmoid",
        "init_explosion",
        "learning_rate",
        "late_divergence",
        "wrong_sign",
        "dead_learning_rate",
        "oscillating",
        "spike",
        "non_finite_input",
        "non_finite_backward",
        "underflow",
        "dead_bias",
        "saturated_tanh",
        "not_in_optimizer",
        "zero_learning_rate",
        "slow_layer",
        "batch_norm_mode",
    }
)
HELD_OUT = frozenset(
    {
        "recurrent_adding_200",
        "recurrent_order",
        "recurrent_explosion_relu",
        "deep_tanh",
        "deep_cnn",
        "init_explosion_cnn",
        "learning_rate_adam",
        "late_corruption",
        "negated_loss",
        "shuffled_labels",
        "unrelated_target",
        "oscillating_recurrent",
        "spike_recurrent",
        "non_finite_label",
        "non_finite_forward",
        "underflow_recurrent",
        "dead_cnn",
        "saturated_sigmoid",
        "detached",
        "without_grad",
        "fast_layer",
    }
)


def side(program: Program) -> str:
    """``"development"`` or ``"held_out"``.

    Raises:
        ValueError: If its family is on neither side.
    """
    if program.family in DEVELOPMENT:
        return "development"
    if program.family in HELD_OUT:
        return "held_out"
    raise ValueError(f"family must be on one side of the split, got {program.family!r}")


def development(programs: Iterable[Program]) -> tuple[Program, ...]:
    """Those that thresholds may be tuned on."""
    return tuple(program for program in programs if side(program) == "development")


def held_out(programs: Iterable[Program]) -> tuple[Program, ...]:
    """Those that nobody looks at before the thresholds are frozen."""
    return tuple(program for program in programs if side(program) == "held_out")
