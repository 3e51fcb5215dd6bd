"""Why a module does not train, as far as one inspection tells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from itertools import takewhile
from statistics import median

from lightning_gradguard.diagnose.findings import Severity
from lightning_gradguard.readings import ParameterReading


class Reason(Enum):
    """Why a module does not train; the first that applies counts."""

    NO_OPTIMIZER = "no_optimizer"
    NO_GRAD = "no_grad"
    CUT_OFF = "cut_off"
    LR_ZERO = "lr_zero"
    UNCHANGED = "unchanged"
    ZERO_GRADIENT = "zero_gradient"
    NEVER_RAN = "never_ran"
    SPARE = "spare"
    STILL = "still"
    FROZEN = "frozen"


# At most INFO: each has many a harmless explanation.
HARMLESS = frozenset({Reason.NEVER_RAN, Reason.SPARE, Reason.STILL, Reason.FROZEN})
# Read off the model and its optimizer; no loss is needed to see that it does not train.
FACTS = frozenset(
    {Reason.NO_OPTIMIZER, Reason.NO_GRAD, Reason.CUT_OFF, Reason.LR_ZERO, Reason.UNCHANGED}
)

# So are these, but an output that the loss does not use and a teacher look the same: they are
# serious where nothing before them is trained either, or beside a bad loss.
AMBIGUOUS = frozenset({Reason.NO_GRAD, Reason.CUT_OFF})

# What is so and what follows, each for "`encoder` ..." and "`encoder` and 5 more modules ...".
WORDS: Mapping[Reason, tuple[str, str, str]] = {
    Reason.NO_OPTIMIZER: ("gets a gradient but is", "get a gradient but are", "in no optimizer"),
    Reason.NO_GRAD: ("ran", "ran", "only with gradients turned off"),
    Reason.CUT_OFF: ("runs but gets", "run but get", "no gradient at all"),
    Reason.LR_ZERO: ("has a gradient but", "have a gradient but", "a learning rate of exactly 0"),
    Reason.UNCHANGED: ("has a gradient but", "have a gradient but", "updates of exactly 0"),
    Reason.ZERO_GRADIENT: ("has", "have", "a gradient of exactly zero"),
    Reason.NEVER_RAN: ("never ran", "never ran", "as far as can be seen, and got no gradient"),
    Reason.SPARE: ("has", "have", "parameters that get no gradient beside others that do"),
    Reason.STILL: ("has", "have", "biases or scales too coarse for their updates"),
    Reason.FROZEN: ("is", "are", "frozen by requires_grad=False"),
}
FOLLOWS: Mapping[Reason, str] = {
    Reason.NO_OPTIMIZER: "so no step updates the parameters",
    Reason.NO_GRAD: "so no step trains the parameters",
    Reason.CUT_OFF: "so the loss does not use what comes out, or something cuts the way back",
    Reason.LR_ZERO: "so the parameters stay as they were initialized",
    Reason.UNCHANGED: "so all of them are lost in rounding",
    Reason.NEVER_RAN: "which is harmless if it is not meant to",
    Reason.SPARE: "which is harmless if the model does not use them",
    Reason.STILL: "which is harmless if the weights move",
    Reason.FROZEN: "which is harmless as it was declared",
}


def severity_of(reason: Reason, *, harmful: bool, from_the_start: bool) -> Severity:
    """Returns how bad it is that a module does not train for this reason.

    Args:
        reason: The reason.
        harmful: Whether the loss has been bad all the while.
        from_the_start: Whether the model is untrained from its first module on.
    """
    if reason in AMBIGUOUS:
        serious = harmful or from_the_start
    else:
        serious = reason in FACTS or (reason is Reason.ZERO_GRADIENT and harmful)
    return Severity.WARNING if serious else Severity.INFO


class Surroundings:
    """What the whole model tells about each of its modules.

    Args:
        parameters: All of one inspection.
        touched_share: See `Thresholds.touched_share`.
        depth_factor: See `Thresholds.depth_factor`.
    """

    def __init__(
        self, parameters: Sequence[ParameterReading], touched_share: float, depth_factor: float
    ) -> None:
        self._touched_share = touched_share
        self.modules: dict[str, list[ParameterReading]] = {}
        for reading in parameters:
            self.modules.setdefault(reading.module, []).append(reading)
        trained = [r for r in parameters if r.requires_grad and r.in_optimizer]
        self._all_at_rest = all(r.lr == 0.0 for r in trained)
        self._some_gradient = any(r.grad_norm > 0.0 for r in trained)
        relative = [_relative(r) for r in trained if r.grad_norm > 0.0]
        self._least_gradient = median(relative) / depth_factor if relative else 0.0
        self._containers = {
            ".".join(parts[:depth])
            for parts in (path.split(".") for path in self.modules if path)
            for depth in range(len(parts))
        }

    def reason(self, module: str, had_gradient: bool) -> tuple[Reason | None, bool]:
        """Returns why a module does not train, and whether this inspection knows that.

        Args:
            module: Path of the module.
            had_gradient: Whether any of its parameters ever had a gradient.
        """
        readings = self.modules[module]
        own = [r for r in readings if r.requires_grad]
        if not own:
            return Reason.FROZEN, True
        if any(r.grad_norm >= 0.0 and not r.in_optimizer for r in own):
            return Reason.NO_OPTIMIZER, True
        without = [r for r in own if math.isnan(r.grad_norm)]
        if len(without) == len(own):
            return self._without_gradient(module, own, had_gradient)
        reason = self._with_gradient([r for r in own if r.grad_norm >= 0.0])
        if reason is None and any(r.in_optimizer for r in without):
            return Reason.SPARE, True
        return reason, True

    def starts_untrained(self) -> bool:
        """Whether the first module that takes part, in order, is one that no gradient reaches."""
        for module, readings in self.modules.items():
            own = [r for r in readings if r.requires_grad and r.in_optimizer]
            if any(r.used or r.used_without_grad or r.grad_norm >= 0.0 for r in own):
                return self.reason(module, had_gradient=False)[0] in AMBIGUOUS
        return False

    def _without_gradient(
        self, module: str, own: Sequence[ParameterReading], had_gradient: bool
    ) -> tuple[Reason | None, bool]:
        if not any(r.in_optimizer for r in own):
            return None, True  # left out by intent: a teacher, a target network
        if all(_is_elsewhere(r, had_gradient) for r in own):
            return None, False  # another optimizer's turn
        if any(r.used for r in own):
            # A parameter of a module that has others inside may be one that this run does not use.
            spare = module in self._containers
            return (Reason.SPARE if spare else Reason.CUT_OFF), True
        if any(r.used_without_grad for r in own):
            return Reason.NO_GRAD, True
        return Reason.NEVER_RAN, True

    def _with_gradient(self, own: Sequence[ParameterReading]) -> Reason | None:
        if all(r.grad_norm == 0.0 for r in own):
            return Reason.ZERO_GRADIENT if self._some_gradient else None
        if self._all_at_rest or not all(self._is_still(r) for r in own if r.grad_norm > 0.0):
            return None
        moving = [r for r in own if r.grad_norm > 0.0]
        if all(r.lr == 0.0 for r in moving):
            return Reason.LR_ZERO
        return Reason.UNCHANGED if any(r.dims >= 2 for r in moving) else Reason.STILL

    def _is_still(self, reading: ParameterReading) -> bool:
        if reading.update_ratio != 0.0:
            return False
        touched = 1.0 - reading.zero_share >= self._touched_share
        # Updates that are lost because the gradient has vanished are not lost to the precision.
        vanished = _relative(reading) < self._least_gradient
        return reading.lr == 0.0 or (touched and not vanished)


def _relative(reading: ParameterReading) -> float:
    return reading.grad_norm / reading.weight_norm if reading.weight_norm > 0.0 else math.inf


def _is_elsewhere(reading: ParameterReading, had_gradient: bool) -> bool:
    """Whether a parameter without gradient may only wait for the step of its own optimizer."""
    untold = reading.used is None and math.isnan(reading.lr)
    return math.isnan(reading.update_ratio) and (had_gradient or untold)


def common_path(modules: Sequence[str]) -> str:
    """Returns the path that all modules share, `"model"` if they share none.

    Example:
        >>> common_path(["encoder.0", "encoder.1"]), common_path(["encoder", "head"])
        ('encoder', 'model')
    """
    columns = zip(*(path.split(".") for path in modules), strict=False)
    shared = takewhile(lambda column: len(set(column)) == 1, columns)
    return ".".join(column[0] for column in shared) or "model"
