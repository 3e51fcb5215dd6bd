"""A gradient scaler with a fused optimizer, whose gradients are unscaled inside the kernel only."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_gradguard.diagnose import Pathology
from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.respond import UpdateCap

SCALE = 2.0**16


def train(optimizer_class, fused, *, lr, steps=60, spike=None, guarded=True, **options):
    """A linear task under a scaler on the CPU; returns the losses and the guard."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = optimizer_class(model.parameters(), lr=lr, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=10_000)
    guard = GuardEngine(model, optimizer, **options) if guarded else None
    inputs = torch.randn(64, 8)
    targets = inputs.sum(1, keepdim=True)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean() * (1e6 if step == spike else 1.0)
        losses.append(loss.item())
        scaler.scale(loss).backward()
        if not fused:
            scaler.unscale_(optimizer)
        if guard is not None:
            guard.before_step(loss, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    return losses, guard


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_the_cap_sees_the_gradient_and_not_the_scale(optimizer_class):
    rate = 0.1 if optimizer_class is torch.optim.SGD else 0.03
    alike, guard = train(optimizer_class, fused=False, lr=rate)
    losses, fused_guard = train(optimizer_class, fused=True, lr=rate)

    assert fused_guard.active
    assert losses == pytest.approx(alike, rel=1e-3)
    norms = [[row.total_norm for row in g.history] for g in (guard, fused_guard)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    layer = fused_guard.last_norms.layers()
    assert math.hypot(*layer.values()) == pytest.approx(fused_guard.history[-1].total_norm)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_an_outlier_is_clipped_where_dropping_would_confuse_the_scaler(optimizer_class):
    losses, guard = train(optimizer_class, fused=True, lr=0.02, spike=40)

    assert guard.active
    assert guard.history[40].clip_coef < 1e-3
    assert losses[-1] < losses[39]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("bad", "found"), [(24, 0), (25, 1)])
def test_nan_that_no_scale_can_mend_is_found(fused, bad, found):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    guard = GuardEngine(model, optimizer)
    for step in range(60):
        optimizer.zero_grad()
        loss = model(torch.randn(64, 8)).square().mean()
        if step < bad:
            loss = loss * math.nan
        scaler.scale(loss).backward()
        if not fused:
            scaler.unscale_(optimizer)
        guard.before_step(loss, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()

    assert guard.active
    assert guard.counts["skipped_steps"] == bad
    findings = [f for f in guard.findings if f.pathology is Pathology.NON_FINITE]
    assert [f.step for f in findings] == [24] * found
    assert all(f.until == 25 + 15 for f in findings)


def test_what_the_cap_holds_back_is_counted():
    cap = UpdateCap(max_ratio=0.01, adaptive=False)
    counts = [
        train(torch.optim.AdamW, fused, lr=0.5, steps=20, cap=cap)[1].counts["capped_steps"]
        for fused in (False, True)
    ]

    assert counts == [20, 20]
