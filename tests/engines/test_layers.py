"""Looks at every layer in real Lightning runs: what is logged, found, and restored."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_gradguard import GradientMonitor
from lightning_gradguard.diagnose import Pathology, Severity
from tests.engines.test_manual_optimization import Gan
from tests.engines.witnesses import (
    BATCH,
    Mixed,
    MixedWithValidation,
    WitnessedGuard,
    WitnessedMonitor,
    not_training,
    serious,
)
from tests.models import (
    INPUTS,
    Batch,
    Regression,
    adamw,
    assert_same_bits,
    fused_adamw,
    fused_sgd,
    loader,
    make_batches,
    quiet_trainer,
    sgd,
)

EARLY = [0, 1, 2, 4, 8, 16, 32, 40]
ADAMS = pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)


def steps(count: int) -> Any:
    """A loader for models that make their data themselves."""
    return loader(list(range(count)))


# ---- what reaches a logger ----------------------------------------------------------------------


class Deep(Regression):
    """Enough weights for a slope through depth, in two parts."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            layers = [nn.Linear(INPUTS, 16), nn.Tanh()]
            for _ in range(4):
                layers += [nn.Linear(16, 16), nn.Tanh()]
            self.body = nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(None, {f"body.{i}" for i in range(0, 10, 2)} | {"head"}), (1, {"body", "head"})],
)
def test_keys_of_layers_reach_a_logger(tmp_path: Path, depth: int | None, layers: set[str]) -> None:
    log = CSVLogger(tmp_path, name="runs", version="one")
    trainer = quiet_trainer(tmp_path, GradientMonitor(depth), logger=log, log_every_n_steps=1)
    trainer.fit(Deep(), loader(make_batches(6)))
    with (Path(log.log_dir) / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = list(rows[0])
    assert {key for key in found if key.startswith("update_ratio/")} == {
        f"update_ratio/{layer}" for layer in layers
    }
    assert "grad_depth/slope" in found
    assert all(re.fullmatch(r"[A-Za-z0-9_./]+", key) for key in found)
    # At the steps of the looks alone, where ``log_dict`` would repeat a value until the next.
    assert [int(row["step"]) for row in rows if row["grad_depth/slope"]] == [0, 1, 2, 4]


def test_the_logged_ratio_is_that_of_the_update(tmp_path: Path) -> None:
    model = Regression()
    before = [p.detach().clone() for p in model.head.parameters()]
    trainer = quiet_trainer(tmp_path, GradientMonitor(), log_every_n_steps=1)
    trainer.fit(model, loader(make_batches(1)))
    pairs = zip(model.head.parameters(), before, strict=True)
    moved = sum((p.detach() - old).square().sum().item() for p, old in pairs)
    norm = sum(max(old.norm().item(), 0.1 * old.numel() ** 0.5) ** 2 for old in before)
    expected = math.sqrt(moved / norm)
    assert trainer.logged_metrics["update_ratio/head"].item() == pytest.approx(expected, rel=1e-4)


# ---- layers that are not trained ----------------------------------------------------------------


class ForgetsTheHead(Regression):
    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.body.parameters())


@ADAMS
def test_a_layer_that_the_optimizer_lacks_is_found_at_once(
    tmp_path: Path, make_optimizer: Any
) -> None:
    monitor = GradientMonitor()
    delay = 4 if make_optimizer is fused_adamw else 0
    trainer = quiet_trainer(tmp_path, monitor)
    trainer.fit(ForgetsTheHead(make_optimizer), loader(make_batches(3 + delay)))
    (finding,) = monitor.findings
    assert (finding.pathology, finding.where) == (Pathology.LAYER_NOT_TRAINING, "head")
    assert (finding.severity, finding.fact, finding.certainty) == (
        Severity.WARNING,
        True,
        "certain",
    )
    assert finding.step < 3 + delay / 2
    assert finding.since == 0
    assert finding.local
    assert "`head` gets a gradient but is in no optimizer" in str(monitor.report())


class Alternating(Gan):
    """One optimizer per batch, in turns."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        real, turn = batch[0], batch_idx % 2
        optimizer = (generator, discriminator)[turn]
        loss = self.discriminator_loss(real, batch_idx) if turn else self.generator_loss(real)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Toggling(Gan):
    """As Lightning's own example: the other optimizer's parameters take no part."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for number, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            loss = (
                self.discriminator_loss(batch[0], batch_idx)
                if number
                else self.generator_loss(batch[0])
            )
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)


@ADAMS
@pytest.mark.parametrize("kind", [Gan, Alternating, Toggling])
def test_of_two_optimizers_neither_is_said_not_to_train(
    tmp_path: Path, kind: type[Gan], make_optimizer: Any
) -> None:
    guard = WitnessedGuard()
    quiet_trainer(tmp_path, guard).fit(kind(make_optimizer), loader(make_batches(230)))
    assert [len(witness.inspected) >= 10 for witness in guard.witnesses] == [True, True]
    assert serious(not_training(guard.findings)) == []
    for witness, own in zip(guard.witnesses, ("generator", "discriminator"), strict=True):
        for reading in witness.inspections[-1].parameters:
            assert reading.in_optimizer, reading
            if reading.name.startswith(own):
                assert reading.update_ratio > 0.0, reading


