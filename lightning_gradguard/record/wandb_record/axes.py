"""Which step the guard's metrics are drawn over, and what of them a run's summary keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightning_gradguard.diagnose import Pathology
from lightning_gradguard.record.metrics import metric_key
from lightning_gradguard.respond.actions import ActionKind

# Lightning's logger counts steps under this name.
STEP = "trainer/global_step"

# W&B makes a section of panels of each.
SECTIONS = (
    "grad_norm",
    "grad_time",
    "grad_depth",
    "update_ratio",
    "gradguard",
    "grad_maps",
    "grad_histograms",
)

# The worst says more of a run than the last, which stays beside it where it can go back.
_SUMMARIES = {
    "grad_norm/total": "max,last",
    "grad_norm/total_clipped": "max,last",
    "gradguard/clip_coef": "min,last",
    "gradguard/lr_scale": "min,last",
    "gradguard/capped_tensors": "max,last",
    "gradguard/findings": "max",
    "gradguard/skipped_steps": "max",
    "gradguard/rollbacks": "max",
}


def action_key(kind: ActionKind, label: str = "") -> str:
    """Counts the actions of a kind."""
    return metric_key("gradguard", label, "actions", kind.value)


def found_key(pathology: Pathology, label: str = "") -> str:
    """How severe the worst open finding of a pathology is."""
    return metric_key("gradguard", label, "found", pathology.value)


def summaries(labels: Iterable[str] = ("",)) -> Iterator[tuple[str, str]]:
    """Keys of which the summary keeps more than the last value, and what it keeps.

    Args:
        labels: Of the optimizers, as they stand in the keys.

    Example:
        >>> dict(summaries())["grad_norm/total"]
        'max,last'
        >>> dict(summaries(["optimizer0"]))["gradguard/optimizer0/skipped_steps"]
        'max'
    """
    for label in labels:
        for key, summary in _SUMMARIES.items():
            head, tail = key.split("/")
            yield metric_key(head, label, tail), summary
        for kind in ActionKind:
            yield action_key(kind, label), "max"
        for pathology in Pathology:
            yield found_key(pathology, label), "max,last"


def define_axes(run: Any, labels: Iterable[str]) -> None:
    """Tell a W&B run how to draw and to sum up what the guard logs.

    Args:
        run: The run.
        labels: Of the optimizers.
    """
    run.define_metric(STEP)
    for section in SECTIONS:
        # No summary here: of the patterns that a key matches, W&B takes any, and Lightning's logger
        # has defined "*". Of a key that is defined by its full name, it takes that.
        run.define_metric(f"{section}/*", step_metric=STEP, step_sync=True)
    for key, summary in summaries(labels):
        run.define_metric(key, step_metric=STEP, step_sync=True, summary=summary)
