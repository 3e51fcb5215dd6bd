"""Numbers in, findings out: plain floats, no hooks, no torch.

A finding is a symptom that is scale-free and beyond its confidence bound, that persists, and that
comes with functional evidence: the loss is no better than early in training, or getting worse. A
symptom alone is only `Severity.INFO`.
"""

from __future__ import annotations

from lightning_gradguard.diagnose.baseline import RobustBaseline, log_norm
from lightning_gradguard.diagnose.divergence import DivergingDetector
from lightning_gradguard.diagnose.explosion import ExplodingDetector
from lightning_gradguard.diagnose.findings import (
    Detector,
    Finding,
    Observation,
    Pathology,
    Remedy,
    Severity,
)
from lightning_gradguard.diagnose.non_finite import NonFiniteDetector
from lightning_gradguard.diagnose.spike import LossSpikeDetector
from lightning_gradguard.diagnose.thresholds import Thresholds

__all__ = [
    "Detector",
    "DivergingDetector",
    "ExplodingDetector",
    "Finding",
    "LossSpikeDetector",
    "NonFiniteDetector",
    "Observation",
    "Pathology",
    "Remedy",
    "RobustBaseline",
    "Severity",
    "Thresholds",
    "default_detectors",
    "log_norm",
]


def default_detectors(thresholds: Thresholds | None = None) -> list[Detector]:
    """Returns one new detector per pathology, in the order in which findings should be read.

    Args:
        thresholds: The numbers they use; `Thresholds()` if not given.

    Example:
        >>> detectors = default_detectors()
        >>> step = Observation(step=0, loss=float("nan"), total_norm=1.0)
        >>> [f.pathology.value for d in detectors for f in d.observe(step)]
        ['non_finite']
    """
    thresholds = thresholds or Thresholds()
    return [
        NonFiniteDetector(thresholds),
        ExplodingDetector(thresholds),
        LossSpikeDetector(thresholds),
        DivergingDetector(thresholds),
    ]
