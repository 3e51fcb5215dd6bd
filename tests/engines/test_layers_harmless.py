"""Looks at every layer change nothing: not a bit, not a graph, not the pace of another rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed import get_rank
from torch.utils.checkpoint import checkpoint

from lightning_gradguard import GradGuard, GradientMonitor
from lightning_gradguard.sampling import LayerSampler
from tests.engines.test_ddp import Messages, both_ranks, column
from tests.engines.test_monitor_changes_nothing import final_state
from tests.engines.witnesses import Mixed, WitnessedMonitor
from tests.measure.test_activations import hooks_of
from tests.models import (
    INPUTS,
    Batch,
    Regression,
    adamw,
    assert_same_bits,
    fused_adamw,
    loader,
    quiet_trainer,
)

LOOKS = [0, 1, 2, 4, 8, 16, 32, 40, 50]
STEPS = 54
ADAMS = pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)
DATA = list(range(STEPS))


# ---- bits ---------------------------------------------------------------------------------------


class Checkpointed(Mixed):
    """The body runs again in the backward pass."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.rnn(inputs)[0][:, -1]
        again = checkpoint(lambda h: self.act(self.body(h)), hidden, use_reentrant=False)
        return self.head(again)


@ADAMS
@pytest.mark.parametrize("kind", [Mixed, Checkpointed])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_with_looks_ends_in_the_same_bits(
    tmp_path: Path, kind: type[Mixed], precision: Any, make_optimizer: Any
) -> None:
    settings = {"precision": precision, "log_every_n_steps": 1}
    bare = final_state(tmp_path, kind(make_optimizer, seeds=False), DATA, **settings)
    monitor, model = WitnessedMonitor(), kind(make_optimizer, seeds=False)
    assert_same_bits(final_state(tmp_path, model, DATA, monitor, **settings), bare)
    (witness,) = monitor.witnesses
    assert witness.inspected == LOOKS
    assert len(witness.inspections[-1].activations) == 2  # the ReLU, and the tanh of the RNN


@pytest.mark.slow
# Dynamo looks at the gradient of whatever goes into a graph, as after the break at the RNN.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "a part"])
def test_a_compiled_run_ends_in_the_same_bits(tmp_path: Path, backend: str, whole: bool) -> None:
    def run(*callbacks: Callback) -> dict[str, Any]:
        torch.compiler.reset()
        model: Any = Mixed(seeds=False)
        if whole:
            model = torch.compile(model, backend=backend)
        else:
            model.body = torch.compile(model.body, backend=backend)
        return final_state(tmp_path, model, DATA, *callbacks)

    monitor = WitnessedMonitor()
    assert_same_bits(run(monitor), run())
    assert monitor.witnesses[0].inspected == LOOKS


# ---- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "_inspector.before_step",
        "_inspector.after_step",
        "_inspector.activations._watched.0.after",
        "_inspector._usage._after",
        "_inspector._updates.ratios",
    ],
)
@pytest.mark.parametrize("make_guard", [GradGuard, GradientMonitor])
def test_an_error_in_the_looks_ends_them_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str, make_guard: Any
) -> None:
    class Broken(make_guard):  # type: ignore[misc]
        def _make_engine(self, *args: Any) -> Any:
            engine = super()._make_engine(*args)
            owner: Any = engine._samplers._layers
            *path, name = place.split(".")
            for part in path:
                owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
            original = getattr(owner, name)

            def fails(*args: Any, **kwargs: Any) -> Any:
                if engine.step > 9:  # between the looks at steps 8 and 16
                    raise RuntimeError("out of luck")
                return original(*args, **kwargs)

            setattr(owner, name, fails)
            return engine

    guard, model = Broken(), Mixed()
    settings = {"log_every_n_steps": 1}
    state = final_state(tmp_path, model, DATA, guard, **settings)
    told = [r for r in caplog.records if "stops looking at single layers" in r.getMessage()]
    assert len(told) == 1
    assert "everything else goes on" in told[0].getMessage()
    assert told[0].exc_info is not None
    (engine,) = guard.engines
    assert not guard.broken
    assert [row.step for row in guard.history] == list(range(STEPS))
    assert guard.time_readings[-1].step == 50, "time is not watched any more"
    assert engine.recorder.inspection is not None
    assert engine.recorder.inspection.step == 8
    assert hooks_of(model) == 0
    # As a guard may clip, the same guard without a fault is what it is compared with.
    assert_same_bits(state, final_state(tmp_path, Mixed(), DATA, make_guard(), **settings))


# ---- several callbacks, one engine --------------------------------------------------------------


