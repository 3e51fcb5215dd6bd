"""How large a relative update is allowed, and how that follows the progress of the loss."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from lightning_gradguard._validation import check_number, check_type

# Standard error of a median of n normal values, in units of their scale / sqrt(n).
_MEDIAN_ERROR = 1.2533
_MAD_TO_SCALE = 1.4826


@dataclass(frozen=True)
class UpdateCap:
    """Let no tensor move by more than a share of its own norm in one step.

    With ``adaptive``, the share follows the loss while most tensors would move by more than the
    widest share; the learning rate is then no ordinary one. If the loss gets worse beyond its
    noise, it is tightened. If it neither improves nor gets worse, either the updates are too
    large or the run is on a plateau; so smaller ones are tried for two windows, kept if the
    loss improves, and otherwise taken back. After each trial in vain the next one waits twice
    as long. In all other cases it is loosened: fast until it is tightened for the first time.
    The reasons for the defaults, with the trials that led to them, are in ``docs/default-
    response.md``.

    Args:
        max_ratio: No update is larger. Default 0.15: Adam and its relatives, whose steps have the
            size of their learning rate, are held to this alone as long as most tensors stay below
            it, so that ordinary rates are left as they are.
        wide_ratio: The widest share otherwise. Default 2/3 · ``max_ratio``, or ``start_ratio`` if
            that is more.
        start_ratio: The share at the start. Default 0.3 · ``wide_ratio``.
        min_ratio: The tightest share. Default ``wide_ratio`` / 30, or ``start_ratio`` if less.
        adaptive: Whether the share follows the loss; otherwise it stays at ``max_ratio``.
        window: Steps between the first looks at the loss. Default 25; as improvement slows down,
            the window grows with the run, to a sixteenth of it.
        opening: Factor on the share while it has never been tightened. Default 1.6: a healthy run
            reaches the widest share in three windows.
        tighten: Factor on the share while smaller updates are tried. Default 0.4: large enough to
            show within two windows.
        retreat: Factor on the share when the loss gets worse. Default 0.5: what a window of too
            large updates destroys, as dead units, may not come back.
        loosen: Factor on the share otherwise. Default 1.25.
        confidence: The change of the loss that counts, in standard errors. Default 2.
        relu_recurrence: Factor on the share for the recurrent weights of ReLU RNNs, whose changes
            compound from timestep to timestep. Default 0.05; 1 makes no difference between tensors.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> UpdateCap(max_ratio=0.02, start_ratio=0.05)
        Traceback (most recent call last):
        ...
        ValueError: start_ratio must be a number > 0 and <= 0.02, got 0.05
    """

    max_ratio: float = 0.15
    wide_ratio: float | None = None
    start_ratio: float | None = None
    min_ratio: float | None = None
    adaptive: bool = True
    window: int = 25
    opening: float = 1.6
    tighten: float = 0.4
    retreat: float = 0.5
    loosen: float = 1.25
    confidence: float = 2.0
    relu_recurrence: float = 0.05

    def __post_init__(self) -> None:
        check_number("max_ratio", self.max_ratio, above=0.0)
        if self.wide_ratio is not None:
            check_number("wide_ratio", self.wide_ratio, above=0.0, at_most=self.max_ratio)
        if self.start_ratio is not None:
            most = self.max_ratio if self.wide_ratio is None else self.wide_ratio
            check_number("start_ratio", self.start_ratio, above=0.0, at_most=most)
        if self.min_ratio is not None:
            check_number("min_ratio", self.min_ratio, above=0.0, at_most=self.first_ratio)
        check_number("relu_recurrence", self.relu_recurrence, above=0.0, at_most=1.0)
        check_type("adaptive", self.adaptive, bool, "True or False")
        check_number("window", self.window, at_least=2, integer=True)
        check_number("opening", self.opening, above=1.0)
        check_number("tighten", self.tighten, above=0.0, below=1.0)
        check_number("retreat", self.retreat, above=0.0, below=1.0)
        check_number("loosen", self.loosen, above=1.0)
        check_number("confidence", self.confidence, at_least=0.0)

    @property
    def widest_ratio(self) -> float:
        """``wide_ratio``, filled in."""
        if self.wide_ratio is None:
            return max(2 / 3 * self.max_ratio, self.start_ratio or 0.0)
        return self.wide_ratio

    @property
    def first_ratio(self) -> float:
        """``start_ratio``, filled in."""
        if self.start_ratio is None:
            return 0.3 * self.widest_ratio
        return self.start_ratio

    @property
    def least_ratio(self) -> float:
        """``min_ratio``, filled in."""
        if self.min_ratio is None:
            return min(self.widest_ratio / 30, self.first_ratio)
        return self.min_ratio


@dataclass(frozen=True)
class Trial:
    """Whether smaller updates help.

    Args:
        before: The share before it.
        losses: Those of the window before it.
        trend: What the loss fell by from window to window before it, at least 0.
        windows: How many are left.
    """

    before: float
    losses: list[float]
    trend: float
    windows: int


class RatioSchedule:
    """The cap at each step, from the losses and from how many updates were large.

    Plain values in and out, so that every rank that sees the same losses holds the same cap. Only
    differences of losses against their own spread decide: scaling or shifting the loss changes
    nothing.

    Attributes:
        ratio: The cap.
        trial: The trial under way, if there is one.
    """

    # Of the tensors, over a window: an ordinary learning rate makes few updates large, and then
    # what the loss does is not for the cap to answer, be it a plateau or noise.
    _MANY = 0.5
    # Windows stop growing here, which bounds the memory.
    _LONGEST = 500
    _SHARE_OF_RUN = 16
    # The first window under a smaller cap still holds losses from before it.
    _TRIAL_WINDOWS = 2
    _MOST_PATIENCE = 16
    # Patience after two trials in vain: from then on it is a plateau, whatever else it may be.
    _TRIED_TWICE = 2

    def __init__(self, settings: UpdateCap) -> None:
        self.settings = settings
        self.ratio = settings.first_ratio if settings.adaptive else settings.max_ratio
        self.trial: Trial | None = None
        self._before: list[float] = []
        self._now: list[float] = []
        self._large = 0.0
        self._steps = 0
        self._opening = True
        self._patience = 1  # windows without a change of the loss before the next trial
        self._unchanged = 0

    def advance(self, loss: float | None, large_share: float) -> float:
        """Account for one step; returns the factor by which the cap changed (1.0 for none).

        Args:
            loss: Loss of the step, if known.
            large_share: Share of tensors whose update would have been large, in [0, 1]: beyond the
                widest share, or of Adam and its relatives beyond the largest.
        """
        if not self.settings.adaptive or loss is None:
            return 1.0
        self._now.append(loss if math.isfinite(loss) else math.inf)
        self._large += large_share
        self._steps += 1
        if len(self._now) < self._window:
            return 1.0
        old = self.ratio
        if self._before:
            self._adapt(self._large / len(self._now))
        self._before, self._now, self._large = self._now, [], 0.0
        return self.ratio / old

    def retreat(self) -> None:
        """Tighten as if the loss had got worse, and compare only losses that come from now on."""
        if self.settings.adaptive:
            self._retreat()
        self._before, self._now, self._large = [], [], 0.0

    @property
    def _window(self) -> int:
        grown = min(self._steps // self._SHARE_OF_RUN, self._LONGEST)
        return max(self.settings.window, grown)

    def _adapt(self, large_share: float) -> None:
        confidence = self.settings.confidence
        if large_share <= self._MANY:
            self.trial, self._unchanged = None, 0
            self._loosen()
        elif not math.isfinite(median(self._now)):
            self._retreat()
        elif self.trial is not None:
            self._judge(self.trial)
        elif _improved(self._now, self._before, confidence):
            self._retreat()
        elif _improved(self._before, self._now, confidence):
            self._unchanged = 0
            self._loosen()
        else:
            self._wait()

    def _wait(self) -> None:
        """The loss does not change: what is tried depends on how long."""
        self._unchanged += 1
        if self._unchanged >= self._patience:
            trend = max(median(self._before) - median(self._now), 0.0)
            self.trial = Trial(self.ratio, self._now, trend, self._TRIAL_WINDOWS)
            self._tighten(self.settings.tighten)
        elif self._opening or self._patience > self._TRIED_TWICE:
            self._loosen()

    def _judge(self, trial: Trial) -> None:
        """Keep a smaller share that helps, and take back one that does not.

        It helps if the loss falls further than it would have as it went.
        """
        expected = trial.trend * (self._TRIAL_WINDOWS + 1 - trial.windows)
        as_it_went = [loss - expected for loss in trial.losses]
        if _improved(as_it_went, self._now, self.settings.confidence):
            self.trial, self._unchanged, self._patience = None, 0, 1
        elif trial.windows > 1:
            self.trial = replace(trial, windows=trial.windows - 1)
        else:
            self.trial, self._unchanged = None, 0
            self._patience = min(2 * self._patience, self._MOST_PATIENCE)
            self.ratio = trial.before  # large updates are not what keeps the loss where it is
            self._loosen()

    def _retreat(self) -> None:
        self.trial, self._unchanged = None, 0
        self._tighten(self.settings.retreat)

    def _tighten(self, factor: float) -> None:
        self._opening = False
        self.ratio = max(self.ratio * factor, self.settings.least_ratio)

    def _loosen(self) -> None:
        factor = self.settings.opening if self._opening else self.settings.loosen
        self.ratio = min(self.ratio * factor, self.settings.widest_ratio)

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {
            "ratio": self.ratio,
            "trial": None if self.trial is None else asdict(self.trial),
            "before": list(self._before),
            "now": list(self._now),
            "large": self._large,
            "steps": self._steps,
            "opening": self._opening,
            "patience": self._patience,
            "unchanged": self._unchanged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.ratio = float(state["ratio"])
        self.trial = None if state["trial"] is None else Trial(**state["trial"])
        self._before = [float(loss) for loss in state["before"]]
        self._now = [float(loss) for loss in state["now"]]
        self._large = float(state["large"])
        self._steps = int(state["steps"])
        self._opening = bool(state["opening"])
        self._patience = int(state["patience"])
        self._unchanged = int(state["unchanged"])


def _improved(before: list[float], now: list[float], confidence: float) -> bool:
    """Whether the median fell by more than ``confidence`` standard errors of the difference."""
    center_before, center_now = median(before), median(now)
    if not math.isfinite(center_now):
        return False
    if not math.isfinite(center_before):
        return True
    deviations = [abs(loss - center_before) for loss in before]
    deviations += [abs(loss - center_now) for loss in now]
    scale = _MAD_TO_SCALE * median(deviations)
    error = _MEDIAN_ERROR * scale * math.sqrt(1.0 / len(before) + 1.0 / len(now))
    return center_before - center_now > confidence * error
