"""The result as tables on the screen and as files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.overhead.results import print_table
from benchmarks.rescue.contenders import GUARD
from benchmarks.rescue.faults import FAULTS
from benchmarks.rescue.runner import Job, Result
from benchmarks.tables import json_text, shown


def compact(results: Mapping[Job, Result]) -> list[dict[str, Any]]:
    """Every score, those of one learning rate and contender together, by seed."""
    rows: dict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    for job, result in results.items():
        key = (job.workload, job.optimizer, f"{job.lr:g}", job.contender, job.fault)
        rows[key][job.seed] = round(result.score, 4)
    return [
        {
            "workload": workload,
            "optimizer": optimizer,
            "lr": float(lr),
            "contender": contender,
            "fault": fault,
            "scores": [scores[seed] for seed in sorted(scores)],
        }
        for (workload, optimizer, lr, contender, fault), scores in sorted(rows.items())
    ]


def write_json(result: Mapping[str, Any], folder: Path) -> Path:
    """Write ``result``; the name tells device and extent."""
    settings = result["settings"]
    part = "_part" if settings["workloads"] or settings["contenders"] else ""
    extent = "_quick" if settings["quick"] else part
    path = folder / f"rescue_{settings['device']}{extent}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text(result, lambda value: round(value, 4)), encoding="utf-8")
    return path


def range_table(result: Mapping[str, Any]) -> list[list[str]]:
    """Decades of learning rate over which each contender reaches the target, by workload."""
    names = contender_names(result)
    rows = [["workload", "target", *names, "ahead of the best peer"]]
    for entry in result["workloads"]:
        if entry["target"] is None:
            continue
        ranges = (entry["contenders"].get(name, {}).get("range") for name in names)
        rows.append(
            [
                f"{entry['workload']}, {entry['optimizer']}",
                shown(entry["target"]),
                *(shown(value) for value in ranges),
                shown(entry["ahead"]),
            ]
        )
    return rows


def score_table(entry: Mapping[str, Any]) -> list[list[str]]:
    """Mean scores of every contender by learning rate."""
    rows = [["", *(f"{lr:g}" for lr in entry["rates"])]]
    rows += [
        [name, *(shown(value) for value in row["scores"])]
        for name, row in entry["contenders"].items()
    ]
    return rows


def fault_table(result: Mapping[str, Any]) -> list[list[str]]:
    """Share of runs that reach the target in spite of a fault."""
    rows = [["", *FAULTS, "all"]]
    for name in contender_names(result):
        rates = result["faults"]["rates"].get(name)
        if rates is not None:
            rows.append([name, *(shown(rates.get(fault)) for fault in (*FAULTS, "all"))])
    return rows


def contender_names(result: Mapping[str, Any]) -> list[str]:
    """In the order in which they were run, the guard last."""
    names = dict.fromkeys(name for entry in result["workloads"] for name in entry["contenders"])
    return [*(name for name in names if name != GUARD), *(GUARD for _ in [0] if GUARD in names)]


def print_tables(result: Mapping[str, Any]) -> None:
    """All tables."""
    _print("Decades of learning rate that reach the target (of 4.5)", range_table(result))
    for entry in result["workloads"]:
        _print(f"{entry['workload']}, {entry['optimizer']}: mean score", score_table(entry))
    rescue = result["rescue"]
    _print(
        f"Of {rescue['failing']} runs on the grids that fail without a guard, rescued",
        [["", "share"], *([name, shown(rate)] for name, rate in rescue["rates"].items())],
    )
    _print("Share of runs that reach the target in spite of a fault", fault_table(result))
    faults, harm = result["faults"], result["harm"]
    print(f"time beside the same run without fault and guard: {shown(faults['time_ratio'])}")
    print(*faults["lost"], sep="\n")
    print(f"\n{harm_sentence(harm)}")
    print(*harm["worse"], sep="\n")


def harm_sentence(harm: Mapping[str, Any]) -> str:
    """What the guard did to runs that are healthy without it."""
    low, high = (shown(value, 4) for value in harm["interval"])
    return (
        f"{harm['pairs']} healthy pairs: {harm['identical']} with an equal score, mean difference "
        f"{shown(harm['mean'], 4)} [{low}, {high}], {harm['better']} better and "
        f"{len(harm['worse'])} worse beyond the noise of seeds."
    )


def _print(title: str, table: list[list[str]]) -> None:
    print_table(title, table[0], table[1:])
