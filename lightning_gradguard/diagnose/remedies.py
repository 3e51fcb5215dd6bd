"""What to do about a finding, chosen and ranked for the model at hand."""

from __future__ import annotations

from dataclasses import replace

from lightning_gradguard.diagnose.findings import Finding, Remedy, Severity
from lightning_gradguard.readings import ModelFacts


def with_remedies(finding: Finding, model: ModelFacts) -> Finding:
    """Returns the finding with remedies for this model, the best of which its message names.

    Args:
        finding: As a detector found it; remedies that it brings are kept.
        model: What is known about the model.
    """
    remedies = finding.remedies or remedies_for(finding, model)
    if not remedies:
        return finding
    best = remedies[0].sentence
    ask = "if it does harm, " if finding.severity < Severity.WARNING else "to mend it, "
    message = f"{finding.message.removesuffix('.')}; {ask}{best[0].lower()}{best[1:]}"
    return replace(finding, message=message, remedies=remedies)


def remedies_for(finding: Finding, model: ModelFacts) -> tuple[Remedy, ...]:
    """Returns what to try, best first."""
    return ()
