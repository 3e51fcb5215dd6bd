"""See, understand and survive vanishing and exploding gradients in PyTorch Lightning.

Every public name is imported on first use: ``import lightning_gradguard`` costs nothing, and the
torch-only half never loads Lightning.

Example:
    >>> from lightning_gradguard import Severity
    >>> Severity.WARNING.label
    'warning'
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gradguard._lazy import imported_on_use

if TYPE_CHECKING:
    from lightning_gradguard.callbacks import (
        AdaptiveGradientClipping,
        GradGuard,
        GradientAlert,
        GradientMonitor,
        LearningRateBackoff,
        SkipBadSteps,
        UpdateCap,
        WeightRollback,
    )
    from lightning_gradguard.diagnose import Finding, Pathology, Severity
    from lightning_gradguard.dry_run import Preflight, preflight
    from lightning_gradguard.guard import GuardEngine

__version__ = "0.1.0"

__all__ = [
    "AdaptiveGradientClipping",
    "Finding",
    "GradGuard",
    "GradientAlert",
    "GradientMonitor",
    "GuardEngine",
    "LearningRateBackoff",
    "Pathology",
    "Preflight",
    "Severity",
    "SkipBadSteps",
    "UpdateCap",
    "WeightRollback",
    "__version__",
    "preflight",
]

_CALLBACKS = "lightning_gradguard.callbacks"
_MODULE_OF = {
    "AdaptiveGradientClipping": _CALLBACKS,
    "Finding": "lightning_gradguard.diagnose",
    "GradGuard": _CALLBACKS,
    "GradientAlert": _CALLBACKS,
    "GradientMonitor": _CALLBACKS,
    "GuardEngine": "lightning_gradguard.guard",
    "LearningRateBackoff": _CALLBACKS,
    "Pathology": "lightning_gradguard.diagnose",
    "Preflight": "lightning_gradguard.dry_run",
    "Severity": "lightning_gradguard.diagnose",
    "SkipBadSteps": _CALLBACKS,
    "UpdateCap": _CALLBACKS,
    "WeightRollback": _CALLBACKS,
    "preflight": "lightning_gradguard.dry_run",
}


__getattr__ = imported_on_use(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
