"""What real progress bars show of a real run, and that they are left as they were found."""

from __future__ import annotations

import copy
import math
import pickle
import re
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as lightning
import pytest
import pytorch_lightning
import torch

from lightning_gradguard import GradGuard, GradientMonitor
from lightning_gradguard.callbacks.progress import ProgressState
from lightning_gradguard.respond import SkipBadSteps
from tests.models import Regression, loader, make_batches, quiet_trainer

BATCHES = 30


class Kept:
    """Keeps what a bar would show, as a user's own bar may."""

    shown: list[dict[str, Any]]

    def get_metrics(self, trainer, pl_module):
        self.shown = [*getattr(self, "shown", []), super().get_metrics(trainer, pl_module)]
        return self.shown[-1]

    def disable(self):
        pass

    enable = disable


class Mine(Kept, lightning.callbacks.ProgressBar):
    """Asks for its values after every batch; shows them nowhere."""

    def __init__(self):
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(self.get_metrics(trainer, pl_module))


def fit(root, *callbacks, batches=None, model=None, trainer_of=quiet_trainer, **options):
    trainer = trainer_of(root, *callbacks, **{"enable_progress_bar": True, **options})
    trainer.fit(model or Regression(), loader(batches or make_batches(BATCHES)))
    return trainer


def assert_as_found(bar):
    """Nothing of ours is on the bar, and it can be copied and sent elsewhere."""
    assert "get_metrics" not in vars(bar)
    copy.deepcopy(bar)


# -- the bars that there are ----------------------------------------------------------------------


def test_tqdm_shows_norm_and_state(tmp_path, capsys):
    bar = lightning.callbacks.TQDMProgressBar()
    guard = GradGuard()
    fit(tmp_path, guard, bar)

    printed = "".join(capsys.readouterr())
    norms = [float(n) for n in re.findall(r"grad_norm=([\d.e+-]+)", printed)]
    assert len(norms) >= 2
    assert norms[-1] == pytest.approx(guard.history[-1].total_norm, rel=1e-2)
    assert "guard=ok" in printed
    assert_as_found(bar)


def test_rich_shows_norm_and_state(tmp_path, capsys):
    bar = lightning.callbacks.RichProgressBar()
    guard = GradGuard()
    fit(tmp_path, guard, bar)

    printed = "".join(capsys.readouterr())
    norms = re.findall(r"grad_norm: ([\d.e+-]+)", printed)
    assert float(norms[-1]) == pytest.approx(guard.history[-1].total_norm, rel=1e-2)
    assert "guard: ok" in printed
    assert_as_found(bar)


def test_a_bar_of_the_users_own_gets_them_too(tmp_path):
    bar, guard = Mine(), GradGuard()
    fit(tmp_path, guard, bar)

    assert [shown["grad_norm"] for shown in bar.seen] == [r.total_norm for r in guard.history]
    assert {shown["guard"] for shown in bar.seen} == {"ok"}
    assert all("guard" not in shown for shown in bar.shown)  # what it says itself is unchanged
    assert_as_found(bar)


def test_without_a_bar_all_goes_on(tmp_path):
    guard = GradGuard()
    trainer = fit(tmp_path, guard, enable_progress_bar=False)

    assert trainer.progress_bar_callback is None
    assert len(guard.history) == BATCHES


