"""What the guard is doing at the moment, in one or two words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_gradguard.record.history import StepRecord

# Steps that a state looks back on: few enough to be the present, and enough not to flicker.
STATE_STEPS = 10


def guard_state(rows: Sequence[StepRecord], *, protecting: bool = True) -> str:
    """The state of one optimizer, by what matters most of its last ten steps.

    ``"skipping"`` while one of them was dropped; ``"backing off ×0.25"`` while the learning rate is
    reduced, with its factor; ``"clipping"`` and ``"capping"`` while most of them are; ``"ok"``
    otherwise. A guard that only
    observes is ``"watching"``, or ``"not finite"`` while one of the last gradient norms is NaN or
    infinite. ``"starting"`` before the first step.

    Args:
        rows: The steps, oldest first; more than ten are not looked at.
        protecting: Whether responses are on.

    Example:
        >>> calm = StepRecord(0, 0.7, 1.0, math.inf, 1.0, 0.1, 0, False, 1.0)
        >>> cut = StepRecord(1, 0.9, 8.0, 4.0, 0.5, 0.1, 0, False, 0.25)
        >>> guard_state([calm]), guard_state([calm, cut]), guard_state([calm], protecting=False)
        ('ok', 'backing off ×0.25', 'watching')
    """
    recent = rows[-STATE_STEPS:]
    if not recent:
        return "starting"
    if not protecting:
        # A step that a gradient scaler drops is part of its search for a scale.
        broken = any(not math.isfinite(row.total_norm) and not row.skipped for row in recent)
        return "not finite" if broken else "watching"
    newest = recent[-1]
    if any(row.skipped for row in recent):
        return "skipping"
    if newest.lr_scale < 1.0:
        return f"backing off ×{newest.lr_scale:.2g}"
    if 2 * sum(row.clip_coef < 1.0 for row in recent) > len(recent):
        return "clipping"
    if 2 * sum(row.capped_tensors > 0 for row in recent) > len(recent):
        return "capping"
    return "ok"
