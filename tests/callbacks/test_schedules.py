"""A dropped step does not advance the learning-rate schedule; a taken one does, as without us."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard
from lightning_gradguard.respond import SkipBadSteps
from tests.models import Regression, fused_adamw, guard_without, loader, make_batches, quiet_trainer

STEPS = 8


class Scheduled(LightningModule):
    def __init__(self, schedule: str, bad_steps: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.schedule = schedule
        self.bad_steps = bad_steps
        self.rates: list[float] = []
        self.momenta: list[float] = []

    def training_step(self, batch, batch_idx):
        group = self.trainer.optimizers[0].param_groups[0]
        self.rates.append(group["lr"])
        self.momenta.append(group["momentum"])
        loss = self.layer(batch[0]).square().mean()
        return loss * float("nan") if batch_idx in self.bad_steps else loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)
        if self.schedule == "one_cycle":
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1)
        else:
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def fit(schedule: str, bad_steps: tuple[int, ...], tmp_path, **options) -> Scheduled:
    module = Scheduled(schedule, bad_steps)
    trainer = Trainer(
        max_epochs=1,
        callbacks=[GradGuard(clip=None, cap=None, backoff=None, **options)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(STEPS, 2))))
    return module


@pytest.mark.parametrize("schedule", ["exponential", "one_cycle"])
def test_a_dropped_step_does_not_advance_the_schedule(schedule, tmp_path):
    healthy = fit(schedule, (), tmp_path)
    faulty = fit(schedule, (2, 5), tmp_path)

    # each bad step repeats the rate (and, with one-cycle, the momentum) it was dropped at
    taken = [0, 1, 2, 2, 3, 4, 4, 5]
    assert faulty.rates == [healthy.rates[i] for i in taken]
    assert faulty.momenta == [healthy.momenta[i] for i in taken]
    assert len(set(healthy.rates)) == STEPS


def test_an_observer_leaves_the_schedule_alone(tmp_path):
    healthy = fit("exponential", (), tmp_path)
    observed = fit("exponential", (2, 5), tmp_path, mode="observe")

    assert observed.rates == healthy.rates


# -- steps that are known to be dropped some steps later -------------------------------------------


class FusedScheduled(Regression):
    """Under a fused optimizer, with a schedule that counts its steps."""

    def __init__(self) -> None:
        super().__init__(fused_adamw)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def advances(trainer) -> int:
    """How often the schedule went on, by its own count and by the rate it has come to."""
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    count = scheduler.last_epoch
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**count)
    return count


def fit_fused(tmp_path, bad_steps):
    trainer = quiet_trainer(tmp_path, guard_without(skip=SkipBadSteps()))
    trainer.fit(FusedScheduled(), loader(make_batches(30, poisoned=bad_steps)))
    return trainer


@pytest.mark.parametrize(
    "bad_steps", [(), (0,), (5,), (5, 6, 7, 8), (3, 11, 26), tuple(range(20))], ids=str
)
def test_a_step_that_is_known_late_is_held_back_later(tmp_path, bad_steps):
    trainer = fit_fused(tmp_path, bad_steps)
    assert advances(trainer) == 30 - len(bad_steps)


def test_what_is_owed_at_the_end_is_settled_by_the_run_that_goes_on(tmp_path):
    trainer = fit_fused(tmp_path, (27, 28, 29))
    assert advances(trainer) == 30
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    later = quiet_trainer(tmp_path, guard_without(skip=SkipBadSteps()), max_epochs=2)
    later.fit(FusedScheduled(), loader(make_batches(30)), ckpt_path=tmp_path / "end.ckpt")
    assert later.global_step == 60
    assert advances(later) == 57


def rates_under_a_trial(fused: bool, bad_steps: tuple[int, ...], tmp_path) -> list[float]:
    """The schedule's own rate before each step; the guard tries a lower one on a plateau."""

    class Plateau(Regression):
        def __init__(self) -> None:
            super().__init__(lambda p: torch.optim.AdamW(p, lr=0.1, fused=fused))
            self.rates: list[float] = []

        def training_step(self, batch, batch_idx):
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1000)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    guard, model = GradGuard(report=False), Plateau()
    quiet_trainer(tmp_path, guard).fit(model, loader(make_batches(120, poisoned=bad_steps)))
    scales = [row.lr_scale for row in guard.history]
    assert all(scales[step] < 1.0 for step in bad_steps), scales
    return model.rates


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_held_back_keeps_the_rate_of_the_schedule_not_the_guards(fused, tmp_path):
    assert set(rates_under_a_trial(fused, (80,), tmp_path)) == {0.1}


