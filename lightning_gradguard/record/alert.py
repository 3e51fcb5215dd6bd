"""Who is told of what: the settings of alerts, and an alert as a value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from lightning_gradguard._validation import check_choice, check_number, check_type
from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.diagnose.remedies import without_remedy
from lightning_gradguard.record.finding_groups import name_of
from lightning_gradguard.record.plain_report import head, numbers_in_words
from lightning_gradguard.respond.actions import Action

Level = Literal["info", "warning", "critical"]

# A title never changes, so that people can mute or route one, and W&B can tell repetitions. W&B
# takes fewer than 64 characters.
FINDING_TITLES = MappingProxyType(
    {
        Pathology.NON_FINITE: "GradGuard: NaN or Inf in training",
        Pathology.UNDERFLOW: "GradGuard: gradient underflow",
        Pathology.DEAD_UNITS: "GradGuard: dead units",
        Pathology.SATURATED: "GradGuard: saturated units",
        Pathology.LAYER_NOT_TRAINING: "GradGuard: layer does not train",
        Pathology.VANISHING_IN_TIME: "GradGuard: vanishing gradient through time",
        Pathology.VANISHING_IN_DEPTH: "GradGuard: vanishing gradient through depth",
        Pathology.UPDATE_OUT_OF_RANGE: "GradGuard: updates of a layer out of range",
        Pathology.EXPLODING: "GradGuard: exploding gradient",
        Pathology.DIVERGING: "GradGuard: loss diverges",
        Pathology.LOSS_SPIKE: "GradGuard: loss spike",
        Pathology.OSCILLATING: "GradGuard: loss oscillates",
        Pathology.STAGNATING: "GradGuard: loss stagnates",
    }
)
ACTION_TITLES = MappingProxyType(
    {
        "skip": "GradGuard: step skipped",
        "tighten": "GradGuard: cap on updates tightened",
        "back_off": "GradGuard: learning rate cut",
        "recover": "GradGuard: learning rate recovers",
        "boost": "GradGuard: boost of layers changed",
        "roll_back": "GradGuard: weights rolled back",
        "stop": "GradGuard: run is stopped",
    }
)
_ACTION_LEVELS: dict[str, Level] = {"boost": "info", "recover": "info", "stop": "critical"}
_FINDING_LEVELS: dict[Severity, Level] = {
    Severity.INFO: "info",
    Severity.WARNING: "warning",
    Severity.CRITICAL: "critical",
}


@dataclass(frozen=True)
class Alert:
    """What people are told. ``print(alert)`` shows the title and below it the text.

    Attributes:
        title: Which kind of trouble; the same words every time.
        text: What was found or done, on which evidence, and what to try.
        level: How bad it is.
        finding: What was found, if it tells of a finding.
        action: What was done, if it tells of an action.
        suppressed: Alerts of this title that were held back since the last one was sent.

    Example:
        >>> print(Alert("GradGuard: loss spike", "The loss jumped.", "warning"))
        GradGuard: loss spike
        The loss jumped.
    """

    title: str
    text: str
    level: Level
    finding: Finding | None = None
    action: Action | None = None
    suppressed: int = 0

    def __str__(self) -> str:
        return f"{self.title}\n{self.text}"


@dataclass(frozen=True)
class GradientAlert:
    """Who is told of what, and how often. Whoever is told slowly never holds up training.

    A finding is told when it opens, turns more severe, or outlasts the NaN that explained it. One
    that follows from another is left out if that other is told.

    Args:
        send: Called with each :class:`Alert`, in a thread of its own; what it returns is ignored.
            If it raises, that is logged and it is not called again in this fit. Default ``None``.
        min_severity: Mildest finding that is told. Default ``"warning"``: below it there is only a
            symptom, which may be nothing.
        actions: Kinds of actions that are told, of ``"skip"``, ``"tighten"``, ``"back_off"``,
            ``"recover"``, ``"boost"``, ``"roll_back"`` and ``"stop"``. Default
            ``("roll_back", "stop")``: what changes the course of a run; the others are frequent and
            part of an ordinary rescue.
        wandb: Whether to send W&B alerts where the Trainer has a ``WandbLogger``; W&B passes them
            on by e-mail or Slack as its user has set. Default ``True``.
        log: Whether to write each to Python's logger ``lightning_gradguard.alerts``, at the level
            ``WARNING``. Default ``False``: the logger ``lightning_gradguard`` says each finding
            already, and a second line of the same is noise to all but a log collector.
        every_seconds: Seconds after an alert in which no other with its title is sent; those that
            were held back are counted in the next. Default 300: about what one needs to look.
        max_alerts: Most alerts in a fit. Default 100: who has not reacted by then will not.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> GradientAlert(send=print, min_severity="critical", every_seconds=600).max_alerts
        100
    """

    send: Callable[[Alert], object] | None = None
    min_severity: Level = "warning"
    actions: tuple[str, ...] = ("roll_back", "stop")
    wandb: bool = True
    log: bool = False
    every_seconds: float = 300.0
    max_alerts: int = 100

    def __post_init__(self) -> None:
        if self.send is not None and not callable(self.send):
            raise TypeError(f"send must be callable with an Alert, or None, got {self.send!r}")
        if inspect.iscoroutinefunction(self.send):
            raise TypeError(
                f"send must be a plain function, as nothing would await it, got {self.send!r}"
            )
        check_choice("min_severity", self.min_severity, [s.label for s in Severity])
        check_type("actions", self.actions, tuple, "a tuple of names of actions")
        for kind in self.actions:
            check_choice("actions", kind, list(ACTION_TITLES))
        check_type("wandb", self.wandb, bool, "True or False")
        check_type("log", self.log, bool, "True or False")
        check_number("every_seconds", self.every_seconds, at_least=0.0)
        check_number("max_alerts", self.max_alerts, at_least=1, integer=True)

    def wants(self, event: Finding | Action, known: Sequence[Finding] = ()) -> bool:
        """Whether people are to be told of this, how often aside.

        Args:
            event: What was found or done.
            known: Findings up to now, in which the cause of ``event`` is looked up.
        """
        if isinstance(event, Action):
            return event.kind.value in self.actions
        return self._is_told(event) and not self._is_told_by_cause(event, known)

    def _is_told(self, finding: Finding) -> bool:
        return finding.severity >= Severity.from_label(self.min_severity)

    def _is_told_by_cause(self, finding: Finding, known: Sequence[Finding]) -> bool:
        """Whether something that this follows from was told.

        It was not if it is milder than what is told; one that is no longer known was.
        """
        latest = {name_of(other): other for other in known}
        seen = {name_of(finding)}
        while finding.follows_from and finding.follows_from not in seen:
            seen.add(finding.follows_from)
            cause = latest.get(finding.follows_from)
            if cause is None or self._is_told(cause):
                return True
            finding = cause
        return False


def title_of(event: Finding | Action) -> str:
    """The title of its alert, which depends on nothing but its kind.

    Example:
        >>> from lightning_gradguard.respond import ActionKind
        >>> title_of(Action(ActionKind.STOP, 90, "Stopping at step 90."))
        'GradGuard: run is stopped'
    """
    if isinstance(event, Finding):
        return FINDING_TITLES[event.pathology]
    return ACTION_TITLES[event.kind.value]


def alert_of(event: Finding | Action, label: str = "", suppressed: int = 0) -> Alert:
    """The alert that tells of a finding or an action.

    Args:
        event: What was found or done.
        label: Name of the optimizer, where there are several.
        suppressed: Alerts of this title that were held back since the last one.
    """
    lines = _finding_lines(event) if isinstance(event, Finding) else _action_lines(event)
    if label:
        lines.append(f"Optimizer: {label}")
    if suppressed:
        lines.append(f"Alerts of this kind held back since the last: {suppressed}")
    title, text = title_of(event), "\n".join(lines)
    if isinstance(event, Finding):
        level = _FINDING_LEVELS[event.severity]
        return Alert(title, text, level, finding=event, suppressed=suppressed)
    level = _ACTION_LEVELS.get(event.kind.value, "warning")
    return Alert(title, text, level, action=event, suppressed=suppressed)


def _finding_lines(finding: Finding) -> list[str]:
    lines = [without_remedy(finding), f"{head(finding)}; found at step {finding.step}"]
    if finding.evidence:
        lines.append(f"Evidence: {numbers_in_words(finding.evidence)}")
    for number, remedy in enumerate(finding.remedies, 1):
        lines += [f"Remedy {number}: {remedy.sentence}", f"    {remedy.code}"]
    return lines


def _action_lines(action: Action) -> list[str]:
    lines = [action.message, f"Done at step {action.step}"]
    if action.numbers:
        lines.append(f"Evidence: {numbers_in_words(action.numbers)}")
    return lines
