"""What to do about a finding, chosen and ranked for the model at hand.

==================  ============================================================================
``model_layers``    which layers the model has, read off `ModelFacts`
``code``            lines of code that run on that model: replace a module, make an optimizer
``step_remedies``   what changes the step, its numbers or its data, one function per remedy
``layer_remedies``  what changes the layers of the model, likewise
``choice``          which remedies suit a pathology, best first
==================  ============================================================================

Every line of code runs as it stands where `torch`, `model` and `optimizer` are what they are called
in the run, and `inputs`, `sequence`, `output`, `batch` and `probability` what their names say; what
it takes from this package it imports. Remedies that `python -m benchmarks remedies` supports name
the heading of ``docs/remedies.md`` with the numbers.
"""

from __future__ import annotations

from dataclasses import replace

from lightning_gradguard.diagnose.findings import Finding, Remedy, Severity
from lightning_gradguard.diagnose.remedies.choice import CHOICES
from lightning_gradguard.diagnose.remedies.step_remedies import lower_rate
from lightning_gradguard.diagnose.time_remedies import GUARD, SLOWER
from lightning_gradguard.readings import ModelFacts

__all__ = ["remedies_for", "with_remedies", "without_remedy"]

MOST_REMEDIES = 3
_MILD, _SERIOUS = "if it does harm", "to mend it"


def with_remedies(finding: Finding, model: ModelFacts) -> Finding:
    """Returns the finding with remedies for this model, the best of which its message names.

    Args:
        finding: As a detector found it.
        model: What is known about the model.
    """
    remedies = remedies_for(finding, model)
    message = f"{finding.message.removesuffix('.')}{_advice(finding, remedies[0])}"
    return replace(finding, message=message, remedies=remedies)


def without_remedy(finding: Finding) -> str:
    """Returns the message as it was before :func:`with_remedies` named the best remedy in it.

    Args:
        finding: With or without remedies.
    """
    if not finding.remedies:
        return finding.message
    advice = _advice(finding, finding.remedies[0])
    if not finding.message.endswith(advice):
        return finding.message
    return finding.message.removesuffix(advice) + "."


def _advice(finding: Finding, remedy: Remedy) -> str:
    ask = _MILD if finding.severity < Severity.WARNING else _SERIOUS
    return f"; {ask}, {remedy.sentence[0].lower()}{remedy.sentence[1:]}"


def remedies_for(finding: Finding, model: ModelFacts) -> tuple[Remedy, ...]:
    """Returns one to three things to try, best first.

    Those that a finding through time brings are kept, because they are made from its reading; but
    a run that is guarded is not told to be.

    Args:
        finding: As a detector found it.
        model: What is known about the model; with less known, remedies are more general.

    Example:
        >>> from lightning_gradguard.diagnose import Pathology
        >>> finding = Finding(Pathology.DIVERGING, Severity.WARNING, "loss", 90, {}, "It rises.")
        >>> remedies_for(finding, ModelFacts(optimizer="SGD", lr=0.1, momentum=0.9))[0].code
        'optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)'
    """
    if finding.remedies and "decay_rate" in finding.evidence:
        slower = lower_rate(model)
        fitting = [r for r in finding.remedies if not (model.guarded and r == GUARD)]
        return tuple(slower if r == SLOWER else r for r in fitting)
    candidates = CHOICES[finding.pathology](finding, model)
    chosen = list(dict.fromkeys(remedy for remedy in candidates if remedy is not None))
    return tuple(chosen[:MOST_REMEDIES])
