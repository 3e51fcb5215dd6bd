"""Numbers in, findings out: plain floats, no hooks, no torch.

A finding is a symptom that is scale-free and beyond its confidence bound, that persists, and that
comes with functional evidence: the loss is no better than early in training, or getting worse. A
symptom alone is only `Severity.INFO`.
"""

from __future__ import annotations

from lightning_gradguard.diagnose.baseline import RobustBaseline, log_norm
from lightning_gradguard.diagnose.dead_units import DeadUnitsDetector
from lightning_gradguard.diagnose.detector import Detector, Observation, TimeDetector
from lightning_gradguard.diagnose.diagnosis import Diagnosis, by_cause
from lightning_gradguard.diagnose.divergence import DivergingDetector
from lightning_gradguard.diagnose.explosion import ExplodingDetector
from lightning_gradguard.diagnose.findings import Finding, Pathology, Remedy, Severity
from lightning_gradguard.diagnose.non_finite import NonFiniteDetector
from lightning_gradguard.diagnose.not_training import NotTrainingDetector
from lightning_gradguard.diagnose.oscillation import OscillatingDetector
from lightning_gradguard.diagnose.saturation import SaturationDetector
from lightning_gradguard.diagnose.spike import LossSpikeDetector
from lightning_gradguard.diagnose.stagnation import StagnatingDetector
from lightning_gradguard.diagnose.thresholds import Thresholds
from lightning_gradguard.diagnose.time_decay import TimeExplosionDetector, VanishingInTimeDetector
from lightning_gradguard.diagnose.underflow import UnderflowDetector
from lightning_gradguard.diagnose.update_range import UpdateRangeDetector
from lightning_gradguard.diagnose.vanishing_in_depth import VanishingInDepthDetector

__all__ = [
    "DeadUnitsDetector",
    "Detector",
    "Diagnosis",
    "DivergingDetector",
    "ExplodingDetector",
    "Finding",
    "LossSpikeDetector",
    "NonFiniteDetector",
    "NotTrainingDetector",
    "Observation",
    "OscillatingDetector",
    "Pathology",
    "Remedy",
    "RobustBaseline",
    "SaturationDetector",
    "Severity",
    "StagnatingDetector",
    "Thresholds",
    "TimeDetector",
    "TimeExplosionDetector",
    "UnderflowDetector",
    "UpdateRangeDetector",
    "VanishingInDepthDetector",
    "VanishingInTimeDetector",
    "by_cause",
    "default_detectors",
    "layer_detectors",
    "log_norm",
    "time_detectors",
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
        OscillatingDetector(thresholds),
        StagnatingDetector(thresholds),
    ]


def layer_detectors(thresholds: Thresholds | None = None) -> list[Detector]:
    """Returns the detectors of what single layers do, which judge inspections.

    They are apart from `default_detectors` because every rank sees its own activations, and because
    no response of the guard could mend what they find.

    Args:
        thresholds: The numbers they use; `Thresholds()` if not given.

    Example:
        >>> from lightning_gradguard.readings import Inspection, ParameterReading
        >>> head = ParameterReading("head.weight", in_optimizer=False, grad_norm=0.1)
        >>> detectors = layer_detectors()
        >>> steps = [Observation(s, 2.3, 1.0, inspection=Inspection(s, (head,))) for s in (0, 1)]
        >>> [(f.pathology.value, f.where) for s in steps for d in detectors for f in d.observe(s)]
        [('layer_not_training', 'head')]
    """
    thresholds = thresholds or Thresholds()
    return [
        NotTrainingDetector(thresholds),
        UnderflowDetector(thresholds),
        DeadUnitsDetector(thresholds),
        SaturationDetector(thresholds),
        VanishingInDepthDetector(thresholds),
        UpdateRangeDetector(thresholds),
    ]


def time_detectors(thresholds: Thresholds | None = None) -> list[TimeDetector]:
    """Returns the detectors of the gradient through time, in the order of their severity.

    They are apart from `default_detectors` because their findings never cause a response: every
    rank reads its own sequences, so two ranks may find different things.

    Args:
        thresholds: The numbers they use; `Thresholds()` if not given.

    Example:
        >>> from lightning_gradguard.readings import TimeReading
        >>> reading = TimeReading("rnn", "l0", "exact", "relu", timesteps=100, decay_rate=0.2,
        ...                       decay_error=0.01)
        >>> step = Observation(step=0, loss=2.3, total_norm=1.0, time=(reading,))
        >>> [(f.pathology.value, f.where) for d in time_detectors() for f in d.observe(step)]
        [('exploding', 'rnn')]
    """
    thresholds = thresholds or Thresholds()
    return [TimeExplosionDetector(thresholds), VanishingInTimeDetector(thresholds)]