class HookCount(Callback):
    """Counts hooks on the model, and samplers that have any, before each forward pass."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.counts.append(hooks_of(pl_module))


def test_of_two_callbacks_one_looks(tmp_path: Path) -> None:
    def hooks(*callbacks: Callback) -> tuple[list[int], nn.Module]:
        model, count = Mixed(), HookCount()
        quiet_trainer(tmp_path, *callbacks, count).fit(model, loader(DATA))
        return count.counts, model

    alone, _ = hooks(GradGuard(timesteps=None))
    assert [step for step in range(STEPS) if alone[step]] == LOOKS[1:]
    for kinds in ((GradGuard, GradientMonitor), (GradientMonitor, GradGuard)):
        callbacks = [kind(timesteps=None) for kind in kinds]
        counts, model = hooks(*callbacks)
        assert counts == alone
        assert callbacks[0].engines[0] is callbacks[1].engines[0]
        assert hooks_of(model) == 0


@pytest.mark.parametrize("fails_at", [1, 3, 8])
def test_after_an_exception_no_hook_is_left(tmp_path: Path, fails_at: int) -> None:
    class Fails(Mixed):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == fails_at:
                raise ValueError("amid a step")
            return loss

    model, guard, monitor = Fails(), GradGuard(), GradientMonitor()
    trainer = quiet_trainer(tmp_path, guard, monitor)
    with pytest.raises(ValueError, match="amid a step"):
        trainer.fit(model, loader(DATA))
    assert hooks_of(model) == 0
    assert not guard.engines[0].active
    assert len(guard.history) == fails_at


# ---- two processes ------------------------------------------------------------------------------


class OtherActivations(Regression):
    """Units that are dead on the second rank only, as its inputs are of another sign."""

    def __init__(self, make_optimizer: Any = adamw) -> None:
        super().__init__(make_optimizer)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.body = nn.Sequential(nn.Linear(INPUTS, 16), nn.ReLU(), nn.Linear(16, 16))
            with torch.no_grad():
                self.body[0].weight.abs_().mul_(10.0)
                self.body[0].bias.fill_(-1.0)  # further from zero than the run moves it


def ddp_run(root: str, optimizer: str, fault: bool) -> dict[str, Any]:
    messages = Messages()
    sign = -1.0 if get_rank() else 1.0
    generator = torch.Generator().manual_seed(get_rank())
    batches: list[Batch] = [
        (sign * torch.rand(128, INPUTS, generator=generator), torch.ones(128, 1)) for _ in range(70)
    ]
    model = OtherActivations({"adamw": adamw, "fused_adamw": fused_adamw}[optimizer])
    guard = GradGuard()
    if fault and get_rank():
        original = LayerSampler.before_step

        def fails(self: LayerSampler, step: int, *args: Any, **kwargs: Any) -> None:
            if step == 16:
                self._inspector._begun = None
                self._inspector.before_step = lambda *_, **__: 1 / 0  # type: ignore[assignment]
            original(self, step, *args, **kwargs)

        LayerSampler.before_step = fails  # type: ignore[method-assign]
    trainer = quiet_trainer(
        root,
        guard,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, loader(batches))
    (engine,) = guard.engines
    inspection = engine.recorder.inspection
    assert inspection is not None
    dead = {reading.module: reading.dead for reading in inspection.activations}
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "history": [dict(vars(row)) for row in guard.history],
        "findings": [f"{f.pathology.value} {f.where} {f.local}" for f in guard.findings],
        "dead": list(dead.values()),
        "inspected": inspection.step,
        "errors": messages.errors,
        "looks": [r.getMessage() for r in messages.records if "stops looking" in r.getMessage()],
        "broken": guard.broken,
        "hooks": hooks_of(model),
    }


@pytest.mark.slow
def test_ranks_that_see_other_activations_go_on_together(tmp_path: Path) -> None:
    cases = [("adamw", False), ("fused_adamw", False), ("adamw", True)]
    for (_, fault), (first, second) in zip(
        cases, both_ranks(ddp_run, tmp_path, *cases), strict=True
    ):
        assert_same_bits(first["weights"], second["weights"])
        assert len(first["history"]) == len(second["history"]) == 70
        for name in ("total_norm", "clip_coef", "skipped", "lr_scale", "max_ratio"):
            assert_same_bits(column(first, name), column(second, name), name)
        assert (first["broken"], second["broken"]) == (False, False)
        assert first["errors"] == second["errors"] == []
        assert (first["hooks"], second["hooks"]) == (0, 0)
        assert first["inspected"] == 50
        if fault:  # told on its rank, and of no concern to the other
            assert (len(first["looks"]), len(second["looks"])) == (0, 1)
            assert second["inspected"] == 8
            continue
        assert first["dead"] != second["dead"]
        assert max(second["dead"]) > 0.9
        local = [finding for finding in second["findings"] if finding.endswith("True")]
        assert any("dead_units" in finding for finding in local), second["findings"]
        assert not any("dead_units" in finding for finding in first["findings"])
