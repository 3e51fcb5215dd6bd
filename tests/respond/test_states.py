"""Everything with a state continues from it exactly, and the state is plain values.

The bounds on updates are in ``test_update_bounds_exact.py``, beside the optimizers they belong to.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.respond import LearningRateBackoff, SkipBadSteps, UpdateCap
from lightning_gradguard.respond.ladder import Ladder, LadderSettings
from lightning_gradguard.respond.learning_rate import LearningRateScale
from lightning_gradguard.respond.ratio_schedule import RatioSchedule
from lightning_gradguard.respond.skipping import SkipBudget
from lightning_gradguard.respond.weight_norms import WeightNorms
from tests.models import Regression, assert_same_bits, make_batches
from tests.respond.optimizers import weights

BATCHES = make_batches(40, poisoned=(11, 12))
FINDING = Finding(Pathology.DIVERGING, Severity.WARNING, "loss", 0, {}, "words")


class Scenario:
    """An object with a state, and what it does in one step.

    Args:
        make: Makes it afresh.
        advance: Does a step and returns what can be seen of it.
    """

    def __init__(self, make: Callable[[], Any], advance: Callable[[Any, int], Any]) -> None:
        self.make = make
        self.advance = advance


def weight_norms(subject: WeightNorms, step: int) -> Any:
    subject._parameters[0].data.fill_(float(step))
    return subject.refresh(), subject.norms_P.tolist()


def engine(mode: str) -> Scenario:
    def make() -> GuardEngine:
        model = Regression()
        return GuardEngine(model, model.configure_optimizers(), mode=mode)

    def advance(guard: GuardEngine, step: int) -> Any:
        """The weights are given, so that only what the guard carries can differ."""
        model = Regression()
        guard._model.load_state_dict(model.state_dict())
        guard._optimizer.zero_grad()
        loss = guard._model.loss(BATCHES[step])
        loss.backward()
        guard.before_step(loss)
        guard._optimizer.state.clear()
        guard._optimizer.step()
        parameters = [p.detach().clone() for p in guard._model.parameters()]
        return parameters, vars(guard.history[-1]), guard.counts["skipped_steps"]

    return Scenario(make, advance)


def ladder(subject: Ladder, step: int) -> Any:
    norm = math.nan if step in (11, 12) else 1.0 + step % 5
    subject.observe(
        step,
        total_norm=norm,
        loss=float(step),
        skipped=step in (11, 12),
        large_share=0.5,
        findings=[FINDING] if step in (3, 25) else [],
    )
    return vars(subject.plan())


SCENARIOS = {
    "SkipBudget": Scenario(
        lambda: SkipBudget(SkipBadSteps(max_consecutive=3)),
        lambda s, step: (s.record(step % 7 > 2), s.spent, s.total),
    ),
    "LearningRateScale": Scenario(
        lambda: LearningRateScale(LearningRateBackoff(cooldown_steps=3, recovery_steps=4)),
        lambda s, step: (s.cut() if step % 11 == 5 else s.advance(healthy=True), s.scale),
    ),
    "RatioSchedule": Scenario(
        lambda: RatioSchedule(UpdateCap(window=3)),
        lambda s, step: (s.advance(float(step % 13), 0.5), s.ratio),
    ),
    "Ladder": Scenario(lambda: Ladder(LadderSettings(cap=UpdateCap(window=3))), ladder),
    "WeightNorms": Scenario(lambda: WeightNorms(weights()), weight_norms),
    "GuardEngine, protecting": engine("protect"),
    "GuardEngine, observing": engine("observe"),
}


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            assert type(key) in (str, int), where
            assert_plain(item, f"{where}.{key}")
    elif isinstance(value, list):
        for item in value:
            assert_plain(item, where)
    else:
        assert value is None or type(value) in (bool, int, float, str), f"{where}: {value!r}"


@pytest.mark.parametrize("at", [0, 1, 2, 12, 30])
@pytest.mark.parametrize("name", SCENARIOS)
def test_it_continues_exactly(name: str, at: int) -> None:
    scenario = SCENARIOS[name]
    whole, part = scenario.make(), scenario.make()
    for step in range(40):
        if step == at:
            state = part.state_dict()
            assert_plain(state, name)
            part = scenario.make()
            part.load_state_dict(through_a_file(state))
            assert_same_bits(part.state_dict(), state)
        assert_same_bits(
            scenario.advance(part, step), scenario.advance(whole, step), f"step {step}"
        )


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_saved_state_does_not_change_afterwards(name: str) -> None:
    scenario = SCENARIOS[name]
    subject = scenario.make()
    for step in range(20):
        scenario.advance(subject, step)
    state = subject.state_dict()
    saved = through_a_file(state)
    for step in range(20, 40):
        scenario.advance(subject, step)
    assert_same_bits(state, saved)
