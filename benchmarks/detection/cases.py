"""Which runs went wrong, program by program, and what was said of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.detection.judging import HEALTHY, OURS, Claim, JudgedRun
from benchmarks.detection.scoring import counted, decide

KINDS = ("missed", "false", "misnamed", "misplaced")


def failing_cases(runs: Sequence[JudgedRun], detector: str = OURS) -> list[dict[str, Any]]:
    """Returns one entry for each program and each way in which its runs went wrong.

    Args:
        runs: All runs of one side; ambiguous ones are left out.
        detector: Whose claims.
    """
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for run in sorted(counted(runs), key=lambda run: (run.program, run.seed)):
        for kind, claims in _faults(
            run, run.claims.get(detector, []), run.notes if detector == OURS else []
        ):
            case = cases.setdefault(
                (run.program, kind),
                {
                    "program": run.program,
                    "family": run.family,
                    "kind": kind,
                    "causes": list(run.causes),
                    "layers": list(run.layers),
                    "onset": run.onset,
                    "steps": run.steps,
                    "seeds": [],
                    "said": {},
                },
            )
            case["seeds"].append(run.seed)
            for claim in claims:
                where = claim.layer or "the run"
                # One example of each is enough: ten seeds say the same in other numbers.
                case["said"].setdefault(
                    f"{claim.cause} in {where}",
                    {"seed": run.seed, "step": claim.step, "message": claim.message},
                )
    return sorted(cases.values(), key=lambda case: (KINDS.index(case["kind"]), case["program"]))


def _faults(
    run: JudgedRun, claims: Sequence[Claim], notes: Sequence[Claim]
) -> Iterator[tuple[str, Sequence[Claim]]]:
    verdict = decide(run, claims)
    early = [claim for claim in claims if run.label == HEALTHY or claim.step < run.onset]
    if early:
        yield "false", early
    if not verdict.failing:
        return
    if verdict.named is None:
        yield "missed", notes
    elif verdict.predicted != verdict.label:
        yield "misnamed", [verdict.named]
    elif verdict.placed is False:
        yield "misplaced", [verdict.named]
