"""``docs/remedies.md``, written from the measurements so that it cannot go stale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.remedies.results import in_words

DOCUMENT = Path(__file__).parents[2] / "docs" / "remedies.md"

_HEAD = """\
# Remedies

What each remedy that a finding names was worth, where it could be measured: a small program that
fails without it, the same program with it. The line of code is the one that the library gives for
that program, run as it stands; a line that makes a Trainer is replaced by what it brings into a
plain loop: `GuardEngine`, autocast, a GradScaler. Scores are accuracies in percent on examples that
were not trained on, the median of {seeds} seeds with the lowest and the highest, after the steps
that are named; weights that are NaN count as 0. Chance is 10 for the handwritten digits and 25 for
the first of 60 or 20 inputs. Where one program has several remedies, one that a line of code alone
brings is named before one that needs a change of `forward`, and then the one that scored higher, if
their ranges lie apart.

One program each says that a remedy can help, not that it helps everywhere. Remedies whose findings
carry no link were not measured.

![Accuracy without and with each remedy](../benchmarks/results/remedies_cpu.png)

This page is written by `python -m benchmarks remedies` ({cpu}, torch {torch}, one thread), and a
test compares it with the numbers in `benchmarks/results/remedies_cpu.json`.

Remedies are chosen and ranked by what is known of the model and its optimizer:

```python
from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.diagnose.remedies import remedies_for
from lightning_gradguard.readings import ModelFacts

finding = Finding(Pathology.DEAD_UNITS, Severity.WARNING, "act", 90, {{}}, "All units are dead.")
facts = ModelFacts(optimizer="Adam", lr=0.03, kinds={{"fc": "linear", "act": "relu"}})
assert [remedy.code for remedy in remedies_for(finding, facts)] == [
    "model.act = torch.nn.LeakyReLU(0.1)",
    "model.fc.reset_parameters()",
    "optimizer = torch.optim.Adam(model.parameters(), lr=0.003)",
]
```
"""

_CASE = """\
## {heading}

{sentence}

| program | steps | without | with |
|---|---|---|---|
| {program} | {steps} | {without} | {after} |

```text
{code}
```
"""


def document(result: Mapping[str, Any]) -> str:
    """The page for a result."""
    head = _HEAD.format(
        seeds=result["settings"]["seeds"],
        cpu=result["machine"]["cpu"],
        torch=result["machine"]["packages"]["torch"],
    )
    cases = [
        _CASE.format(
            heading=heading,
            sentence=case["sentence"],
            program=case["program"],
            steps=case["steps"],
            without=in_words(case["without"]),
            after=in_words(case["with"]),
            code=case["code"],
        )
        for heading, case in result["cases"].items()
    ]
    return "\n".join([head, *cases])
