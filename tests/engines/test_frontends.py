"""The ways into a run: namespaces, the CLI, ``torch.compile``, runs that are hardly runs."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger

from lightning_gradguard import GradGuard, GradientMonitor
from lightning_gradguard.respond import SkipBadSteps
from tests.models import (
    NORM_TOLERANCE,
    Batch,
    Regression,
    WithValidation,
    adamw,
    assert_same_bits,
    assert_untouched,
    fused_adamw,
    guard_without,
    loader,
    make_batches,
    plain_loop,
    quiet_trainer,
    total_norm,
)

BATCHES = 8


def history_matches(guard: Any, norms: list[float]) -> None:
    assert [row.total_norm for row in guard.history] == pytest.approx(
        norms, rel=NORM_TOLERANCE, nan_ok=True
    )


@pytest.fixture
def plain() -> tuple[Regression, list[float]]:
    model = Regression()
    return model, plain_loop(model, make_batches(BATCHES)).norms


# -- namespaces -----------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("in_a_list", [True, False], ids=["list", "single"])
def test_both_namespaces(
    tmp_path: Path, plain: tuple[Regression, list[float]], namespace: str, in_a_list: bool
) -> None:
    """The class hierarchies are distinct: a module of one does not fit a Trainer of the other."""
    if namespace == "pytorch_lightning" and not in_a_list:
        pytest.skip("Lightning itself checks the class of a callback that is not in a list")
    pl = pytest.importorskip(namespace)

    class Model(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Regression()

        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            return self.net.loss(batch)

        def configure_optimizers(self) -> Any:
            return adamw(self.parameters())

    guard, model = guard_without(skip=SkipBadSteps()), Model()
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[guard] if in_a_list else guard,
    )
    trainer.fit(model, loader(make_batches(BATCHES)))
    history_matches(guard, plain[1])
    assert_same_bits(model.net.state_dict(), plain[0].state_dict())
    assert trainer.logged_metrics["grad_norm/total"].item() == pytest.approx(plain[1][-1])
    assert_untouched(trainer.optimizers[0], 1e-2)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)["callbacks"]
    assert any("GradGuard" in key for key in saved)


# -- the CLI --------------------------------------------------------------------------------------

# Lightning 2.6 still calls what jsonargparse has deprecated.
CLI_WARNINGS = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)

CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {root}
  callbacks:
    - class_path: lightning_gradguard.GradGuard
      init_args:
        mode: protect
        clip:
          class_path: lightning_gradguard.respond.AdaptiveClip
          init_args:
            multiple: 2.5
        cap: null
        skip:
          outlier_factor: 50.0
          max_consecutive: 7
        backoff: null
        layer_depth: 2
        events: false
        thresholds:
          window: 64
    - class_path: lightning_gradguard.GradientMonitor
"""


