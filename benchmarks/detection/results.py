"""The result as tables on the screen and as files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.detection.judging import OURS, JudgedRun
from benchmarks.detection.peers.simple import LossDidNotFall, NaNOnly
from benchmarks.detection.scoring import COIN
from benchmarks.overhead.results import RESULTS, print_table

__all__ = [
    "HEADER",
    "RESULTS",
    "TARGETS",
    "cell",
    "compact",
    "plain",
    "print_cases",
    "print_tables",
    "shown_name",
    "wanted",
    "write_json",
]

# What is asked of ours on the held-out side; false alarms per 1,000 healthy steps.
TARGETS = {"recall": 0.95, "precision": 0.95, "cause": 0.9, "false_alarms": 0.1, "delay": 0.05}
HEADER = {
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "macro_f1": "macro-F1 of cause",
    "cause": "right cause",
    "place": "right place",
    "false_alarms": "false alarms / 1,000",
    "delay": "delay, % of budget",
    "cost": "added time",
}
_PERCENT = ("delay", "cost")
_WITH_INTERVAL = ("f1", "precision", "recall", "macro_f1")
_PLACEHOLDER = "runs, one a line"
_ESTIMATE = re.compile(r'\{\s*"value": [^{}]*\}')


def write_json(result: Mapping[str, Any], folder: Path) -> Path:
    """Write ``result``; the name tells device and extent."""
    settings = result["settings"]
    part = "_part" if settings["programs"] or settings["split"] != "all" else ""
    extent = "_quick" if settings["quick"] else part
    path = folder / f"detection_{settings['device']}{extent}.json"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in result["runs"])
    text = json.dumps({**result, "runs": _PLACEHOLDER}, indent=1, allow_nan=False)
    text = _ESTIMATE.sub(lambda match: " ".join(match.group().split()), text)
    text = text.replace(f'"{_PLACEHOLDER}"', f"[\n  {lines}\n ]")
    path.write_text(text + "\n", encoding="utf-8")
    return path


def compact(runs: Sequence[JudgedRun]) -> dict[str, Any]:
    """Every run as a short row, and how to read it."""
    peers = list(dict.fromkeys(name for run in runs for name in run.claims if name != OURS))
    return {
        "columns": {
            "ours": ["step", "cause", "place", "certainty"],
            "peers": ["alarms", "step of the first", "its cause"],
            "peers in the order of": peers,
        },
        "runs": [_row(run, peers) for run in runs],
    }


def _row(run: JudgedRun, peers: Sequence[str]) -> dict[str, Any]:
    claims = [run.claims.get(name, []) for name in peers]
    return {
        "program": run.program,
        "seed": run.seed,
        "label": run.label,
        "score": round(run.score, 4) if math.isfinite(run.score) else None,
        "ours": [[c.step, c.cause, c.layer, c.certainty] for c in run.claims[OURS]],
        "peers": [[len(said), said[0].step, said[0].cause] if said else None for said in claims],
    }


def print_tables(result: Mapping[str, Any]) -> None:
    """Print what was measured."""
    if "machine" in result:
        machine = result["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if v)
        print(f"{machine['cpu']}, one thread per run; python {machine['python']}; {versions}")
    for name, side in result["sides"].items():
        _print_side(name.replace("_", "-"), side)
    if result.get("sweep"):
        _print_sweep(result["sweep"])
    _print_trouble(result)
    kinds = {
        name: dict.fromkeys(("missed", "false", "misnamed", "misplaced"), 0)
        for name in result["cases"]
    }
    for name, cases in result["cases"].items():
        for case in cases:
            kinds[name][case["kind"]] += len(case["seeds"])
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds[name].items())
        print(f"\n{name.replace('_', '-')}, runs that went wrong with {OURS}: {counts}")


def _print_side(name: str, side: Mapping[str, Any]) -> None:
    runs = side["runs"]
    print(
        f"\n{name}: {runs['programs']} programs of {runs['families']} families; {runs['failing']} "
        f"failing and {runs['healthy']} healthy runs, {runs['ambiguous']} ambiguous ones left out; "
        f"{runs['healthy_steps']} healthy steps"
    )
    rows = [
        [detector, *(cell(column, metrics[column]) for column in HEADER)]
        for detector, metrics in side["detectors"].items()
    ]
    rows.append(["wanted", *(wanted(column) for column in HEADER)])
    title = (
        "Ours and re-implementations of others, with 95 % intervals; a bootstrap over families "
        "and seeds"
    )
    print_table(title, ["", *HEADER.values()], rows)
    if side["features_cost"] is not None:
        share = 100 * side["features_cost"]
        print(
            f"reading what the peers are given adds {share:.0f} % more, which is not in the table"
        )
    print_table(
        f"How sure {OURS} was, and how often it was right",
        ["", "findings", "in failing runs", "name the cause"],
        [
            [
                level,
                str(rates["findings"]),
                plain(rates["in_failing_runs"]),
                plain(rates["name_the_cause"]),
            ]
            for level, rates in side["certainty"].items()
        ],
    )
    ambiguous = side["runs"]["ambiguous_runs"]
    if ambiguous:
        print("ambiguous: " + ", ".join(f"{k} ({v})" for k, v in ambiguous.items()))


def cell(column: str, estimate: Mapping[str, float | None]) -> str:
    """A figure as it stands in a table, with its interval where that tells something."""
    value = estimate["value"]
    if value is None:
        return "-"
    if column in _PERCENT:
        return f"{100 * value:.1f}"
    text = f"{value:.2f}"
    low, high = estimate["low"], estimate["high"]
    if column in _WITH_INTERVAL and low is not None and high is not None:
        text += f" [{low:.2f} {high:.2f}]"
    return text


def wanted(column: str) -> str:
    """What is asked of ours."""
    if column not in TARGETS:
        return ""
    value = 100 * TARGETS[column] if column in _PERCENT else TARGETS[column]
    sign = "≤" if column in ("false_alarms", "delay") else "≥"
    return f"{sign} {value:g}"


def plain(value: float | None) -> str:
    """A share, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"