# ---- only training is looked at -----------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4])
def test_validation_between_steps_does_not_disturb_the_looks(tmp_path: Path, every: int) -> None:
    def looks(*validation: Any, **settings: Any) -> list[Any]:
        monitor = WitnessedMonitor()
        model = (MixedWithValidation if validation else Mixed)(dead=31)
        trainer = quiet_trainer(tmp_path, monitor, inference_mode=False, **settings)
        trainer.fit(model, steps(60), *validation)
        (witness,) = monitor.witnesses
        assert witness.inspected == [*EARLY, 50]
        return [asdict(inspection) for inspection in witness.inspections]

    plain = looks()
    assert_same_bits(looks(steps(3), val_check_interval=every), plain)
    relu = [{r["module"]: r for r in look["activations"]}["act"] for look in plain[1:]]
    # All of training, and nothing else: the batches of the last four looks.
    assert [r["examples"] for r in relu] == [BATCH * min(n, 4) for n in range(1, 9)]


# ---- fused optimizers ---------------------------------------------------------------------------


def test_looks_at_a_fused_optimizer_come_two_steps_later_and_are_the_same(tmp_path: Path) -> None:
    seen = []
    for make_optimizer, delay in ((sgd, 0), (fused_sgd, 2)):
        monitor = WitnessedMonitor()
        quiet_trainer(tmp_path, monitor).fit(Mixed(make_optimizer, 31), steps(60))
        (witness,) = monitor.witnesses
        looked = [o for o in witness.observations if o.inspection is not None]
        assert [o.step - delay for o in looked] == [*EARLY, 50]
        assert witness.inspected == [*EARLY, 50]
        seen.append(witness.inspections)
    for one, other in zip(*seen, strict=True):
        assert one.depth_slope == pytest.approx(other.depth_slope, rel=1e-3, nan_ok=True)
        for a, b in zip(one.parameters, other.parameters, strict=True):
            if a.name == "body.0.bias":  # normalized away: its gradient is the noise of rounding
                continue
            for name, value in asdict(a).items():
                expected = getattr(b, name)
                if isinstance(value, float):
                    expected = pytest.approx(expected, rel=5e-3, abs=1e-7, nan_ok=True)
                assert value == expected, (one.step, a.name, name)
        for x, y in zip(one.activations, other.activations, strict=True):
            assert asdict(x) == pytest.approx(asdict(y), abs=0.02, nan_ok=True)


# ---- resume -------------------------------------------------------------------------------------


def resumable(root: Path, make_optimizer: Any, checkpoint: Path | None = None) -> WitnessedMonitor:
    monitor = WitnessedMonitor()
    keep = ModelCheckpoint(
        dirpath=root / "checkpoints", filename="{step}", every_n_train_steps=3, save_top_k=-1
    )
    trainer = quiet_trainer(
        root, monitor, keep, enable_checkpointing=True, max_epochs=-1, max_steps=160
    )
    trainer.fit(Mixed(make_optimizer, 31), steps(40), ckpt_path=checkpoint, weights_only=True)
    return monitor


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@ADAMS
def test_a_resumed_run_looks_at_the_same_steps_and_finds_the_same(
    tmp_path: Path, make_optimizer: Any
) -> None:
    whole = resumable(tmp_path / "whole", make_optimizer)
    assert Pathology.DEAD_UNITS in {f.pathology for f in whole.findings}
    # Amid the first looks, right after one, before and after the finding, amid a delay.
    for step in (3, 33, 42, 51, 102):
        path = tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt"
        resumed = resumable(tmp_path / str(step), make_optimizer, path)
        late = 2 if make_optimizer is fused_adamw else 0
        since = step - late
        (one,), (other,) = resumed.witnesses, whole.witnesses
        assert_same_bits(
            [asdict(o) for o in one.observations if o.step >= since],
            [asdict(o) for o in other.observations if o.step >= since],
            f"resumed at {step}",
        )
        # A finding that was open when the run was resumed is there again; what healed is not.
        known = [f for f in whole.findings if f.until is None or f.until >= since]
        assert [f.to_dict() for f in resumed.findings] == [f.to_dict() for f in known]


# ---- what is wrong with a look is not wrong with training ---------------------------------------


class Starved(LightningModule):
    """Two of three layers behind units that are all dead."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 1)
        with torch.no_grad():
            self.net[2].bias.fill_(-50.0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.head(self.net(batch)) - batch[:, :1]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def test_dead_units_are_found_named_and_explain_the_rest(tmp_path: Path) -> None:
    monitor = GradientMonitor()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(64, 4, generator=generator) for _ in range(160)]
    quiet_trainer(tmp_path, monitor).fit(Starved(), loader(batches))
    found = serious(monitor.findings)
    dead = next(f for f in found if f.pathology is Pathology.DEAD_UNITS)
    assert dead.where == "net.3"
    assert dead.step <= 50
    others = [replace(f) for f in found if f is not dead]
    assert all(f.follows_from == "dead_units in net.3" for f in others), [
        (f.pathology.value, f.where, f.follows_from) for f in others
    ]