def test_in_the_other_namespace(tmp_path, capsys):
    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(6, 1)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.mse_loss(self.inner(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def trainer_of(root, *callbacks, **options):
        settings = {
            "default_root_dir": root,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "max_epochs": 1,
        }
        return pytorch_lightning.Trainer(callbacks=list(callbacks), **{**settings, **options})

    bar = pytorch_lightning.callbacks.TQDMProgressBar()
    fit(tmp_path, GradGuard(), bar, model=Other(), trainer_of=trainer_of)

    assert re.search(r"grad_norm=[\d.]+, guard=\w+", "".join(capsys.readouterr()))
    assert_as_found(bar)


# -- what is shown --------------------------------------------------------------------------------


def test_a_dropped_step_shows_as_long_as_it_is_news(tmp_path):
    bar = Mine()
    fit(tmp_path, GradGuard(), bar, batches=make_batches(BATCHES, poisoned=(5,)))

    assert [shown["guard"] for shown in bar.seen[:16]] == ["ok"] * 5 + ["skipping"] * 10 + ["ok"]
    assert math.isnan(bar.seen[5]["grad_norm"])


def test_a_bar_that_looks_now_and_then_misses_no_step(tmp_path):
    class Lazy(Mine):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx % 8 == 0:
                super().on_train_batch_end(trainer, pl_module)

    bar = Lazy()
    fit(tmp_path, GradGuard(), bar, batches=make_batches(BATCHES, poisoned=(5,)))

    assert [shown["guard"] for shown in bar.seen] == ["ok", "skipping", "ok", "ok"]


def test_a_monitor_watches(tmp_path):
    bar = Mine()
    fit(tmp_path, GradientMonitor(), bar)

    assert {shown["guard"] for shown in bar.seen} == {"watching"}


def test_two_guards_show_one_state(tmp_path):
    bar = Mine()
    fit(tmp_path, GradientMonitor(), GradGuard(), bar)

    assert [key for key in bar.seen[-1] if "g" in key] == ["grad_norm", "guard"]


def test_several_optimizers_are_told_apart(tmp_path):
    class Two(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in optimizers:
                optimizer.step()

        def configure_optimizers(self):
            parts = (self.body, self.head)
            return [torch.optim.SGD(part.parameters(), lr=0.01) for part in parts]

    bar = Mine()
    fit(tmp_path, GradGuard(), bar, model=Two())

    names = {f"{what}/optimizer{n}" for what in ("grad_norm", "guard") for n in (0, 1)}
    assert names <= set(bar.seen[-1])


def test_a_value_of_the_users_with_that_name_stays(tmp_path):
    class Logs(Regression):
        def training_step(self, batch, batch_idx):
            self.log("guard", 7.0, prog_bar=True)
            return super().training_step(batch, batch_idx)

    bar = Mine()
    fit(tmp_path, GradGuard(), bar, model=Logs())

    assert bar.seen[-1]["guard"] == 7.0
    assert "grad_norm" in bar.seen[-1]


@pytest.mark.parametrize(("norm", "text"), [(2e-6, "2e-06"), (0.25, "0.25"), (math.inf, "inf")])
def test_a_small_norm_is_not_rounded_to_nothing(tmp_path, norm, text):
    bar, shown = Mine(), engine(norm)
    trainer = quiet_trainer(tmp_path, bar, enable_progress_bar=True)
    state = ProgressState()
    state.attach(trainer, [shown])

    value = bar.get_metrics(trainer, Regression())["grad_norm"]

    assert value == norm
    assert f"{value:.3f}" == text  # rich formats every number like this


# -- as it was found ------------------------------------------------------------------------------


def engine(norm: float = 1.0) -> Any:
    """Stands in for an engine after a step; real ones are in the tests above."""
    from tests.record.test_guard_state import rows

    (row,) = rows(1, total_norm=norm)
    recorder = SimpleNamespace(last=row, label="", history_since=lambda step: [row])
    return SimpleNamespace(recorder=recorder, mode="protect", active=True)


def test_it_comes_off_after_an_exception(tmp_path):
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    bar = Mine()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, GradGuard(), bar, model=Fails())

    assert "grad_norm" in bar.seen[-1]
    assert_as_found(bar)


def test_it_comes_off_when_the_guard_stops_the_run(tmp_path):
    bar = Mine()
    guard = GradGuard(skip=SkipBadSteps(max_consecutive=3), rollback=None)
    fit(tmp_path, guard, bar, batches=make_batches(BATCHES, poisoned=range(5, BATCHES)))

    assert len(bar.seen) < BATCHES
    assert_as_found(bar)


def test_a_second_fit_begins_afresh(tmp_path):
    bar, guard = Mine(), GradGuard()
    trainer = fit(tmp_path, guard, bar)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Regression(), loader(make_batches(BATCHES)))

    assert len(bar.seen) == 2 * BATCHES
    assert all("grad_norm" in shown for shown in bar.seen)
    assert_as_found(bar)


def test_a_copy_made_while_training_runs_is_of_the_bar_alone(tmp_path):
    bar = Mine()
    trainer = quiet_trainer(tmp_path, bar, enable_progress_bar=True)
    state = ProgressState()
    state.attach(trainer, [engine()])
    bar._trainer = None

    copies = (copy.deepcopy(bar), pickle.loads(pickle.dumps(bar)))

    assert "guard" in bar.get_metrics(trainer, Regression())
    for other in copies:
        assert "guard" not in other.get_metrics(trainer, Regression())
        assert other.shown is not bar.shown


def test_what_another_has_put_on_the_bar_stays_there(tmp_path):
    bar = Mine()
    trainer = quiet_trainer(tmp_path, bar, enable_progress_bar=True)
    bar.get_metrics = theirs = lambda *_: {"theirs": 1.0}
    state = ProgressState()
    state.attach(trainer, [engine()])
    assert set(bar.get_metrics(trainer, None)) == {"theirs", "grad_norm", "guard"}

    around = bar.get_metrics
    bar.get_metrics = lambda *args: {**around(*args), "later": 2.0}
    state.detach()

    assert bar.get_metrics(trainer, None) == {"theirs": 1.0, "later": 2.0}

    bar.get_metrics = theirs
    state.attach(trainer, [engine()])
    state.detach()
    state.detach()

    assert bar.get_metrics is theirs


def test_an_error_of_ours_is_told_once_and_ends_nothing(tmp_path, caplog):
    bar, broken = Mine(), engine()
    del broken.mode
    trainer = quiet_trainer(tmp_path, bar, enable_progress_bar=True)
    state = ProgressState()
    state.attach(trainer, [broken])

    shown = [bar.get_metrics(trainer, Regression()) for _ in range(3)]

    assert shown == [{}, {}, {}]
    assert [r.levelname for r in caplog.records if r.name == "lightning_gradguard"] == ["ERROR"]
