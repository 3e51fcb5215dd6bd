"""Lightning's automatic optimization: what is measured and done is what a plain loop computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_gradguard import GradGuard, Pathology
from lightning_gradguard.measure.updates import RMS_FLOOR
from lightning_gradguard.respond import (
    ActionKind,
    AdaptiveClip,
    LearningRateBackoff,
    SkipBadSteps,
)
from tests.models import (
    NORM_TOLERANCE,
    Regression,
    adamw,
    assert_same_bits,
    assert_untouched,
    fixed_cap,
    fused_adamw,
    fused_sgd,
    guard_without,
    loader,
    make_batches,
    plain_loop,
    quiet_trainer,
    sgd,
)

OPTIMIZERS = pytest.mark.parametrize(
    "make_optimizer", [adamw, fused_adamw, sgd, fused_sgd], ids=lambda f: f.__name__
)


def history_matches(guard: GradGuard, norms: list[float], losses: list[float]) -> None:
    history = guard.history
    assert [row.step for row in history] == list(range(len(norms)))
    assert [row.total_norm for row in history] == pytest.approx(norms, rel=NORM_TOLERANCE)
    assert [row.loss for row in history] == pytest.approx(losses, rel=1e-6)


@OPTIMIZERS
def test_fp32_norms_and_weights(tmp_path: Path, make_optimizer: Any) -> None:
    batches = make_batches(12)
    guard, model = guard_without(skip=SkipBadSteps()), Regression(make_optimizer)
    quiet_trainer(tmp_path, guard).fit(model, loader(batches))
    plain = Regression(make_optimizer)
    run = plain_loop(plain, batches)
    history_matches(guard, run.norms, run.losses)
    assert_same_bits(model.state_dict(), plain.state_dict())


@OPTIMIZERS
def test_bf16_mixed_norms_and_weights(tmp_path: Path, make_optimizer: Any) -> None:
    batches = make_batches(12)
    guard, model = guard_without(skip=SkipBadSteps()), Regression(make_optimizer)
    quiet_trainer(tmp_path, guard, precision="bf16-mixed").fit(model, loader(batches))
    plain = Regression(make_optimizer)
    run = plain_loop(plain, batches, autocast=torch.bfloat16)
    history_matches(guard, run.norms, run.losses)
    assert_same_bits(model.state_dict(), plain.state_dict())


@OPTIMIZERS
@pytest.mark.parametrize("count", [12, 11], ids=["whole windows", "last window cut short"])
def test_accumulate_grad_batches(tmp_path: Path, make_optimizer: Any, count: int) -> None:
    batches = make_batches(count, poisoned=(4,))  # in the second micro-batch of step 1
    guard, model = guard_without(skip=SkipBadSteps()), Regression(make_optimizer)
    trainer = quiet_trainer(tmp_path, guard, accumulate_grad_batches=3)
    trainer.fit(model, loader(batches))
    plain = Regression(make_optimizer)
    run = plain_loop(plain, batches, accumulate=3, omit={1})
    assert [row.skipped for row in guard.history] == [False, True, False, False]
    assert math.isnan(guard.history[1].total_norm)
    finite = [i for i in range(4) if i != 1]
    assert [guard.history[i].total_norm for i in finite] == pytest.approx(
        [run.norms[i] for i in finite], rel=NORM_TOLERANCE
    )
    assert [guard.history[i].loss for i in finite] == pytest.approx(
        [run.losses[i] for i in finite], rel=1e-6
    )
    assert_same_bits(model.state_dict(), plain.state_dict())


@OPTIMIZERS
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_nan_step_is_as_if_it_was_never_taken(
    tmp_path: Path, make_optimizer: Any, precision: Any
) -> None:
    batches = make_batches(10, poisoned=(0, 4, 5))
    guard, model = guard_without(skip=SkipBadSteps()), Regression(make_optimizer)
    trainer = quiet_trainer(tmp_path, guard, precision=precision)
    trainer.fit(model, loader(batches))
    plain = Regression(make_optimizer)
    autocast = torch.bfloat16 if precision == "bf16-mixed" else None
    run = plain_loop(plain, batches, omit={0, 4, 5}, autocast=autocast)
    assert_same_bits(model.state_dict(), plain.state_dict())
    assert_same_bits(trainer.optimizers[0].state_dict(), run.optimizer.state_dict())
    assert [row.step for row in guard.history if row.skipped] == [0, 4, 5]
    assert guard.counts["skipped_steps"] == 3
    assert [a.step for a in guard.actions if a.kind is ActionKind.SKIP] == [0, 4, 5]
    assert guard.findings[0].pathology is Pathology.NON_FINITE
    assert_untouched(trainer.optimizers[0], plain.configure_optimizers().param_groups[0]["lr"])


@OPTIMIZERS
def test_without_skipping_a_nan_goes_through(tmp_path: Path, make_optimizer: Any) -> None:
    guard, model = guard_without(), Regression(make_optimizer)
    quiet_trainer(tmp_path, guard).fit(model, loader(make_batches(4, poisoned=(2,))))
    assert model.head.weight.isnan().all()


@OPTIMIZERS
def test_clipping_only(tmp_path: Path, make_optimizer: Any) -> None:
    batches = make_batches(60)
    guard = guard_without(clip=AdaptiveClip(multiple=0.5))
    model = Regression(make_optimizer)
    quiet_trainer(tmp_path, guard).fit(model, loader(batches))
    plain = Regression(make_optimizer)
    thresholds = [row.clip_threshold for row in guard.history]

    def clip(step: int, norm: float) -> None:
        for parameter in plain.parameters():
            parameter.grad *= min(1.0, thresholds[step] / norm)

    run = plain_loop(plain, batches, before_update=clip)
    assert sum(row.clip_coef < 1.0 for row in guard.history) > 20
    # The two runs round differently and drift apart from step to step.
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()))
    norms = [row.total_norm for row in guard.history]
    assert norms == pytest.approx(run.norms, rel=1e-4)
    # Half of a median of the run's own norms, whichever of them the baseline still holds.
    for step in range(20, 60):
        assert 0.5 * min(norms[:step]) <= thresholds[step] <= 0.5 * max(norms[:step])


class UpdateRatios(Callback):
    """Measures ‖ΔW‖ / max(‖W‖, floor·√numel) of each tensor by its definition."""

    def __init__(self) -> None:
        self.largest: list[float] = []
        self._before: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pairs = zip(pl_module.parameters(), self._before, strict=True)
        self.largest.append(
            max(
                ((new.detach() - old).norm() / max(old.norm(), floor_of(old))).item()
                for new, old in pairs
            )
        )


def floor_of(tensor: torch.Tensor) -> float:
    return RMS_FLOOR * math.sqrt(tensor.numel())


@OPTIMIZERS
def test_capping_bounds_every_update(tmp_path: Path, make_optimizer: Any) -> None:
    batches = make_batches(40)
    free = UpdateRatios()
    quiet_trainer(tmp_path, free).fit(Regression(make_optimizer), loader(batches))
    assert max(free.largest) > 0.02, "the cap has nothing to do"
    guard, held = guard_without(cap=fixed_cap(0.002)), UpdateRatios()
    quiet_trainer(tmp_path, guard, held).fit(Regression(make_optimizer), loader(batches))
    # For SGD the norms of the weights may be up to 16 steps old, each at most 0.2 % more.
    assert max(held.largest) <= 0.002 * 1.002**16
    assert sum(row.capped_tensors > 0 for row in guard.history) > 10


@OPTIMIZERS
def test_a_cap_that_does_not_bind_changes_nothing(tmp_path: Path, make_optimizer: Any) -> None:
    batches = make_batches(40)
    guard = guard_without(cap=fixed_cap(100.0))
    model, plain = Regression(make_optimizer), Regression(make_optimizer)
    quiet_trainer(tmp_path, guard).fit(model, loader(batches))
    plain_loop(plain, batches)
    assert_same_bits(model.state_dict(), plain.state_dict())
    assert {row.capped_tensors for row in guard.history} == {0}


def rprop(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Rprop(parameters, lr=1e-2)


def adadelta(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adadelta(parameters, lr=1.0)


@pytest.mark.parametrize("make_optimizer", [rprop, adadelta], ids=lambda f: f.__name__)
def test_capping_only(tmp_path: Path, make_optimizer: Any) -> None:
    """Of an optimizer that is neither SGD nor of Adam's kind, the real update is shrunk."""
    batches = make_batches(15)
    guard = guard_without(cap=fixed_cap(0.002))
    model = Regression(make_optimizer)
    quiet_trainer(tmp_path, guard).fit(model, loader(batches))
    plain = Regression(make_optimizer)
    capped: list[int] = []

    def capped_update(optimizer: torch.optim.Optimizer) -> None:
        before = [p.detach().clone() for p in plain.parameters()]
        optimizer.step()
        capped.append(0)
        for parameter, old in zip(plain.parameters(), before, strict=True):
            change = parameter.detach() - old
            limit = 0.002 * max(old.norm().item(), floor_of(old))
            if change.norm() > limit:
                parameter.data = old + change * (limit / change.norm())
                capped[-1] += 1

    run = plain_loop(plain, batches, update=capped_update)
    assert sum(capped) > 10
    assert [row.capped_tensors for row in guard.history] == capped
    assert [row.total_norm for row in guard.history] == pytest.approx(run.norms, rel=1e-4)
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()))


