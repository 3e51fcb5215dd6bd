"""How good each detector was, with confidence intervals.

Only runs that are failing or healthy count; ambiguous ones are left out and counted. For a failing
run only what is said at or after the onset of its fault can be right.

==================  ===========================================================================
``precision``       of the runs with an alarm, the share in which it was right: failing, and not
                    only alarmed before the onset
``recall``          of the failing runs, the share with an alarm at or after the onset
``f1``              their harmonic mean
``cause``           of the detected failing runs, the share of which a right cause was named
``macro_f1``        mean over the classes of the labels (the first cause of each failing program,
                    and "healthy") of the F1 of that class. The class a detector puts a run in is
                    "healthy" without an alarm; the label if it names any of the program's causes;
                    the cause it names otherwise
``place``           of the detected failing runs whose fault has a place, the share in which the
                    named alarm is there: the same path, or one within the other
``false_alarms``    alarms per 1,000 healthy steps: all steps of healthy runs, and those of failing
                    ones before the onset
``delay``           median time from onset to first alarm of the detected runs, as share of the
                    budget
``cost``            time added, as share of that of the bare run; for peers without the time that
                    reading their features takes
==================  ===========================================================================

What a detector names is its first alarm; of ours, the first of all warnings in the order of causes.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.detection.judging import AMBIGUOUS, FAILING, HEALTHY, OURS, Claim, JudgedRun
from benchmarks.detection.statistics import Bootstrap, Numbers, estimate, ratio

COIN = "coin at the base rate"
UNNAMED = "unnamed"
METRICS = (
    "precision",
    "recall",
    "f1",
    "cause",
    "macro_f1",
    "place",
    "false_alarms",
    "delay",
)


@dataclass(frozen=True)
class Verdict:
    """What one detector made of one run.

    Attributes:
        label: The class that the run belongs to.
        predicted: The class that the detector puts it in.
        named: The claim that says so; ``None`` without one.
        false_alarms: Claims that are wrong whatever they name.
        delay: Share of the budget between onset and first alarm; ``None`` if not detected.
        placed: Whether the named claim is at a right place; ``None`` where that is no question.
    """

    label: str
    predicted: str
    named: Claim | None
    false_alarms: int
    delay: float | None = None
    placed: bool | None = None

    @property
    def failing(self) -> bool:
        """Whether the run is a failing one."""
        return self.label != HEALTHY

    @property
    def detected(self) -> bool:
        """Whether it is a failing one that was found."""
        return self.failing and self.named is not None

    @property
    def accused(self) -> bool:
        """Whether all that was said of the run is wrong."""
        return not self.detected and self.false_alarms > 0


def decide(run: JudgedRun, claims: Sequence[Claim]) -> Verdict:
    """Returns the verdict of a detector on a run that is not ambiguous."""
    if run.label == HEALTHY:
        named = claims[0] if claims else None
        predicted = HEALTHY if named is None else named.cause or UNNAMED
        return Verdict(HEALTHY, predicted, named, len(claims))
    valid = [claim for claim in claims if claim.step >= run.onset]
    early = len(claims) - len(valid)
    label = run.causes[0]
    if not valid:
        return Verdict(label, HEALTHY, None, early)
    named = valid[0]
    first = min(claim.step for claim in valid)
    return Verdict(
        label,
        label if named.cause in run.causes else named.cause or UNNAMED,
        named,
        early,
        (first - run.onset) / run.steps,
        is_at(named.layer, run.layers) if run.layers else None,
    )


def is_at(place: str, layers: Sequence[str]) -> bool:
    """Whether a place is one of the layers, within one, or holds one.

    Example:
        >>> is_at("net.2.weight", ("net.2",)), is_at("net", ("net.2",)), is_at("net.20", ("net.2",))
        (True, True, False)
    """
    place = place.partition("/")[0]
    if not place:
        return False
    return any(
        place == layer or place.startswith(f"{layer}.") or layer.startswith(f"{place}.")
        for layer in layers
    )


def counted(runs: Sequence[JudgedRun]) -> list[JudgedRun]:
    """The runs that are failing or healthy."""
    return [run for run in runs if run.label != AMBIGUOUS]


def measure(
    runs: Sequence[JudgedRun], verdicts: Sequence[Verdict], bootstrap: Bootstrap
) -> dict[str, dict[str, float | None]]:
    """Returns the metrics of one detector.

    Args:
        runs: The runs that count.
        verdicts: Of the detector, one for each run.
        bootstrap: Of the same runs.
    """
    failing = bootstrap.sums([v.failing for v in verdicts])
    right = bootstrap.sums([v.detected for v in verdicts])
    wrong = bootstrap.sums([v.accused for v in verdicts])
    named = bootstrap.sums([v.detected and v.predicted == v.label for v in verdicts])
    placeable = bootstrap.sums([v.placed is not None for v in verdicts])
    placed = bootstrap.sums([v.placed is True for v in verdicts])
    false_alarms = bootstrap.sums([v.false_alarms for v in verdicts])
    healthy_steps = bootstrap.sums([r.steps if r.label == HEALTHY else r.onset for r in runs])
    delays = [(v.delay, n) for n, v in enumerate(verdicts) if v.delay is not None]
    values = {
        "precision": ratio(right, right + wrong),
        "recall": ratio(right, failing),
        "f1": ratio(2 * right, right + wrong + failing),
        "cause": ratio(named, right),
        "macro_f1": _macro_f1(verdicts, bootstrap),
        "place": ratio(placed, placeable),
        "false_alarms": 1000 * ratio(false_alarms, healthy_steps),
        "delay": bootstrap.medians([delay for delay, _ in delays], [n for _, n in delays]),
    }
    return {name: estimate(values[name]) for name in METRICS}


def _macro_f1(verdicts: Sequence[Verdict], bootstrap: Bootstrap) -> Numbers:
    classes = sorted({v.label for v in verdicts})
    shape = (len(verdicts), len(classes))
    truth = np.array([[v.label == c for c in classes] for v in verdicts], dtype=bool).reshape(shape)
    guess = np.array([[v.predicted == c for c in classes] for v in verdicts], dtype=bool)
    guess = guess.reshape(shape)
    present = bootstrap.sums(truth)
    f1 = ratio(2 * bootstrap.sums(truth & guess), present + bootstrap.sums(guess))
    # A class that was not drawn into a resample is no class there.
    drawn = present > 0
    return ratio(np.where(drawn, f1, 0.0).sum(axis=1), drawn.sum(axis=1).astype(np.float64))


def flip_coins(runs: Sequence[JudgedRun], seed: int = 0) -> list[list[Claim]]:
    """Claims of a coin that knows only how often runs fail and of what.

    Args:
        runs: The runs that count.
        seed: Of the coin; what falls for a run depends on nothing but it, program and seed.
    """
    labels = sorted(run.causes[0] for run in runs if run.label == FAILING)
    rate = len(labels) / max(len(runs), 1)
    flips: list[list[Claim]] = []
    for run in runs:
        rng = np.random.default_rng([seed, run.seed, zlib.crc32(run.program.encode())])
        alarm, step, cause = rng.random(), int(rng.integers(run.steps)), rng.random()
        name = labels[int(cause * len(labels))] if labels else ""
        flips.append([Claim(step, name)] if alarm < rate else [])
    return flips


def score(runs: Sequence[JudgedRun]) -> dict[str, Any]:
    """Returns everything about one side of the split, as plain values.

    Args:
        runs: All its runs, ambiguous ones too.
    """
    kept = counted(runs)
    bootstrap = Bootstrap(kept)
    names = list(dict.fromkeys([OURS, *(name for run in kept for name in run.claims)]))
    claims = {name: [run.claims.get(name, []) for run in kept] for name in names}
    claims[COIN] = flip_coins(kept)
    verdicts = {
        name: [decide(run, said) for run, said in zip(kept, of_runs, strict=True)]
        for name, of_runs in claims.items()
    }
    return {
        "runs": _count(runs),
        "detectors": {
            name: {**measure(kept, decided, bootstrap), "cost": _cost(kept, name)}
            for name, decided in verdicts.items()
        },
        "features_cost": _cost(kept, "features")["value"],
        "confusion": {name: _confusion(decided) for name, decided in verdicts.items()},
        "certainty": rate_certainty(kept),
    }


def _count(runs: Sequence[JudgedRun]) -> dict[str, Any]:
    labels = Counter(run.label for run in runs)
    return {
        **{label: labels[label] for label in (FAILING, HEALTHY, AMBIGUOUS)},
        "programs": len({run.program for run in runs}),
        "families": len({run.family for run in runs}),
        "ambiguous_runs": dict(
            sorted(Counter(run.program for run in runs if run.label == AMBIGUOUS).items())
        ),
        "healthy_steps": sum(
            run.steps if run.label == HEALTHY else run.onset for run in counted(runs)
        ),
    }


def _cost(runs: Sequence[JudgedRun], detector: str) -> dict[str, float | None]:
    part = "guard" if detector == OURS else detector
    timed = [run.seconds for run in runs if part in run.seconds and run.seconds.get("run")]
    bare = sum(seconds["run"] for seconds in timed)
    added = sum(seconds[part] for seconds in timed)
    return {"value": added / bare if bare else None, "low": None, "high": None}


def _confusion(verdicts: Sequence[Verdict]) -> dict[str, dict[str, int]]:
    """How often each class was put into which."""
    table: dict[str, dict[str, int]] = {}
    for (label, predicted), times in sorted(
        Counter((v.label, v.predicted) for v in verdicts).items()
    ):
        table.setdefault(label, {})[predicted] = times
    return table


def rate_certainty(runs: Sequence[JudgedRun]) -> dict[str, dict[str, float | int | None]]:
    """How often our findings of each level of certainty were right.

    A finding is in a failing run if it came at or after its onset. It names the cause if its
    pathology is one of the program's; that is asked only of findings that no other one explains.
    """
    by_level: dict[str, list[tuple[JudgedRun, Claim]]] = {
        "certain": [],
        "likely": [],
        "possible": [],
    }
    for run in runs:
        for claim in (*run.claims.get(OURS, ()), *run.notes):
            if not (claim.certainty == "certain" and claim in run.notes):
                by_level[claim.certainty].append((run, claim))
    rates: dict[str, dict[str, float | int | None]] = {}
    for level, found in by_level.items():
        failing = [_in_failing(run, claim) for run, claim in found]
        alone = [
            _in_failing(run, claim) and claim.cause in run.causes
            for run, claim in found
            if claim.independent
        ]
        rates[level] = {
            "findings": len(found),
            "in_failing_runs": sum(failing) / len(failing) if failing else None,
            "name_the_cause": sum(alone) / len(alone) if alone else None,
        }
    return rates


def _in_failing(run: JudgedRun, claim: Claim) -> bool:
    return run.label == FAILING and claim.step >= run.onset
