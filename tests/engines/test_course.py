"""What detectors are told of the run around them: how long it is planned, and when it turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import Tensor, nn

from lightning_gradguard import GradGuard
from tests.engines.witnesses import WitnessedGuard, WitnessedMonitor, serious
from tests.models import (
    INPUTS,
    Regression,
    adamw,
    fused_adamw,
    loader,
    make_batches,
    quiet_trainer,
)

ADAMS = pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)


# ---- what is known of the run -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "planned"),
    [
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"max_epochs": 2, "max_steps": 7}, 7),
        ({"max_epochs": 1, "max_steps": 70}, 10),
        ({"max_epochs": 3}, 30),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 9),
        ({"max_epochs": 2, "limit_train_batches": 5}, 10),
        ({"max_epochs": -1, "max_steps": -1, "max_time": {"seconds": 1}}, None),
    ],
)
def test_planned_steps_reach_the_detectors(
    tmp_path: Path, settings: dict[str, Any], planned: int | None
) -> None:
    monitor = WitnessedMonitor()
    trainer = quiet_trainer(tmp_path, monitor, **settings)
    trainer.fit(Regression(), loader(make_batches(10)))
    (witness,), (engine,) = monitor.witnesses, monitor.engines
    assert engine._pipeline.model.planned_steps == planned
    assert {o.model.planned_steps for o in witness.observations} == {planned}
    if planned is not None:
        assert len(witness.observations) == planned


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", ["monitor", "guard", "observing guard"])
def test_precision_and_protection_reach_the_detectors(
    tmp_path: Path, precision: Any, kind: str
) -> None:
    callback = {
        "monitor": WitnessedMonitor,
        "guard": WitnessedGuard,
        "observing guard": lambda: WitnessedGuard(mode="observe"),
    }[kind]()
    trainer = quiet_trainer(tmp_path, callback, precision=precision)
    trainer.fit(Regression(), loader(make_batches(2)))
    (engine,) = callback.engines
    facts = engine._pipeline.model
    assert (facts.precision, facts.guarded) == (precision, kind == "guard")
    assert (facts.optimizer, facts.lr) == ("AdamW", 1e-2)
    assert facts.kinds["head"] == "linear"
    assert all(o.model == facts for o in callback.witnesses[0].observations)


# ---- schedules ----------------------------------------------------------------------------------

STEPS = 60


class Scheduled(Regression):
    def __init__(self, schedule: str, make_optimizer: Any = adamw) -> None:
        super().__init__(make_optimizer)
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        schedules = torch.optim.lr_scheduler
        lowest, half = {"start_factor": 1 / STEPS, "total_iters": STEPS}, STEPS // 2
        schedule = {
            "steps": lambda: schedules.StepLR(optimizer, 20, gamma=0.1),
            "cosine": lambda: schedules.CosineAnnealingLR(optimizer, STEPS),
            "restarts": lambda: schedules.CosineAnnealingWarmRestarts(optimizer, 25),
            "linear warm-up": lambda: schedules.LinearLR(optimizer, **lowest),
            "linear decay": lambda: schedules.LinearLR(optimizer, 1.0, 0.0, STEPS),
            "one cycle": lambda: schedules.OneCycleLR(optimizer, 1e-2, STEPS),
            "polynomial": lambda: schedules.PolynomialLR(optimizer, STEPS, power=2.0),
            "warm-up, cosine": lambda: schedules.SequentialLR(
                optimizer,
                [
                    schedules.LinearLR(optimizer, 1 / half, total_iters=half),
                    schedules.CosineAnnealingLR(optimizer, half),
                ],
                [half],
            ),
        }[self.schedule]()
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@ADAMS
@pytest.mark.parametrize(
    ("schedule", "turns"),
    [
        ("steps", [20, 40]),
        ("restarts", [25, 50]),
        ("cosine", []),
        ("linear warm-up", []),
        ("linear decay", []),
        ("one cycle", []),
        ("polynomial", []),
        ("warm-up, cosine", []),
    ],
)
def test_a_schedule_turns_where_it_jumps(
    tmp_path: Path, make_optimizer: Any, schedule: str, turns: list[int]
) -> None:
    guard = WitnessedGuard()
    trainer = quiet_trainer(tmp_path, guard)
    trainer.fit(Scheduled(schedule, make_optimizer), loader(make_batches(STEPS)))
    assert guard.witnesses[0].new_phases == turns


def test_what_the_guard_does_to_the_rate_is_no_turn(tmp_path: Path) -> None:
    """It backs off for a step, and the schedule's own value is back before the next."""
    batches = make_batches(120)
    for number in range(60, 120):
        inputs, targets = batches[number]
        batches[number] = inputs, targets * 1.3 ** (number - 60)
    guard = WitnessedGuard(clip=None, cap=None, rollback=None)
    quiet_trainer(tmp_path, guard).fit(Regression(), loader(batches))
    assert any(row.lr_scale < 1.0 for row in guard.history)
    assert guard.witnesses[0].new_phases == []


