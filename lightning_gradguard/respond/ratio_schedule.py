"""How the cap on updates follows the loss, and when it begins to bind."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from lightning_gradguard.respond.loss_course import improved, overshoots, rises
from lightning_gradguard.respond.update_cap import UpdateCap


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

    Plain values in and out, so that every rank that sees the same losses holds the same cap. Losses
    are judged by their own spread or by the first of them: scaling them changes nothing.

    A schedule that trusts the run bounds nothing. While updates are large for the first time, a
    loss that rises ends the trust for good: the weights of before are asked for, and the cap
    binds. A run that has got through this is trusted to the end. If then its loss gets worse or
    does not change, the learning rate is what is lowered, by the same rules as the cap is: its
    weights have grown with its updates, so that no share of them would say how large is too large.

    Args:
        settings: Of the cap.
        trusting: Whether to trust the run at first, if the settings say so too: whether weights can
            be put back and the learning rate may be lowered. Default ``False``.

    Attributes:
        trusting: Whether nothing is bounded.
        asks_back: Whether the last step has ended that, and its weights had better be put back.
        trial: The trial under way, if there is one.
    """

    # Of the tensors, over a window: an ordinary learning rate makes few updates large, and then
    # what the loss does is not for the cap to answer, be it a plateau or noise.
    _MANY = 0.5
    # The same for a run that is trusted, whose weights grow with its updates.
    _SOME = 1 / 3
    # Steps with large updates, in first windows: what is too large shows at once.
    _PROBATION_WINDOWS = 2
    # Windows stop growing here, which bounds the memory.
    _LONGEST = 500
    _SHARE_OF_RUN = 16
    # The first window under a smaller cap still holds losses from before it.
    _TRIAL_WINDOWS = 2
    _MOST_PATIENCE = 16
    # Patience after two trials in vain: from then on it is a plateau, whatever else it may be.
    _TRIED_TWICE = 2
    # The smallest scale of the learning rate; of the cap it is the same share of the widest.
    _LEAST_SCALE = 1 / 30

    def __init__(self, settings: UpdateCap, *, trusting: bool = False) -> None:
        self.settings = settings
        self._may_trust = trusting and settings.on_evidence
        self.trusting = self._may_trust
        self.asks_back = False
        self.trial: Trial | None = None
        self._share = 1.0 if self.trusting else self._first_share
        self._suspect = False  # whether updates were large while it was trusted
        self._watched = 0  # steps of which that was so
        self._before: list[float] = []
        self._now: list[float] = []
        self._large = 0.0
        self._steps = 0
        self._opening = not self.trusting
        self._patience = 1  # windows without a change of the loss before the next trial
        self._unchanged = 0

    @property
    def ratio(self) -> float:
        """The cap; infinite while the run is trusted."""
        return math.inf if self.trusting else self._share

    @property
    def lr_scale(self) -> float:
        """Factor on the learning rate; 1 unless the run is trusted."""
        return self._share if self.trusting else 1.0

    def advance(self, loss: float | None, large_share: float) -> float:
        """Account for one step.

        Args:
            loss: Loss of the step, if known.
            large_share: Share of tensors whose update would have been large, in [0, 1]: beyond the
                widest share, or of Adam and its relatives beyond the largest.

        Returns:
            The factor by which the cap changed, or the scale of the learning rate while the run
            is trusted; 1.0 for none.
        """
        self.asks_back = False
        if loss is None:
            self.stop_trusting()  # there will be no evidence
        if not self.settings.adaptive or loss is None:
            return 1.0
        self._now.append(loss if math.isfinite(loss) else math.inf)
        self._large += large_share
        self._steps += 1
        self._watched += self._has_been_large
        if self._on_probation and self._has_failed():
            self.stop_trusting()
            self.asks_back = True
            return 1.0
        if len(self._now) < self._window:
            return 1.0
        old = self._share
        self._suspect |= self.trusting and self._mean_large > self._MANY
        if self._before:
            # Once many were large they may have ceased to be by the growth of the weights.
            self._adapt(1.0 if self._suspect else self._mean_large)
        self._start_window(self._now)
        return self._share / old

    def retreat(self) -> None:
        """Tighten as if the loss had got worse, and compare only losses that come from now on."""
        if self._on_probation:
            self.stop_trusting()
        if self.settings.adaptive and (self._suspect or not self.trusting):
            self._retreat()
        self._start_window([])

    def stop_trusting(self) -> None:
        """Bind from now on, as from the start."""
        if not self.trusting:
            return
        self.trusting, self._suspect = False, False
        self.trial, self._unchanged, self._patience = None, 0, 1
        self._share, self._opening = self._first_share, True
        self._start_window([])

    def lose_copies(self) -> None:
        """There are no weights to go back to any more: trust only what has shown itself by now."""
        if self._watched <= self._probation:
            self.stop_trusting()

    @property
    def _first_share(self) -> float:
        return self.settings.first_ratio if self.settings.adaptive else self.settings.max_ratio

    @property
    def _probation(self) -> int:
        return self._PROBATION_WINDOWS * self.settings.window

    @property
    def _window(self) -> int:
        grown = min(self._steps // self._SHARE_OF_RUN, self._LONGEST)
        return max(self.settings.window, grown)

    @property
    def _mean_large(self) -> float:
        return self._large / len(self._now) if self._now else 0.0

    @property
    def _has_been_large(self) -> bool:
        return self._suspect or self._mean_large > self._SOME

    @property
    def _on_probation(self) -> bool:
        """Whether these are the first steps with large updates of a run that is trusted."""
        return self.trusting and self._has_been_large and self._watched <= self._probation

    def _start_window(self, before: list[float]) -> None:
        self._before, self._now, self._large = before, [], 0.0

    def _has_failed(self) -> bool:
        losses = [*self._before, *self._now]
        return rises(losses) or (self._steps == len(losses) and overshoots(losses))

    def _adapt(self, large_share: float) -> None:
        confidence = self.settings.confidence
        if large_share <= self._MANY:
            self.trial, self._unchanged = None, 0
            self._loosen()
        elif not math.isfinite(median(self._now)):
            self._retreat()
        elif self.trial is not None:
            self._judge(self.trial)
        elif improved(self._now, self._before, confidence):
            self._retreat()
        elif improved(self._before, self._now, confidence):
            self._unchanged = 0
            self._loosen()
        else:
            self._wait()

    def _wait(self) -> None:
        """The loss does not change: what is tried depends on how long."""
        self._unchanged += 1
        if self._unchanged >= self._patience:
            trend = max(median(self._before) - median(self._now), 0.0)
            self.trial = Trial(self._share, self._now, trend, self._TRIAL_WINDOWS)
            self._tighten(self.settings.tighten)
        elif self._opening or self._patience > self._TRIED_TWICE:
            self._loosen()

    def _judge(self, trial: Trial) -> None:
        """Keep a smaller share that helps, and take back one that does not.

        It helps if the loss falls further than it would have as it went.
        """
        expected = trial.trend * (self._TRIAL_WINDOWS + 1 - trial.windows)
        as_it_went = [loss - expected for loss in trial.losses]
        if improved(as_it_went, self._now, self.settings.confidence):
            self.trial, self._unchanged, self._patience = None, 0, 1
        elif trial.windows > 1:
            self.trial = replace(trial, windows=trial.windows - 1)
        else:
            self.trial, self._unchanged = None, 0
            self._patience = min(2 * self._patience, self._MOST_PATIENCE)
            self._share = trial.before  # large updates are not what keeps the loss where it is
            self._loosen()

    def _retreat(self) -> None:
        self.trial, self._unchanged = None, 0
        self._tighten(self.settings.retreat)

    def _tighten(self, factor: float) -> None:
        self._opening = False
        least = self._LEAST_SCALE if self.trusting else self.settings.least_ratio
        self._share = max(self._share * factor, least)

    def _loosen(self) -> None:
        factor = self.settings.opening if self._opening else self.settings.loosen
        widest = 1.0 if self.trusting else self.settings.widest_ratio
        self._share = min(self._share * factor, widest)

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {
            "trusting": self.trusting,
            "share": self._share,
            "suspect": self._suspect,
            "watched": self._watched,
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
        """Continue from a saved state, within what the settings allow now."""
        self.trusting = bool(state["trusting"])
        self._share = float(state["share"])
        self._suspect = bool(state["suspect"])
        self._watched = int(state["watched"])
        self.trial = None if state["trial"] is None else Trial(**state["trial"])
        self._before = [float(loss) for loss in state["before"]]
        self._now = [float(loss) for loss in state["now"]]
        self._large = float(state["large"])
        self._steps = int(state["steps"])
        self._opening = bool(state["opening"])
        self._patience = int(state["patience"])
        self._unchanged = int(state["unchanged"])
        if not self._may_trust:
            self.stop_trusting()
        if not self.settings.adaptive:
            self._share = self.settings.max_ratio
        elif not self.trusting:
            most = max(self._share, self.settings.least_ratio)
            self._share = min(most, self.settings.widest_ratio)
