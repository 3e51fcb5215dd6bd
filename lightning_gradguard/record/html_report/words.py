"""The sentences of a report that are made from counts and numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from lightning_gradguard.diagnose import Finding, Severity
from lightning_gradguard.record.run_history import Floats, OptimizerHistory, RunHistory
from lightning_gradguard.respond.actions import Action, ActionKind

_SINGLE = {
    Severity.CRITICAL: "1 critical finding",
    Severity.WARNING: "1 warning",
    Severity.INFO: "1 note",
}
_ONE_OF = {Severity.CRITICAL: "1 of them critical", Severity.WARNING: "1 of them a warning"}
_SEVERAL = {
    Severity.CRITICAL: "{count} of them critical",
    Severity.WARNING: "{count} of them warnings",
    Severity.INFO: "none of them serious",
}
# What a count of steps says that was done to them.
_TO_STEPS = {"skipped_steps": "dropped", "clipped_steps": "clipped", "capped_steps": "capped"}
_DEEDS = {
    ActionKind.TIGHTEN: "tightened the cap on updates",
    ActionKind.BACK_OFF: "cut the learning rate",
    ActionKind.ROLL_BACK: "rolled the weights back",
    ActionKind.BOOST: "changed the boost of layers",
}


def verdict(run: RunHistory) -> str:
    """What came of the run, in one sentence after the state it is in.

    Example:
        >>> from lightning_gradguard.record.run_history import RunInfo
        >>> part = OptimizerHistory(counts={"steps": 600})
        >>> verdict(RunHistory(RunInfo(status="finished"), (part,)))
        'Nothing was found in 600 steps; no step was touched.'
    """
    taken = max((steps_taken(part) for part in run.optimizers), default=0)
    state = _state(run, taken)
    if not taken:
        return f"{state} No step was taken.".lstrip()
    counts: Counter[str] = Counter()
    for part in run.optimizers:
        counts.update(part.counts)
    actions = [action for part in run.optimizers for action in part.actions]
    return f"{state} {outcome(run.findings, actions, counts, taken)}".lstrip()


def part_verdict(part: OptimizerHistory) -> str:
    """The same of one optimizer, without the state of the run."""
    return outcome(part.findings, part.actions, part.counts, steps_taken(part))


def outcome(
    findings: Sequence[Finding], actions: Sequence[Action], counts: Mapping[str, int], steps: int
) -> str:
    """What was found and what was done about it."""
    found, kinds = _found(findings) if findings else ("Nothing was found", "")
    return f"{found} in {plural(steps, 'step')}{kinds}; {_done(actions, counts)}."


def worst(findings: Sequence[Finding]) -> str:
    """Label of the highest severity; ``"good"`` where nothing was found."""
    return max(finding.severity for finding in findings).label if findings else "good"


def steps_taken(part: OptimizerHistory) -> int:
    """How many optimizer steps there were, dropped ones among them."""
    if "steps" in part.counts:
        return part.counts["steps"]
    steps = part.steps["step"]
    return int(steps[-1]) + 1 if len(steps) else 0


def plural(count: int, noun: str) -> str:
    """A count and its noun.

    Example:
        >>> plural(1, "step"), plural(1200, "step")
        ('1 step', '1,200 steps')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def number(value: float | None) -> str:
    """A number as short as it stays readable; a dash for one that is not known.

    Example:
        >>> number(1234567.0), number(0.000123456), number(12.0), number(float("nan"))
        ('1.235e+6', '0.0001235', '12', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+").replace("-", "−")


def percent(value: float) -> str:
    """A share in percent.

    Example:
        >>> percent(0.0), percent(0.0004), percent(0.123)
        ('0%', '<0.1%', '12.3%')
    """
    if math.isnan(value):
        return "–"
    if 0.0 < value < 0.001:
        return "<0.1%"
    return f"{100.0 * value:.1f}".removesuffix(".0") + "%"


def median(values: Floats) -> float:
    """Of the finite values; NaN where there is none."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else math.nan


def _state(run: RunHistory, taken: int) -> str:
    info = run.info
    if info.status == "failed":
        why = f" with {info.error.rstrip('.')}" if info.error else ""
        return f"The run failed{why}."
    if info.status == "stopped":
        return "The run was stopped before its end."
    if info.status == "running":
        planned = f" of {info.planned_steps:,}" if info.planned_steps else ""
        return f"Still running, at step {taken:,}{planned}."
    return ""


def _found(findings: Sequence[Finding]) -> tuple[str, str]:
    """How many there are, and of which kind."""
    highest = max(finding.severity for finding in findings)
    count = sum(finding.severity is highest for finding in findings)
    healed = sum(finding.until is not None for finding in findings)
    if len(findings) == 1:
        return _SINGLE[highest], ", which has healed" if healed else ""
    kinds = _SEVERAL[highest] if count > 1 else _ONE_OF[highest]
    after = f", {'all' if healed == len(findings) else healed} healed" if healed else ""
    return plural(len(findings), "finding"), f", {kinds.format(count=count)}{after}"


def _done(actions: Sequence[Action], counts: Mapping[str, int]) -> str:
    deeds: list[str] = []
    for name, verb in _TO_STEPS.items():
        if counts.get(name, 0):
            amount = f"{counts[name]:,}" if deeds else plural(counts[name], "step")
            deeds.append(f"{verb} {amount}")
    kinds = Counter(action.kind for action in actions)
    deeds += [f"{deed} {_times(kinds[kind])}" for kind, deed in _DEEDS.items() if kinds[kind]]
    if kinds[ActionKind.STOP]:
        deeds.append("stopped the run")
    if not deeds:
        return "no step was touched"
    first, last = ", ".join(deeds[:-1]), deeds[-1]
    return f"the guard {first} and {last}" if first else f"the guard {last}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")