@OPTIMIZERS
def test_a_cut_rate_is_what_the_optimizer_uses_and_the_schedule_never_sees(
    tmp_path: Path, make_optimizer: Any
) -> None:
    """The targets grow for a while; the plain loop uses the factors that the guard recorded."""
    batches = [
        (inputs, targets * (30.0 if 60 <= step < 120 else 1.0))
        for step, (inputs, targets) in enumerate(make_batches(160))
    ]

    class Scheduled(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = self.make_optimizer(self.parameters())
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    backoff = LearningRateBackoff(factor=0.5, cooldown_steps=5, recovery_steps=10)
    guard, model = guard_without(backoff=backoff), Scheduled(make_optimizer)
    trainer = quiet_trainer(tmp_path, guard)
    trainer.fit(model, loader(batches))
    scales = [row.lr_scale for row in guard.history]
    assert min(scales) < 1.0, "nothing was cut"
    plain = Regression(make_optimizer)
    optimizer = plain.configure_optimizers()
    plain.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    (group,) = optimizer.param_groups
    rates = [group["lr"]]

    def scaled_update(_: torch.optim.Optimizer) -> None:
        group["lr"] = rates[-1] * scales[len(rates) - 1]
        optimizer.step()
        rates.append(rates[-1] * 0.99)

    plain_loop(plain, batches, update=scaled_update)
    assert_same_bits(model.state_dict(), plain.state_dict())
    assert trainer.optimizers[0].param_groups[0]["lr"] == rates[-1]


# -- fp16 with a scaler ---------------------------------------------------------------------------


def fit_with_scaler(root: Path, device: str, make_optimizer: Any) -> tuple[GradGuard, Regression]:
    """The first scale is far too large, so that the scaler itself drops the first steps."""
    scaler = torch.amp.GradScaler(device, init_scale=2.0**20)
    guard = guard_without(skip=SkipBadSteps())
    model = Regression(make_optimizer)
    trainer = quiet_trainer(
        root,
        guard,
        accelerator=device,
        plugins=[MixedPrecision("16-mixed", device, scaler=scaler)],
    )
    trainer.fit(model, loader(make_batches(20, poisoned=(15,))))
    assert_untouched(trainer.optimizers[0], trainer.optimizers[0].param_groups[0]["lr"])
    return guard, model


def plain_scaled_loop(device: str, make_optimizer: Any) -> tuple[Regression, list[float]]:
    scaler = torch.amp.GradScaler(device, init_scale=2.0**20)
    model = Regression(make_optimizer).to(device)
    optimizer = model.configure_optimizers()
    norms = []
    for batch in make_batches(20, poisoned=(15,)):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = model.loss((batch[0].to(device), batch[1].to(device)))
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        norms.append((grads.double() / scale).norm().item())
        scaler.step(optimizer)
        scaler.update()
    return model, norms


def check_scaler(root: Path, device: str, make_optimizer: Any) -> None:
    guard, model = fit_with_scaler(root, device, make_optimizer)
    plain, norms = plain_scaled_loop(device, make_optimizer)
    dropped = [step for step, norm in enumerate(norms) if not math.isfinite(norm)]
    assert 0 in dropped, "the scaler dropped nothing: the scale was not too large"
    assert 15 in dropped
    assert len(dropped) < 10
    assert [row.step for row in guard.history if row.skipped] == dropped
    kept = [step for step in range(20) if step not in dropped]
    assert [guard.history[step].total_norm for step in kept] == pytest.approx(
        [norms[step] for step in kept], rel=1e-4
    )
    # No finding for the scaler's own search, and none is due to the guard's arithmetic.
    assert not [f for f in guard.findings if f.step in dropped and f.step != 15]
    assert_same_bits(model.cpu().state_dict(), plain.cpu().state_dict())


# Not fused SGD with momentum: where the very first steps are dropped, torch's own scaler leaves its
# momentum uninitialized, with or without a guard.
SCALED = pytest.mark.parametrize(
    "make_optimizer", [adamw, fused_adamw, sgd], ids=lambda f: f.__name__
)


@SCALED
def test_fp16_with_a_scaler_on_the_cpu(tmp_path: Path, make_optimizer: Any) -> None:
    check_scaler(tmp_path, "cpu", make_optimizer)


@pytest.mark.gpu
@SCALED
def test_fp16_with_a_scaler(tmp_path: Path, make_optimizer: Any) -> None:
    check_scaler(tmp_path, "cuda", make_optimizer)


@pytest.mark.gpu
@SCALED
def test_fp16_clipping_acts_on_the_unscaled_norm(tmp_path: Path, make_optimizer: Any) -> None:
    """A scaler may not change what is clipped: the thresholds are in units of the gradient."""
    guards = []
    for precision in ("16-mixed", "32-true"):
        guard = guard_without(clip=AdaptiveClip(multiple=0.5))
        model = Regression(make_optimizer)
        trainer = quiet_trainer(tmp_path, guard, accelerator="cuda", precision=precision)
        trainer.fit(model, loader(make_batches(60)))
        guards.append(guard)
    half, single = ([row for row in g.history if not row.skipped] for g in guards)
    assert sum(row.clip_coef < 1.0 for row in half) > 20
    assert half[-1].clip_threshold == pytest.approx(single[-1].clip_threshold, rel=0.2)
