"""Made-up runs of any size, for what is drawn and written of them."""

from __future__ import annotations

import numpy as np

from lightning_gradguard.diagnose import Finding, Pathology, Remedy, Severity
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.record.run_history import (
    LayerMatrix,
    OptimizerHistory,
    RunHistory,
    RunInfo,
)
from lightning_gradguard.respond.actions import Action, ActionKind

VANISHING = Finding(
    Pathology.VANISHING_IN_TIME,
    Severity.WARNING,
    "encoder.rnn",
    120,
    {"half_life": 1.6, "timesteps": 200.0},
    "The gradient vanishes through time in encoder.rnn: it halves every 1.6 steps, the sequence "
    "has 200; to mend it, use an LSTM.",
    (Remedy("Use an LSTM.", "self.rnn = nn.LSTM(64, 128)", "tanh RNN to LSTM"),),
    since=90,
)


def made_up_run(
    steps: int = 400, layers: int = 6, *, every: int = 10, label: str = "", seed: int = 0
) -> RunHistory:
    """A run whose loss falls, with a spike, two actions and two findings."""
    noise = np.random.default_rng(seed)
    step = np.arange(steps, dtype=np.float64)
    norm = np.exp(noise.normal(0.0, 0.3, steps) - step / steps)
    norm[steps // 2] *= 1000.0
    limit = np.full(steps, 10.0)
    limit[: steps // 20] = np.inf
    skipped = (step == steps // 2).astype(np.float64)
    columns = {
        "step": step,
        "loss": 2.3 * np.exp(-3.0 * step / steps) + noise.normal(0.0, 0.02, steps),
        "total_norm": norm,
        "clip_threshold": limit,
        "clip_coef": np.where(skipped > 0, 0.0, np.minimum(1.0, limit / norm)),
        "max_ratio": np.full(steps, 0.1),
        "capped_tensors": (step < 5).astype(np.float64),
        "skipped": skipped,
        "lr_scale": np.where(step < steps // 2, 1.0, 0.25),
    }
    looked = step[::every]
    names = tuple(f"blocks.{number}.linear" for number in range(layers))
    norms = np.exp(noise.normal(0.0, 0.2, (len(looked), layers)) - 0.3 * np.arange(layers))
    profile = np.exp(-0.43 * np.arange(200.0)[::-1])
    times = tuple(
        TimeReading(
            "encoder.rnn",
            "l0",
            "exact",
            "tanh",
            timesteps=200,
            sequences=32,
            decay_rate=-0.43,
            decay_error=0.02,
            steps=199,
            recency=0.99,
            profile=tuple(float(v) for v in profile * (1.0 + at / max(steps, 1))),
            step=int(at),
        )
        for at in looked[:: max(1, len(looked) // 20)]
    )
    spike = Finding(
        Pathology.EXPLODING,
        Severity.CRITICAL,
        "model",
        steps // 2,
        {"z": 31.0, "norm": float(norm[steps // 2])},
        "The gradient norm is 1,000 times its usual level.",
        (Remedy("Let the guard drop such steps.", "Trainer(callbacks=[GradGuard()])"),),
        until=steps // 2 + 5,
    )
    actions = (
        Action(ActionKind.SKIP, steps // 2, "Step dropped: its gradient is far out.", {"z": 31.0}),
        Action(ActionKind.BACK_OFF, steps // 2 + 1, "Learning rate cut to a quarter.", {}),
    )
    counts = {
        "steps": steps,
        "skipped_steps": 1,
        "clipped_steps": int((norm > limit).sum()) - 1,
        "capped_steps": 5,
        "findings": 2,
        "rollbacks": 0,
    }
    part = OptimizerHistory(
        label=label,
        steps=columns,
        layers=LayerMatrix(names, looked, norms),
        updates=LayerMatrix(names, looked[::5], norms[::5] * 1e-3),
        times=times,
        findings=(VANISHING, spike),
        actions=actions,
        counts=counts,
    )
    info = RunInfo(
        name="lightning_logs/version_0",
        model="project.models.Encoder",
        parameters=123_456,
        status="finished",
        started="2026-01-02T03:04:05+00:00",
        updated="2026-01-02T03:14:05+00:00",
        planned_steps=steps,
        settings={"mode": "protect", "clip": "AdaptiveClip(...)", "layer_depth": None},
        versions={"lightning_gradguard": "0.1.0", "torch": "2.13.0"},
        optimizers=(
            {"label": label, "class": "AdamW", "lr": 1e-3, "mode": "protect", "counts": counts},
        ),
    )
    return RunHistory(info, (part,))