# -- one that waits for a plateau ------------------------------------------------------------------


class Waits(Scheduled):
    """Its metric falls at every step that is taken."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        bad = batch_idx in self.bad_steps
        self.log("metric", float("nan") if bad else 100.0 - self.trainer.global_step)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        config = {"scheduler": scheduler, "interval": "step", "monitor": "metric"}
        return {"optimizer": optimizer, "lr_scheduler": config}


@pytest.mark.parametrize("bad_steps", [(), (2, 3, 4), (5, 6, 7)])
def test_dropped_steps_are_no_plateau(bad_steps, tmp_path):
    module = Waits("", bad_steps)
    trainer = quiet_trainer(tmp_path, guard_without(skip=SkipBadSteps()))
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(STEPS, 2))))

    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.last_epoch == STEPS - len(bad_steps)
    assert scheduler.num_bad_epochs == 0
    assert set(module.rates) == {0.1}


# -- schedules beside each other -------------------------------------------------------------------


class TwoSchedules(Regression):
    """One counts steps and one epochs; both multiply the rate as they find it."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedules = [
            {
                "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma),
                "interval": interval,
            }
            for gamma, interval in ((0.99, "step"), (0.5, "epoch"))
        ]
        return [optimizer], schedules


@pytest.mark.parametrize("bad_step", [2, 4, 9])
def test_an_epoch_that_ends_with_a_dropped_step_counts_all_the_same(tmp_path, bad_step):
    trainer = quiet_trainer(tmp_path, guard_without(skip=SkipBadSteps()), max_epochs=2)
    model = TwoSchedules()
    original = model.training_step
    model.training_step = lambda batch, batch_idx: (
        original(batch, batch_idx) * (float("nan") if trainer.global_step == bad_step else 1.0)
    )
    trainer.fit(model, loader(make_batches(5)))
    by_step, by_epoch = (config.scheduler for config in trainer.lr_scheduler_configs)
    assert (by_step.last_epoch, by_epoch.last_epoch) == (9, 2)
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(0.1 * 0.99**9 * 0.5**2)
    assert by_epoch.get_last_lr() == [rate]


class Alternating(LightningModule):
    """Two optimizers, each with a schedule, that step twice in a batch; all by hand."""

    def __init__(self, bad, interval="step"):
        super().__init__()
        self.automatic_optimization = False
        self.interval = interval
        self.one, self.two = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        self.bad = bad

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.one, self.two)]
        schedules = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.9) for o in optimizers]
        return optimizers, [{"scheduler": s, "interval": self.interval} for s in schedules]

    def training_step(self, batch, batch_idx):
        pairs = zip((self.one, self.two), self.optimizers(), self.lr_schedulers(), strict=True)
        for number, (layer, optimizer, schedule) in enumerate(pairs):
            for turn in range(2):
                optimizer.zero_grad()
                loss = layer(batch[0]).square().mean()
                bad = (batch_idx, number, turn) in self.bad
                self.manual_backward(loss * float("nan") if bad else loss)
                optimizer.step()
                schedule.step()


@pytest.mark.parametrize(
    "bad",
    [(), [(1, 0, 0)], [(1, 0, 1), (1, 1, 1)], [(1, 0, 0), (1, 0, 1), (2, 1, 0)]],
    ids=["none", "first", "both optimizers", "both turns"],
)
@pytest.mark.parametrize("interval", ["step", "epoch"])  # Lightning does not look at it here
def test_each_step_of_a_batch_is_held_back_for_itself(tmp_path, bad, interval):
    trainer = quiet_trainer(tmp_path, guard_without(skip=SkipBadSteps()))
    trainer.fit(Alternating(bad, interval), DataLoader(TensorDataset(torch.randn(4, 2))))
    for number, optimizer in enumerate(trainer.optimizers):
        count = 8 - sum(which == number for _, which, _ in bad)
        assert trainer.lr_scheduler_configs[number].scheduler.last_epoch == count
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**count)


class ByEpoch(LightningModule):
    """Steps its schedule by hand, with the last batch of each epoch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(2, 1)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.manual_backward(loss * float("nan") if self.trainer.global_step == 7 else loss)
        self.optimizers().step()
        self.optimizers().zero_grad()
        if self.trainer.is_last_batch:
            self.lr_schedulers().step()


def test_an_epoch_that_is_counted_by_hand_counts_after_a_dropped_step(tmp_path):
    trainer = quiet_trainer(tmp_path, guard_without(skip=SkipBadSteps()), max_epochs=3)
    trainer.fit(ByEpoch(), DataLoader(TensorDataset(torch.randn(4, 2))))
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
