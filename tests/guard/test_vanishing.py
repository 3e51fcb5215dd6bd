"""The responses to vanishing gradients inside a guarded loop."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard import GradGuard, GuardEngine
from lightning_gradguard.diagnose import Pathology, Severity
from lightning_gradguard.measure.updates import RMS_FLOOR
from lightning_gradguard.respond import ActionKind, LayerBoost, UpdateCap, VanishingRegularizer
from tests.guard.loops import MAKERS, Loop
from tests.models import assert_same_bits, loader, make_batches


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def fused_adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def deep(act: type[nn.Module], depth: int = 10) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(8, 32), act()]
    for _ in range(depth - 2):
        layers += [nn.Linear(32, 32), act()]
    return nn.Sequential(*layers, nn.Linear(32, 3))


class DeepLoop:
    """A deep network of sigmoids, in which the gradient vanishes, under the guard."""

    def __init__(
        self,
        make: Callable[[Any], Optimizer] = sgd,
        act: type[nn.Module] = nn.Sigmoid,
        **arguments: Any,
    ) -> None:
        self.model = deep(act)
        self.optimizer = make(self.model.parameters())
        self.guard = GuardEngine(self.model, self.optimizer, timesteps=None, **arguments)
        self.ratios: dict[int, dict[str, float]] = {}
        self.largest: list[float] = []
        self.in_force: list[dict[str, float]] = []

    def run(self, start: int, stop: int) -> DeepLoop:
        generator = torch.Generator().manual_seed(1)
        slopes = torch.randn(8, 3, generator=generator)
        for step in range(stop):
            x = torch.randn(32, 8, generator=generator)
            if step >= start:
                self.step(x, (x @ slopes).argmax(1))
        return self

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        self.guard.before_step(loss)
        self.in_force.append(self.boosts())
        before = [p.detach().clone() for p in self.model.parameters()]
        self.optimizer.step()
        pairs = zip(self.model.parameters(), before, strict=True)
        sizes = [max(b.norm().item(), RMS_FLOOR * math.sqrt(b.numel())) for b in before]
        moves = [(p - b).norm().item() / size for (p, b), size in zip(pairs, sizes, strict=True)]
        self.largest.append(max(moves))
        inspection = self.guard.recorder.inspection
        if inspection is not None:
            ratios = {r.name: r.update_ratio for r in inspection.parameters}
            self.ratios[inspection.step] = ratios

    def boosts(self) -> dict[str, float]:
        state = self.guard._vanishing._boost
        return {} if state is None else dict(state.boosts)


@pytest.mark.parametrize("make", [sgd, adamw, fused_adamw])
def test_layers_that_get_too_little_are_boosted_where_the_gradient_vanishes(make: Any) -> None:
    plain = DeepLoop(make).run(0, 151)
    boosted = DeepLoop(make, boost=LayerBoost(max_boost=4.0)).run(0, 151)
    found = [f for f in boosted.guard.findings if f.pathology is Pathology.VANISHING_IN_DEPTH]
    assert [f.severity for f in found] == [Severity.WARNING]
    assert boosted.boosts()
    assert max(boosted.boosts().values()) <= 4.0
    actions = [a for a in boosted.guard.actions if a.kind is ActionKind.BOOST]
    assert actions[0].step > found[0].step
    assert "because the gradient vanishes through depth" in actions[0].message
    assert [a for a in plain.guard.actions if a.kind is ActionKind.BOOST] == []
    # Up to the finding both are the same run; then the first boost is 1.5 for who lacks most.
    assert boosted.ratios[40] == plain.ratios[40]
    # (Updates below 1e-7 are lost in rounding.)
    before = {name: r for name, r in plain.ratios[50].items() if 1e-7 < r < 1e-1}
    name = next(n for n, b in boosted.in_force[50].items() if n in before and b == 1.5)
    assert boosted.ratios[50][name] == pytest.approx(1.5 * plain.ratios[50][name], rel=0.25)


def test_the_cap_holds_for_boosted_updates_too() -> None:
    cap = UpdateCap(max_ratio=2e-3, adaptive=False)
    loop = DeepLoop(adamw, boost=LayerBoost(max_boost=50.0, max_change=10.0), cap=cap).run(0, 120)
    assert max(loop.boosts().values()) > 2.0
    assert max(loop.largest) <= 2e-3 * 1.001


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_healthy_run_is_the_same_bit_for_bit(make: Any) -> None:
    data = make_batches(80, poisoned=(11,))
    plain, opted = Loop(make).run(data), Loop(make, boost=LayerBoost()).run(data)
    assert_same_bits(opted.weights(), plain.weights())
    assert_same_bits(opted.optimizer.state_dict(), plain.optimizer.state_dict())
    assert not opted.guard._vanishing._enlarger._copies


@pytest.mark.parametrize(
    ("name", "response"), [("vanishing", VanishingRegularizer()), ("boost", LayerBoost())]
)
def test_who_observes_asks_for_no_response(name: str, response: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be left out with mode='observe'"):
        DeepLoop(mode="observe", **{name: response})


def resumed(loop: Any, fresh: Any) -> Any:
    """``fresh`` goes on where ``loop`` is, through a file."""
    file = io.BytesIO()
    parts = (loop.model.state_dict(), loop.optimizer.state_dict(), loop.guard.state_dict())
    torch.save(parts, file)
    file.seek(0)
    model, optimizer, guard = torch.load(file, weights_only=True)
    fresh.model.load_state_dict(model)
    fresh.optimizer.load_state_dict(optimizer)
    fresh.guard.load_state_dict(guard)
    return fresh


@pytest.mark.parametrize("make", [adamw, fused_adamw])
@pytest.mark.parametrize("at", [41, 44, 75, 101])
def test_a_resumed_run_boosts_as_the_uninterrupted_one(make: Any, at: int) -> None:
    boost = LayerBoost()
    whole = DeepLoop(make, boost=boost).run(0, 130)
    first = DeepLoop(make, boost=boost).run(0, at)
    second = resumed(first, DeepLoop(make, boost=boost)).run(at, 130)
    assert whole.boosts()
    assert second.boosts() == whole.boosts()
    assert_same_bits(second.model.state_dict(), whole.model.state_dict())


class Memory(LightningModule):
    """A recurrent module that has to remember its first input."""

    def __init__(self, make: Callable[[Any], Optimizer] = adamw, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.rnn = nn.RNN(2, 16, **options)
        self.head = nn.Linear(16, 1)
        self.make = make

    def training_step(self, batch: Tensor, batch_idx: int = 0) -> Tensor:
        last = self.rnn(batch)[1][-1]
        return (self.head(last).squeeze(-1) - batch[0, :, 0]).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch))

    def configure_optimizers(self) -> Optimizer:
        return self.make(self.parameters())


def sequences(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(20, 6, 2, generator=generator) for _ in range(count)]


class MemoryLoop:
    def __init__(self, make: Callable[[Any], Optimizer] = adamw, **arguments: Any) -> None:
        self.model = Memory(make)
        self.optimizer = self.model.configure_optimizers()
        self.guard = GuardEngine(self.model, self.optimizer, **arguments)

    def run(self, data: list[Tensor], scaler: Any = None) -> MemoryLoop:
        for batch in data:
            self.optimizer.zero_grad()
            loss = self.model.training_step(batch)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            self.guard.before_step(loss, scaler=scaler)
            if scaler is None:
                self.optimizer.step()
            else:
                scaler.step(self.optimizer)
                scaler.update()
        return self


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("make", [sgd, adamw, fused_adamw])
def test_a_run_with_the_regularizer_resumes_exactly_and_leaves_no_hook(make: Any) -> None:
    data, settings = sequences(12), VanishingRegularizer(every_n_steps=2)
    cap = UpdateCap()  # holds from the first step: copies to go back to are in no checkpoint
    whole = MemoryLoop(make, vanishing=settings, cap=cap).run(data)
    first = MemoryLoop(make, vanishing=settings, cap=cap).run(data[:5])
    second = resumed(first, MemoryLoop(make, vanishing=settings, cap=cap)).run(data[5:])
    plain = MemoryLoop(make).run(data)
    assert_same_bits(second.model.state_dict(), whole.model.state_dict())
    assert not torch.equal(plain.model.rnn.weight_hh_l0, whole.model.rnn.weight_hh_l0)
    assert torch.equal(plain.model.head.weight, whole.model.head.weight) is False
    for loop in (whole, first, second):
        loop.guard.close()
        assert hooks(loop.model) == 0


def test_a_gradient_scaler_changes_nothing_but_rounding() -> None:
    data, settings = sequences(6), VanishingRegularizer()
    scaled = MemoryLoop(sgd, vanishing=settings)
    scaled.run(data, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    plain = MemoryLoop(sgd, vanishing=settings).run(data)
    torch.testing.assert_close(scaled.model.rnn.weight_hh_l0, plain.model.rnn.weight_hh_l0)


def test_a_step_that_is_not_finite_is_skipped_as_ever() -> None:
    data = sequences(6)
    data[3][0, 0, 0] = float("nan")
    loop = MemoryLoop(vanishing=VanishingRegularizer(), boost=LayerBoost()).run(data)
    assert [row.skipped for row in loop.guard.history] == [False] * 3 + [True] + [False] * 2
    assert all(p.isfinite().all() for p in loop.model.parameters())


def fit(guard: GradGuard, **options: Any) -> Memory:
    model = Memory()
    trainer = Trainer(
        max_epochs=2,
        callbacks=[guard],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **options,
    )
    data = sequences(6)
    trainer.fit(model, loader(data[:4]), loader(data[4:]))
    return model


def test_both_are_arguments_of_the_callback() -> None:
    settings = VanishingRegularizer(modules=["rnn"])
    pulled = fit(GradGuard(vanishing=settings, boost=LayerBoost(max_boost=2.0)))
    plain = fit(GradGuard())
    assert not torch.equal(pulled.rnn.weight_hh_l0, plain.rnn.weight_hh_l0)
    assert hooks(pulled) == 0
    with pytest.raises(TypeError, match="vanishing must be a VanishingRegularizer or None"):
        GradGuard(vanishing=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="boost must be a LayerBoost or None"):
        GuardEngine(plain, torch.optim.SGD(plain.parameters(), lr=0.1), boost=4.0)  # type: ignore[arg-type]


def test_a_misspelled_module_ends_the_fit_before_it_starts() -> None:
    with pytest.raises(ValueError, match="got 'rn', which matches none"):
        fit(GradGuard(vanishing=VanishingRegularizer(modules=["rn"])))
