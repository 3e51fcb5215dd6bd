"""Findings and actions as they stand, from the events that tell how they came about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_gradguard.diagnose import Finding
from lightning_gradguard.respond.actions import Action, ActionKind


def past_findings(events: Iterable[Mapping[str, Any]]) -> tuple[Finding, ...]:
    """The latest state of each finding, in the order in which they opened.

    An event changes the finding of the same cause that is open, as in the run's own report, or the
    one that opened at the same step. What was found from the step on from which a run was resumed
    is taken back. Findings that this version does not know are left out.

    Example:
        >>> from lightning_gradguard.diagnose import Pathology, Severity
        >>> spike = Finding(Pathology.LOSS_SPIKE, Severity.INFO, "loss", 7, {"z": 9.0}, "A jump")
        >>> opened = {"event": "finding", **spike.to_dict()}
        >>> [finding.until for finding in past_findings([opened, {**opened, "until": 12}])]
        [12]
    """
    findings: list[Finding] = []
    for event in events:
        resumed = _resumed(event)
        if resumed is not None:
            findings = [finding for finding in findings if finding.step < resumed]
        finding = _finding(event)
        if finding is None:
            continue
        place = _last_of_cause(findings, finding)
        known = findings[place] if place >= 0 else None
        if known is not None and (known.until is None or known.step == finding.step):
            findings[place] = finding
        else:
            findings.append(finding)
    return tuple(findings)


def _last_of_cause(findings: Sequence[Finding], finding: Finding) -> int:
    """Where the last finding of the same cause stands; -1 if there is none."""
    for place in range(len(findings) - 1, -1, -1):
        if findings[place].cause == finding.cause:
            return place
    return -1


def past_actions(events: Iterable[Mapping[str, Any]]) -> tuple[Action, ...]:
    """The actions, in order; of steps that were done again, those of the last time."""
    actions: list[Action] = []
    for event in events:
        resumed = _resumed(event)
        if resumed is not None:
            actions = [action for action in actions if action.step < resumed]
        action = _action(event)
        if action is not None:
            actions.append(action)
    return tuple(actions)


def _resumed(event: Mapping[str, Any]) -> int | None:
    """The step from which the run goes on, if the event says that it does."""
    step = event.get("step")
    return step if event.get("event") == "resumed" and isinstance(step, int) else None


def _finding(event: Mapping[str, Any]) -> Finding | None:
    if event.get("event") != "finding":
        return None
    try:
        _check(event, where=str, message=str, step=int)
        return Finding.from_dict({**event, "evidence": _numbers(event["evidence"])})
    except (KeyError, ValueError, TypeError):  # of another version
        return None


def _action(event: Mapping[str, Any]) -> Action | None:
    if event.get("event") != "action":
        return None
    try:
        _check(event, step=int, message=str)
        kind = ActionKind(event["kind"])
        return Action(kind, event["step"], event["message"], _numbers(event["numbers"]))
    except (KeyError, ValueError, TypeError):  # of another version
        return None


def _check(event: Mapping[str, Any], **kinds: type) -> None:
    wrong = [name for name, kind in kinds.items() if not isinstance(event[name], kind)]
    if wrong:
        raise TypeError(", ".join(wrong))


def _numbers(values: object) -> dict[str, float]:
    if not isinstance(values, Mapping):
        raise TypeError(values)
    return {name: float(value) for name, value in values.items()}
