"""Findings and actions as they stand, from the events that tell how they came about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_gradguard.diagnose import Finding
from lightning_gradguard.respond.actions import Action, ActionKind


def past_findings(events: Iterable[Mapping[str, Any]]) -> tuple[Finding, ...]:
    """The latest state of each finding, in the order in which they opened.

    An event changes the finding of the same cause that is open, as in the run's own report, or the
    one that opened at the same step, which a run has found again after it went back to a
    checkpoint. Findings that this version does not know are left out.

    Example:
        >>> from lightning_gradguard.diagnose import Pathology, Severity
        >>> spike = Finding(Pathology.LOSS_SPIKE, Severity.INFO, "loss", 7, {"z": 9.0}, "A jump")
        >>> opened = {"event": "finding", **spike.to_dict()}
        >>> [finding.until for finding in past_findings([opened, {**opened, "until": 12}])]
        [12]
    """
    findings: list[Finding] = []
    places: dict[tuple[object, ...], int] = {}
    for event in events:
        finding = _finding(event)
        if finding is None:
            continue
        cause = (finding.pathology, finding.where, finding.local)
        place = places.get(cause)
        if place is not None and (
            findings[place].until is None or findings[place].step == finding.step
        ):
            findings[place] = finding
        else:
            places[cause] = len(findings)
            findings.append(finding)
    return tuple(findings)


def past_actions(events: Iterable[Mapping[str, Any]]) -> tuple[Action, ...]:
    """The actions, in order; of steps that were done again, those of the last time."""
    actions: list[Action] = []
    for event in events:
        action = _action(event)
        if action is None:
            continue
        while actions and actions[-1].step > action.step:
            actions.pop()
        actions.append(action)
    return tuple(actions)


def _finding(event: Mapping[str, Any]) -> Finding | None:
    if event.get("event") != "finding":
        return None
    try:
        return Finding.from_dict({**event, "evidence": _numbers(event["evidence"])})
    except (KeyError, ValueError, TypeError):  # of another version
        return None


def _action(event: Mapping[str, Any]) -> Action | None:
    if event.get("event") != "action":
        return None
    try:
        kind = ActionKind(event["kind"])
        return Action(kind, int(event["step"]), event["message"], _numbers(event["numbers"]))
    except (KeyError, ValueError, TypeError):  # of another version
        return None


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