@pytest.fixture
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CLI warns of a command line besides the arguments it is given."""
    monkeypatch.setattr(sys, "argv", ["train"])


class CliModel(Regression):
    def __init__(self) -> None:
        super().__init__()

    def train_dataloader(self) -> Any:
        return loader(make_batches(BATCHES))


@CLI_WARNINGS
@pytest.mark.usefixtures("_no_arguments")
def test_lightning_cli_with_a_yaml_config(
    tmp_path: Path, plain: tuple[Regression, list[float]]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(root=tmp_path), encoding="utf-8")
    cli = LightningCLI(
        CliModel,
        args=["fit", "--config", str(config)],
        seed_everything_default=False,
        save_config_callback=None,
    )
    guard, monitor = cli.trainer.callbacks[:2]
    assert isinstance(guard, GradGuard)
    assert isinstance(monitor, GradientMonitor)
    assert guard.clip is not None
    assert guard.clip.multiple == 2.5
    assert guard.cap is None
    assert guard.skip == SkipBadSteps(outlier_factor=50.0, max_consecutive=7)
    assert guard.backoff is None
    assert (guard.layer_depth, guard.events, guard.thresholds.window) == (2, False, 64)
    history_matches(guard, plain[1])
    history_matches(monitor, plain[1])
    assert_same_bits(cli.model.state_dict(), plain[0].state_dict())


@CLI_WARNINGS
@pytest.mark.usefixtures("_no_arguments")
def test_lightning_cli_from_the_command_line(tmp_path: Path) -> None:
    cli = LightningCLI(
        CliModel,
        args=[
            *("fit", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"),
            *("--trainer.logger=false", "--trainer.enable_checkpointing=false"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.callbacks+=GradGuard",
            "--trainer.callbacks.cap=null",
            "--trainer.callbacks.skip.max_consecutive=3",
        ],
        seed_everything_default=False,
        save_config_callback=None,
    )
    guard = cli.trainer.callbacks[0]
    assert isinstance(guard, GradGuard)
    assert guard.cap is None
    assert guard.skip is not None
    assert guard.skip.max_consecutive == 3
    assert len(guard.history) == BATCHES


# -- torch.compile --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)
def test_a_compiled_module(tmp_path: Path, make_optimizer: Any) -> None:
    batches = make_batches(BATCHES, poisoned=(3,))
    guard = guard_without(skip=SkipBadSteps())
    model = Regression(make_optimizer)
    trainer = quiet_trainer(tmp_path, guard, log_every_n_steps=1)
    trainer.fit(torch.compile(model, backend="inductor"), loader(batches))
    plain = Regression(make_optimizer)
    run = plain_loop(plain, batches, omit={3})
    # Fused kernels round differently from the plain ones.
    assert [row.total_norm for row in guard.history] == pytest.approx(
        run.norms, rel=1e-4, nan_ok=True
    )
    assert [row.step for row in guard.history if row.skipped] == [3]
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
    assert {"grad_norm/head", "grad_norm/body.0"} <= set(trainer.logged_metrics)
    assert not any("_orig_mod" in key for key in trainer.logged_metrics)
    assert not any("_orig_mod" in finding.where for finding in guard.findings)


@pytest.mark.slow
def test_a_compiled_part_of_a_module(tmp_path: Path) -> None:
    class PartlyCompiled(Regression):
        def __init__(self) -> None:
            super().__init__()
            # Not inductor: the names are what this is about, and they do not depend on it.
            self.body = torch.compile(self.body, backend="aot_eager")

    guard = guard_without(skip=SkipBadSteps())
    trainer = quiet_trainer(tmp_path, guard, log_every_n_steps=1)
    trainer.fit(PartlyCompiled(), loader(make_batches(BATCHES, poisoned=(3,))))
    assert {"grad_norm/head", "grad_norm/body.0"} <= set(trainer.logged_metrics)
    assert not any("_orig_mod" in key for key in trainer.logged_metrics)
    assert not any("_orig_mod" in finding.where for finding in guard.findings)


# -- runs that are hardly runs --------------------------------------------------------------------


@pytest.mark.parametrize("make_guard", [GradGuard, GradientMonitor])
@pytest.mark.parametrize("batches", [1, 3])
def test_fast_dev_run(tmp_path: Path, make_guard: Any, batches: int) -> None:
    guard = make_guard()
    trainer = quiet_trainer(tmp_path, guard, fast_dev_run=batches)
    poisoned = make_batches(BATCHES, poisoned=(0,))
    trainer.fit(WithValidation(), loader(poisoned), loader(make_batches(2)))
    assert len(guard.history) == batches
    assert guard.findings
    assert list(tmp_path.iterdir()) == [], "a fast_dev_run is to leave no files"
    assert_untouched(trainer.optimizers[0], 1e-2)


@pytest.mark.parametrize("make_guard", [GradGuard, GradientMonitor])
def test_validation_test_and_prediction_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make_guard: Any
) -> None:
    class All(WithValidation):
        def test_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            return self(batch[0])

    guard, model = make_guard(), All()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = quiet_trainer(tmp_path, guard)
    (metrics,) = trainer.validate(model, loader(make_batches(2)), verbose=False)
    assert set(metrics) == {"val_loss"}
    trainer.test(model, loader(make_batches(2)), verbose=False)
    assert len(trainer.predict(model, loader(make_batches(2))) or []) == 2
    assert guard.history == []
    assert_same_bits(model.state_dict(), before)
    assert list(tmp_path.iterdir()) == []
    assert not [r for r in caplog.records if r.name == "lightning_gradguard"]


def test_validation_within_training_is_not_measured(tmp_path: Path) -> None:
    guard, model = guard_without(skip=SkipBadSteps()), WithValidation()
    trainer = quiet_trainer(tmp_path, guard, val_check_interval=2)
    trainer.fit(model, loader(make_batches(BATCHES)), loader(make_batches(2)))
    plain = Regression()
    history_matches(guard, plain_loop(plain, make_batches(BATCHES)).norms)
    assert_same_bits(model.state_dict(), plain.state_dict())


def plain_fits(make_optimizer: Any, poisoned: tuple[int, ...]) -> tuple[Regression, list[float]]:
    """The second of two fits: the same weights, a new optimizer."""
    plain = Regression(make_optimizer)
    batches = make_batches(BATCHES, poisoned=poisoned)
    plain_loop(plain, batches, omit=set(poisoned))
    return plain, plain_loop(plain, batches, omit=set(poisoned)).norms


@pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)
@pytest.mark.parametrize("same_trainer", [True, False], ids=["same trainer", "another trainer"])
def test_fit_called_twice(tmp_path: Path, make_optimizer: Any, same_trainer: bool) -> None:
    batches = make_batches(BATCHES, poisoned=(2,))
    guard, model = guard_without(skip=SkipBadSteps()), Regression(make_optimizer)
    trainer = quiet_trainer(tmp_path, guard)
    trainer.fit(model, loader(batches))
    first = trainer.optimizers[0]
    if same_trainer:
        trainer.fit_loop.max_epochs = 2
    else:
        trainer = quiet_trainer(tmp_path, guard)
    trainer.fit(model, loader(batches))
    plain, norms = plain_fits(make_optimizer, (2,))
    assert [row.step for row in guard.history] == list(range(BATCHES))
    history_matches(guard, norms)
    assert [row.step for row in guard.history if row.skipped] == [2]
    assert_same_bits(model.state_dict(), plain.state_dict())
    assert_untouched(first, 1e-2)
    assert_untouched(trainer.optimizers[0], 1e-2)


def test_a_fit_after_a_failed_one(tmp_path: Path) -> None:
    class FailsOnce(Regression):
        failed = False

        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            if batch_idx == 3 and not self.failed:
                self.failed = True
                raise ValueError("once")
            return self.loss(batch)

    guard, model = guard_without(skip=SkipBadSteps()), FailsOnce()
    with pytest.raises(ValueError, match="once"):
        quiet_trainer(tmp_path, guard).fit(model, loader(make_batches(BATCHES)))
    assert len(guard.history) == 3
    quiet_trainer(tmp_path, guard).fit(model, loader(make_batches(BATCHES)))
    assert [row.step for row in guard.history] == list(range(BATCHES))
    assert guard.engines[0].step == BATCHES


def test_every_step_of_each_fit_enters_the_epoch_metrics(tmp_path: Path) -> None:
    """Two fits of one step each: the second step has the number of the first."""
    guard, model = GradientMonitor(), Regression()
    for _ in range(2):
        trainer = quiet_trainer(tmp_path, guard, max_steps=1)
        trainer.fit(model, loader(make_batches(BATCHES)))
        logged = trainer.callback_metrics["grad_norm/log_mean"].item()
        assert logged == pytest.approx(
            torch.tensor(guard.history[0].total_norm).log().item(), rel=1e-5
        )


def test_events_lie_in_the_log_directory_of_the_run(tmp_path: Path) -> None:
    runs = CSVLogger(tmp_path, name="runs", version="first")
    trainer = quiet_trainer(tmp_path, GradGuard(), logger=runs)
    trainer.fit(Regression(), loader(make_batches(BATCHES, poisoned=(2,))))
    assert (tmp_path / "runs" / "first" / "gradguard" / "events.jsonl").exists()


def test_a_guard_and_a_monitor_in_either_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both see the same norms, and the monitor changes nothing for the guard."""
    batches = make_batches(30, poisoned=(5,))
    alone, bare = GradGuard(), Regression()
    quiet_trainer(tmp_path, alone).fit(bare, loader(batches))
    for make in ((GradGuard, GradientMonitor), (GradientMonitor, GradGuard)):
        callbacks = [kind() for kind in make]
        model = Regression()
        quiet_trainer(tmp_path, *callbacks, log_every_n_steps=1).fit(model, loader(batches))
        assert_same_bits(model.state_dict(), bare.state_dict())
        norms = [[row.total_norm for row in callback.history] for callback in callbacks]
        assert_same_bits(norms[0], norms[1])
        assert_same_bits(norms[0], [row.total_norm for row in alone.history])
    assert not [r for r in caplog.records if "internal error" in r.getMessage()]