# ---- unfreezing ---------------------------------------------------------------------------------


class Transfer(Regression):
    """A backbone and a head, of which an optimizer first gets what is to be trained."""

    def __init__(self, make_optimizer: Any = adamw) -> None:
        super().__init__(make_optimizer)
        self.backbone = nn.Sequential(nn.Linear(INPUTS, 16), nn.LayerNorm(16), nn.Tanh())
        del self.body

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.backbone(inputs))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(p for p in self.parameters() if p.requires_grad)


class UnfreezeBackbone(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=1e-3)


class InPlace(BaseFinetuning):
    """The optimizer has had the frozen parameters from the start."""

    def freeze_before_training(self, pl_module: Any) -> None:
        pass

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.make_trainable(pl_module.backbone)


FINETUNING = {
    "lightning's own": lambda: BackboneFinetuning(
        2, lambda _: 1.0, backbone_initial_ratio_lr=0.1, should_align=False, verbose=False
    ),
    "a new group": UnfreezeBackbone,
    "in place": InPlace,
}


@ADAMS
@pytest.mark.parametrize("name", FINETUNING)
@pytest.mark.parametrize("order", [1, -1], ids=["guard last", "guard first"])
def test_unfreezing_is_a_turn_and_no_trouble(
    tmp_path: Path, name: str, make_optimizer: Any, order: int
) -> None:
    guard = WitnessedGuard()
    callbacks = [FINETUNING[name](), guard][::order]
    trainer = quiet_trainer(tmp_path, *callbacks, max_epochs=6)
    model = Transfer(make_optimizer)
    before = model.backbone[0].weight.detach().clone()
    trainer.fit(model, loader(make_batches(40)))
    (witness,) = guard.witnesses
    assert witness.new_phases == [80], witness.new_phases
    assert [str(f.message) for f in serious(guard.findings)] == []
    last = {r.name: r for r in witness.inspections[-1].parameters}["backbone.0.weight"]
    assert (last.requires_grad, last.in_optimizer) == (True, True)
    assert last.update_ratio > 0.0
    assert not torch.equal(model.backbone[0].weight, before)


def test_a_frozen_backbone_is_noted_and_healed_once_it_trains(tmp_path: Path) -> None:
    guard = GradGuard()
    trainer = quiet_trainer(tmp_path, UnfreezeBackbone(), guard, max_epochs=8)
    trainer.fit(Transfer(), loader(make_batches(40)))
    frozen = [f for f in guard.findings if "frozen" in f.evidence]
    assert [(f.where, f.until is not None) for f in frozen] == [("backbone", True)]


def test_the_batches_are_a_task_that_can_be_learned(tmp_path: Path) -> None:
    """Or no finding would be missed."""
    guard = GradGuard()
    quiet_trainer(tmp_path, guard, max_epochs=6).fit(Transfer(), loader(make_batches(40)))
    losses = [row.loss for row in guard.history]
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])  # type: ignore[arg-type]