def _print_sweep(sweep: Mapping[str, Any]) -> None:
    watched = ("f1", "precision", "recall", "macro_f1")
    changed = [
        row for row in sweep["changes"] if any(abs(row[name] or 0.0) >= 0.005 for name in watched)
    ]
    changed.sort(key=lambda row: min(row[name] or 0.0 for name in watched))
    base = ", ".join(f"{name} {plain(sweep['defaults'].get(name))}" for name in watched)
    print(
        f"\nThresholds halved and doubled, {sweep['runs']} development runs ({base}): of "
        f"{len(sweep['changes'])} variations {len(sweep['changes']) - len(changed)} change nothing "
        f"by 0.005; {sweep['left_out']} were left out for want of time"
    )
    rows = [
        [
            row["name"],
            f"{row['value']:g}",
            *("-" if row[n] is None else f"{row[n]:+.3f}" for n in watched),
        ]
        for row in changed
    ]
    print_table("Those that do, the worst first", ["", "value", *watched], rows)


def _print_trouble(result: Mapping[str, Any]) -> None:
    for crash in result["crashes"]:
        print(f"\ncrashed: {crash['program']}, seed {crash['seed']}\n{crash['reason']}")
    for crash in result.get("sweep", {}).get("crashes", ()):
        print(f"\ncrashed: {crash}")
    if result["replay_differs"]:
        print(
            f"\n{len(result['replay_differs'])} runs found something else than a replay of their "
            f"observations: {', '.join(result['replay_differs'][:5])}"
        )


def print_cases(result: Mapping[str, Any]) -> None:
    """Print what went wrong with ours, program by program."""
    for name, cases in result["cases"].items():
        print(f"\n{name.replace('_', '-')}, program by program")
        for case in cases:
            seeds = ", ".join(map(str, case["seeds"]))
            wanted = "/".join(case["causes"]) or "nothing"
            place = f" in {', '.join(case['layers'])}" if case["layers"] else ""
            print(
                f"\n{case['kind']}: {case['program']} (seeds {seeds}); right is {wanted}{place}, "
                f"from step {case['onset']} of {case['steps']}"
            )
            for what, said in case["said"].items():
                print(f"  {what}, step {said['step']} of seed {said['seed']}: {said['message']}")


def shown_name(detector: str) -> str:
    """Name with a mark where it is not its authors' own code."""
    own = (OURS, COIN, NaNOnly.name, LossDidNotFall.name)
    return detector if detector in own else f"{detector} (re-impl.)"
