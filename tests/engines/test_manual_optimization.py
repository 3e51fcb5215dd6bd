"""Manual optimization: one optimizer, and two that step alternately (a GAN)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_gradguard import GradGuard
from lightning_gradguard.respond import AdaptiveClip, SkipBadSteps
from tests.models import (
    INPUTS,
    NORM_TOLERANCE,
    Batch,
    Regression,
    adamw,
    assert_same_bits,
    fused_adamw,
    guard_without,
    loader,
    make_batches,
    plain_loop,
    quiet_trainer,
    total_norm,
)

# The discriminator's loss is this much larger: norms of one can never pass for the other's.
FACTOR = 1e4


class Manual(Regression):
    """Clips by itself and accumulates two batches, as manual loops do."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2 == 1:
            self.clip_gradients(optimizer, gradient_clip_val=5.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)
def test_manual_optimization(tmp_path: Path, make_optimizer: Any) -> None:
    batches = make_batches(20, poisoned=(9,))
    guard, model = guard_without(skip=SkipBadSteps()), Manual(make_optimizer)
    quiet_trainer(tmp_path, guard).fit(model, loader(batches))
    plain = Regression(make_optimizer)
    after_own_clipping = []

    def clip(step: int, norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 5.0)
        after_own_clipping.append(total_norm(plain.parameters()))

    run = plain_loop(plain, batches, accumulate=2, before_update=clip, omit={4})
    after_own_clipping.insert(4, math.nan)
    assert max(run.norms[:4]) > 5.0, "the user's own clipping had nothing to do"
    assert [row.total_norm for row in guard.history] == pytest.approx(
        after_own_clipping, rel=NORM_TOLERANCE, nan_ok=True
    )
    assert [row.loss for row in guard.history] == pytest.approx(run.losses, rel=1e-6, nan_ok=True)
    assert [row.step for row in guard.history if row.skipped] == [4]
    assert_same_bits(model.state_dict(), plain.state_dict())


class Gan(LightningModule):
    """A generator and a discriminator; each backward pass leaves gradients on the other's weights.

    Args:
        make_optimizer: Used for both.
        poisoned: Batches on which the discriminator's loss is NaN.
    """

    def __init__(self, make_optimizer: Any = adamw, poisoned: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, INPUTS))
            self.discriminator = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, 1))
        self.make_optimizer = make_optimizer
        self.poisoned = poisoned

    def configure_optimizers(self) -> Any:
        generator = self.make_optimizer(self.generator.parameters())
        return generator, self.make_optimizer(self.discriminator.parameters())

    def generator_loss(self, real: Tensor) -> Tensor:
        fake = self.generator(real[:, :2])
        return nn.functional.softplus(-self.discriminator(fake)).mean()

    def discriminator_loss(self, real: Tensor, batch_idx: int) -> Tensor:
        fake = self.generator(real[:, :2])
        on_real = nn.functional.softplus(-self.discriminator(real)).mean()
        loss = FACTOR * (on_real + nn.functional.softplus(self.discriminator(fake)).mean())
        return loss * math.nan if batch_idx in self.poisoned else loss

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        real = batch[0]
        generator.zero_grad()
        self.manual_backward(self.generator_loss(real))
        generator.step()
        for _ in range(2):  # the discriminator steps twice as often
            discriminator.zero_grad()
            self.manual_backward(self.discriminator_loss(real, batch_idx))
            discriminator.step()


def plain_gan(batches: list[Batch], poisoned: tuple[int, ...], make_optimizer: Any) -> Any:
    """The same loop by hand; updates from a NaN are left out."""
    model = Gan(make_optimizer, poisoned)
    generator, discriminator = model.configure_optimizers()
    seen: tuple[list[Any], list[Any]] = ([], [])
    for number, (real, _) in enumerate(batches):
        generator.zero_grad()
        loss = model.generator_loss(real)
        loss.backward()
        seen[0].append((loss.item(), total_norm(model.generator.parameters())))
        generator.step()
        for _ in range(2):
            discriminator.zero_grad()
            loss = model.discriminator_loss(real, number)
            loss.backward()
            seen[1].append((loss.item(), total_norm(model.discriminator.parameters())))
            if math.isfinite(seen[1][-1][1]):
                discriminator.step()
    return model, seen, (generator, discriminator)


@pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)
def test_two_optimizers_stepping_alternately(tmp_path: Path, make_optimizer: Any) -> None:
    batches, poisoned = make_batches(12), (0, 5)
    guard, model = guard_without(skip=SkipBadSteps()), Gan(make_optimizer, poisoned)
    trainer = quiet_trainer(tmp_path, guard)
    trainer.fit(model, loader(batches))
    plain, seen, optimizers = plain_gan(batches, poisoned, make_optimizer)
    assert len(guard.engines) == 2
    for engine, expected in zip(guard.engines, seen, strict=True):
        losses, norms = zip(*expected, strict=True)
        history = engine.history
        assert [row.total_norm for row in history] == pytest.approx(
            norms, rel=NORM_TOLERANCE, nan_ok=True
        )
        assert [row.loss for row in history] == pytest.approx(losses, rel=1e-6, nan_ok=True)
    assert [row.step for row in guard.engines[0].history if row.skipped] == []
    assert [row.step for row in guard.engines[1].history if row.skipped] == [0, 1, 10, 11]
    assert_same_bits(model.state_dict(), plain.state_dict())
    for optimizer, same in zip(trainer.optimizers, optimizers, strict=True):
        assert_same_bits(optimizer.state_dict(), same.state_dict())


def test_each_optimizer_has_its_own_baseline(tmp_path: Path) -> None:
    """Four decades lie between the two: a shared baseline would clip one of them away."""
    guard = guard_without(clip=AdaptiveClip(multiple=1.0))
    quiet_trainer(tmp_path, guard).fit(Gan(), loader(make_batches(40)))
    for engine in guard.engines:
        norms = [row.total_norm for row in engine.history]
        thresholds = [row.clip_threshold for row in engine.history[-10:]]
        assert all(min(norms) <= threshold <= max(norms) for threshold in thresholds)
    generator, discriminator = guard.engines
    assert discriminator.history[-1].clip_threshold > 100 * generator.history[-1].clip_threshold


def test_two_optimizers_log_under_their_own_names(tmp_path: Path) -> None:
    guard = GradGuard()
    trainer = quiet_trainer(tmp_path, guard, log_every_n_steps=1)
    trainer.fit(Gan(), loader(make_batches(4)))
    for number, engine in enumerate(guard.engines):
        logged = trainer.logged_metrics[f"grad_norm/optimizer{number}/total"]
        assert logged.item() == pytest.approx(engine.history[-1].total_norm)
