"""In training, the finding of NaN or Inf names the place where it began, and nothing is changed."""

from __future__ import annotations

import logging
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lightning_gradguard import GradGuard
from lightning_gradguard.callbacks import base
from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.respond import SkipBadSteps
from tests.dry_run.models import CharacterModel, text_batches
from tests.engines.test_ddp import Messages, both_ranks
from tests.models import (
    Regression,
    adamw,
    assert_same_bits,
    fused_adamw,
    guard_without,
    loader,
    make_batches,
    quiet_trainer,
)

STEPS, BAD = 9, 5
B, T, F = 4, 6, 3
MODES = pytest.mark.parametrize("mode", ["protect", "observe"])


class Log(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return torch.log(values)


class Root(nn.Module):
    """The length of each vector, whose gradient at length 0 is NaN."""

    def forward(self, values: Tensor) -> Tensor:
        return values.square().sum(-1, keepdim=True).sqrt()


class Tagger(LightningModule):
    """Sequences to numbers; what it does at the bad step is up to the batch."""

    def __init__(self, make_optimizer: Any = adamw) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.rnn = nn.GRU(F, 8, batch_first=True)
            self.drop = nn.Dropout(0.1)
            self.norm = nn.BatchNorm1d(8)
            self.body = nn.ModuleDict({"log": Log(), "root": Root()})
            self.head = nn.Linear(8, 1)
        self.make_optimizer = make_optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, shift, scale = batch
        hidden = self.drop(self.rnn(inputs)[0])
        hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        # exp and log undo each other, unless something is taken away in between.
        logs = self.body["log"](hidden.exp() - shift)
        loss = self.head(logs).square().mean() + 0.1 * self.body["root"](logs * scale).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def batches(fault: str = "", step: int = BAD) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    found = []
    for number in range(STEPS):
        inputs = torch.randn(B, T, F, generator=generator)
        shift, scale = torch.zeros(B, T, 1), torch.ones(B, T, 1)
        if number == step:
            tensor, value = {
                "batch": (inputs, math.nan),
                "forward": (shift, 1e9),
                "backward": (scale, 0.0),
                "": (scale, 1.0),
            }[fault]
            tensor[2, 3] = value
        found.append((inputs, shift, scale))
    return found


EXPECTED = {
    "batch": ("batch", 3),
    "forward": ("body.log", 3),
    "backward": ("body.root", 3),
}


def trained(root: Path, data: Any, *callbacks: Callback, **arguments: Any) -> dict[str, Any]:
    """A run and all that it leaves."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    model = arguments.pop("model", None) or Tagger()
    trainer = quiet_trainer(root, *callbacks, log_every_n_steps=1, **arguments)
    trainer.fit(model, loader(data))
    return {
        "weights": model.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "gradients": [p.grad for p in model.parameters()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "logged": trainer.callback_metrics,
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }


def non_finite(guard: Any) -> list[Finding]:
    return [f for f in guard.findings if f.pathology is Pathology.NON_FINITE]


@MODES
@pytest.mark.parametrize("fault", list(EXPECTED))
def test_the_place_is_named(tmp_path: Path, fault: str, mode: Any) -> None:
    guard = GradGuard(mode)
    trained(tmp_path, batches(fault), guard)
    (finding,) = non_finite(guard)  # also where the weights are NaN for good
    assert (finding.where, finding.timestep) == EXPECTED[fault]
    assert finding.evidence["sample"] == 2.0
    assert (finding.step, finding.since) == (BAD, BAD)
    assert finding.severity is Severity.CRITICAL
    assert finding.certainty == "certain"
    assert re.search(r"timestep 3 of sample 2", finding.message)


@pytest.mark.parametrize("fault", ["", *EXPECTED])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_that_is_looked_at_ends_in_the_same_bits(
    tmp_path: Path, fault: str, precision: Any
) -> None:
    guard = GradGuard("observe")
    watched = trained(tmp_path, batches(fault), guard, precision=precision)
    plain = trained(tmp_path, batches(fault), precision=precision)
    watched["logged"] = {k: v for k, v in watched["logged"].items() if k in plain["logged"]}
    assert_same_bits(watched, plain)
    assert [f.where for f in non_finite(guard)] == ([EXPECTED[fault][0]] if fault else [])


def test_a_dropped_step_leaves_what_the_others_would_have_left(tmp_path: Path) -> None:
    """Looked for or not: a guard that looks ends where one that does not ends."""

    class Blind(GradGuard):
        def _start(self, *args: Any) -> None:
            super()._start(*args)
            self._origins._left = 0

    seeing = guard_without(skip=SkipBadSteps())
    blind = Blind(clip=None, cap=None, backoff=None, skip=SkipBadSteps())
    states = [trained(tmp_path, batches("forward"), guard) for guard in (seeing, blind)]
    assert_same_bits(states[0], states[1])
    assert [non_finite(guard)[0].where for guard in (seeing, blind)] == ["body.log", "model"]


@pytest.mark.filterwarnings("ignore:Encountered `nan` values in tensor:UserWarning")
def test_everything_that_a_training_step_can_change_is_as_it_was(tmp_path: Path) -> None:
    class Fragile(CharacterModel):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * (math.nan if batch_idx == BAD else 1.0)

    torch.manual_seed(0)
    models = [Fragile(), Fragile()]
    guard = GradGuard("observe")
    states = [
        trained(tmp_path, text_batches(STEPS), *callbacks, model=model)
        for model, callbacks in zip(models, [[guard], []], strict=True)
    ]
    states[0]["logged"] = {k: v for k, v in states[0]["logged"].items() if k in states[1]["logged"]}
    assert_same_bits(states[0], states[1])
    assert models[0].history == pytest.approx(models[1].history, nan_ok=True)
    assert [f.where for f in non_finite(guard)] == ["loss"]


def test_dropout_meets_the_same_random_numbers(tmp_path: Path) -> None:
    """A NaN that is a matter of luck is found, as the luck is the same."""

    class Unlucky(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.log_of = Log()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            luck = torch.rand(())
            return self.loss(batch) + 0 * self.log_of(luck - 0.05) * self.head.weight.sum()

    guard = GradGuard()
    trained(tmp_path, make_batches(100), guard, model=Unlucky())
    findings = non_finite(guard)
    assert findings
    assert all(finding.where == "log_of" for finding in findings)


def test_of_accumulated_batches_the_last_is_looked_at(tmp_path: Path) -> None:
    for step, where in ((BAD, "body.log"), (BAD - 1, "model")):
        guard = GradGuard()
        trained(tmp_path, batches("forward", step), guard, accumulate_grad_batches=2)
        assert [f.where for f in non_finite(guard)] == [where]


def test_a_fused_optimizer_is_told_by_its_norms(tmp_path: Path) -> None:
    guard = GradGuard()
    trained(tmp_path, batches("backward"), guard, model=Tagger(fused_adamw))
    (finding,) = non_finite(guard)
    assert finding.where == "norm"  # the last module with weights before the root


def test_an_error_in_the_search_is_said_once_and_the_guard_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Reluctant(Tagger):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            type(self).calls += 1
            if type(self).calls == BAD + 2:
                raise RuntimeError("not twice")
            return super().training_step(batch, batch_idx)

    guard = GradGuard()
    trained(tmp_path, batches("forward"), guard, model=Reluctant())
    (warning,) = [r for r in caplog.records if "cannot be looked for" in r.getMessage()]
    assert warning.levelno == logging.WARNING
    assert "not twice" in warning.getMessage()
    assert [f.where for f in non_finite(guard)] == ["model"]
    assert guard.counts["skipped_steps"] == 1
    assert not guard.broken


def test_it_is_done_once_in_an_episode_and_a_few_times_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    look = base.OriginSearch.look

    def counted(self: Any, module: Any, engine: Any) -> None:
        looks.append(engine.step)
        look(self, module, engine)

    monkeypatch.setattr(base.OriginSearch, "look", counted)
    trained(tmp_path, [batches("batch")[BAD]] * 6, GradGuard("observe"))
    assert looks == [1]
    looks.clear()
    healthy, bad = batches()[:1], [batches("batch")[BAD]]
    guard = GradGuard()
    trained(tmp_path, (bad + healthy * 40) * 7, guard)
    assert len(looks) == 7
    assert [f.where for f in non_finite(guard)] == ["batch"] * 5 + ["model"] * 2


def test_no_batch_is_kept(tmp_path: Path) -> None:
    class Ask(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            assert guard._moments.current is None
            assert not guard._moments._last

    guard = GradGuard()
    trained(tmp_path, batches("forward"), guard, Ask())
    assert guard._moments.current is None


class Gathering(Tagger):
    """Its loss rests on what all processes have."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 0.0 * self.all_gather(loss.detach()).sum().nan_to_num()


class SpoilOneRank(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, number: int) -> None:
        if number == BAD and trainer.global_rank == 0:
            batch[1][2, 3] = 1e9


def _on_a_rank(root: str, gathers: bool, mode: Any) -> tuple[list[Any], int]:
    logger, spoken = logging.getLogger("lightning_gradguard"), Messages()
    guard = GradGuard(mode)
    torch.manual_seed(3)
    trainer = quiet_trainer(
        root, SpoilOneRank(), guard, strategy="ddp", devices=2, use_distributed_sampler=False
    )
    trainer.fit(Gathering() if gathers else Tagger(), loader(batches()))
    logger.removeHandler(spoken)
    refused = [r for r in spoken.records if "must not need other processes" in r.getMessage()]
    return [(f.where, f.step) for f in non_finite(guard)], len(refused)


@pytest.mark.slow
def test_with_several_processes_none_waits_for_another(tmp_path: Path) -> None:
    cases = [(gathers, mode) for gathers in (False, True) for mode in ("protect", "observe")]
    results = both_ranks(_on_a_rank, tmp_path, *cases)
    for (gathers, mode), (first, second) in zip(cases, results, strict=True):
        # In the batch of the second rank nothing is found, and if it only observes, its loss is
        # its own: the norms seem to say that the gradient was lost on its way back.
        told = "model" if mode == "protect" else "head"
        assert second == ([(told, BAD)], int(gathers))
        assert first == ([("model" if gathers else "body.log", BAD)], int(gathers))