def test_lightnings_own_clipping_comes_after_the_guard(tmp_path: Path) -> None:
    batches = make_batches(BATCHES)
    guard, model = guard_without(skip=SkipBadSteps()), Regression()
    trainer = quiet_trainer(tmp_path, guard, gradient_clip_val=1.0)
    trainer.fit(model, loader(batches))
    plain = Regression()
    clipped = []

    def clip(step: int, norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        clipped.append(total_norm(plain.parameters()))

    run = plain_loop(plain, batches, before_update=clip)
    assert max(clipped) < min(run.norms)
    history_matches(guard, run.norms)
    assert_same_bits(model.state_dict(), plain.state_dict())


def test_the_torch_only_half_guards_a_bare_loop() -> None:
    """In a fresh interpreter, where Lightning is never imported."""
    code = (
        "import sys, torch\n"
        "from lightning_gradguard import GuardEngine\n"
        "model = torch.nn.Linear(3, 1)\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "guard = GuardEngine(model, optimizer)\n"
        "before = model.weight.detach().clone()\n"
        "loss = model(torch.full((2, 3), float('nan'))).sum()\n"
        "loss.backward()\n"
        "guard.before_step(loss)\n"
        "optimizer.step()\n"
        "assert torch.equal(model.weight, before)\n"
        "assert guard.counts['skipped_steps'] == 1\n"
        "assert 'lightning' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


def test_the_report_is_logged_once_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lightning_gradguard")
    trainer = quiet_trainer(tmp_path, GradGuard())
    trainer.fit(Regression(), loader(make_batches(BATCHES, poisoned=(2, 3))))
    reports = [r for r in caplog.records if r.getMessage().startswith("GradGuard report")]
    assert len(reports) == 1
    assert "steps 2-3: 2 steps skipped" in reports[0].getMessage()
