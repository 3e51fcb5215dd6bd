"""A back-off multiplies the schedule's own rate, and no schedule in a Trainer ever notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from lightning_gradguard import GradGuard
from lightning_gradguard.respond import ActionKind, LearningRateBackoff
from tests.models import (
    Batch,
    Regression,
    assert_same_bits,
    guard_without,
    loader,
    make_batches,
    quiet_trainer,
)

STEPS, WORSE_FROM = 70, 40
RATE = 2e-3
BACKOFF = LearningRateBackoff(factor=0.3, cooldown_steps=5, recovery_steps=12)


def two_groups(kind: Callable[..., Optimizer], model: Any, rate: Any, **more: Any) -> Optimizer:
    head = {"params": list(model.head.parameters()), "lr": rate / 4}
    return kind([{"params": list(model.body.parameters())}, head], lr=rate, **more)


def sgd(model: Any) -> Optimizer:
    return two_groups(SGD, model, RATE, momentum=0.5)


def tensor_adam(model: Any) -> Optimizer:
    return two_groups(Adam, model, torch.tensor(RATE), fused=True)


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: StepLR(o, 10, gamma=0.7),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, STEPS),
    "OneCycleLR": lambda o: OneCycleLR(o, [RATE, RATE], total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, factor=0.9, patience=3),
    "LambdaLR": lambda o: LambdaLR(o, [lambda t: 0.98**t, lambda t: 1 / (1 + t)]),
}


class Scheduled(Regression):
    """Its loss is much larger from some step on; a plateau is told of another value."""

    def __init__(self, make: Callable[[Any], Optimizer], schedule: str, interval: str) -> None:
        super().__init__()
        self.make, self.schedule, self.interval = make, schedule, interval

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.log("given", float(self.global_step % 9))
        return self.loss(batch) * (200.0 if batch_idx >= WORSE_FROM else 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self)
        config = {
            "scheduler": SCHEDULES[self.schedule](optimizer),
            "interval": self.interval,
            "monitor": "given",
        }
        return [optimizer], [config]


class Watch(Callback):
    """What a schedule, a monitor of rates and a checkpoint find between two steps."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.factors: list[float] = []
        self._weights: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        state = trainer.lr_scheduler_configs[0].scheduler.state_dict()
        rates = [float(group["lr"]) for group in groups]
        knobs = [(group.get("momentum"), group.get("betas")) for group in groups]
        self.found.append([rates, knobs, [float(rate) for rate in state["_last_lr"]]])
        self._weights = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """How far SGD has moved, in units of the rate that the schedule had set before."""
        optimizer, rates = trainer.optimizers[0], self.found[-1][0]
        if not isinstance(optimizer, SGD):
            return
        for rate, group in zip(rates, optimizer.param_groups, strict=True):
            for p in group["params"]:
                before = next(
                    w for w, q in zip(self._weights, pl_module.parameters(), strict=True) if q is p
                )
                update = optimizer.state[p]["momentum_buffer"]
                self.factors.append(((before - p.detach()).norm() / update.norm() / rate).item())


def train(root: Path, model: Scheduled, *callbacks: Callback) -> tuple[Watch, CSVLogger]:
    watch, logger = Watch(), CSVLogger(root)
    trainer = quiet_trainer(root, *callbacks, watch, logger=logger, log_every_n_steps=1)
    trainer.fit(model, loader(make_batches(STEPS)))
    return watch, logger


def columns(logger: CSVLogger, name: str) -> list[float]:
    lines = (Path(logger.log_dir) / "metrics.csv").read_text(encoding="utf-8").splitlines()
    at = lines[0].split(",").index(name)
    values = [line.split(",")[at] for line in lines[1:]]
    return [float(value) for value in values if value]


@pytest.mark.parametrize("make", [sgd, tensor_adam], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_as_without_the_guard(tmp_path: Path, name: str, make: Any) -> None:
    guard: GradGuard = guard_without(backoff=BACKOFF)
    watch, logger = train(tmp_path / "guarded", Scheduled(make, name, "step"), guard)
    plain, _ = train(tmp_path / "plain", Scheduled(make, name, "step"))
    kinds = {action.kind for action in guard.actions}
    assert kinds == {ActionKind.BACK_OFF, ActionKind.RECOVER}
    assert_same_bits(watch.found, plain.found)
    assert len({tuple(rates) for rates, *_ in plain.found}) > 3, "the schedule did nothing"
    scales = [row.lr_scale for row in guard.history]
    assert min(scales) <= BACKOFF.factor
    logged = columns(logger, "gradguard/lr_scale")
    if make is sgd:
        assert logged == pytest.approx(scales)
        expected = [scale for scale in scales for _ in range(4)]
        assert watch.factors == pytest.approx(expected, rel=1e-2)
    else:  # what is logged is the last step that is known
        assert logged == pytest.approx(scales[: len(logged)])
        assert len(logged) == STEPS - 2
