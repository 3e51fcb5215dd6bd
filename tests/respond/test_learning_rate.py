"""The learning rate is scaled for one step, and nobody but the optimizer sees it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

from lightning_gradguard.respond import LearningRateBackoff
from lightning_gradguard.respond.learning_rate import LearningRateScale, ScaledLearningRate
from tests.models import assert_same_bits
from tests.respond.optimizers import gradient_steps, weights

SETTINGS = st.builds(
    LearningRateBackoff,
    factor=st.floats(0.01, 0.99),
    min_scale=st.floats(1e-3, 1.0),
    cooldown_steps=st.integers(0, 10),
    recovery_steps=st.integers(1, 10),
)
# True: cut because of a finding; False or None: a step that was healthy, or not.
EVENTS = st.lists(st.sampled_from(["cut", "healthy", "unhealthy"]), max_size=100)


def feed(scale: LearningRateScale, event: str) -> bool:
    if event == "cut":
        return scale.cut() or scale.advance(healthy=False)
    return scale.advance(healthy=event == "healthy")


@given(settings=SETTINGS, events=EVENTS)
def test_the_scale_never_leaves_its_range(settings: LearningRateBackoff, events: list[str]) -> None:
    scale = LearningRateScale(settings)
    for event in events:
        before = scale.scale
        changed = feed(scale, event)
        assert settings.min_scale <= scale.scale <= 1.0
        assert changed == (scale.scale != before) or math.isclose(scale.scale, before)
        if event == "cut":
            assert scale.scale <= before
        else:
            assert scale.scale >= before


@given(settings=SETTINGS, events=EVENTS)
def test_it_recovers_completely(settings: LearningRateBackoff, events: list[str]) -> None:
    scale = LearningRateScale(settings)
    for event in events:
        feed(scale, event)
    notches = 2 * math.log(settings.min_scale) / math.log(settings.factor) + 2
    for _ in range(settings.recovery_steps * math.ceil(notches)):
        scale.advance(healthy=True)
    assert scale.scale == 1.0


@given(settings=SETTINGS, events=EVENTS, at=st.integers(0, 100))
def test_state_round_trip(settings: LearningRateBackoff, events: list[str], at: int) -> None:
    whole = LearningRateScale(settings)
    part = LearningRateScale(settings)
    for number, event in enumerate(events):
        if number == at:
            part, state = LearningRateScale(settings), part.state_dict()
            part.load_state_dict(state)
        assert feed(whole, event) == feed(part, event)
        assert whole.state_dict() == part.state_dict()


def test_no_second_cut_before_the_first_could_show() -> None:
    settings = LearningRateBackoff(factor=0.5, min_scale=0.01, cooldown_steps=5)
    scale = LearningRateScale(settings)
    cuts = []
    for step in range(12):
        if scale.cut():
            cuts.append(step)
        else:
            scale.advance(healthy=False)
    # a step with a cut does not count towards the wait for the next one
    assert cuts == [0, 6]
    assert scale.scale == 0.25


def two_groups(make: Callable[..., Optimizer], rate: Any) -> Optimizer:
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    return make([{"params": [first]}, {"params": [second], "lr": 0.3}], lr=rate)


@given(scale=st.floats(1e-6, 1.0), rate=st.floats(1e-9, 1e3))
def test_restoring_is_exact(scale: float, rate: float) -> None:
    optimizer = two_groups(SGD, rate)
    scaled = ScaledLearningRate(optimizer)
    for _ in range(3):
        scaled.apply(scale)
        assert [g["lr"] for g in optimizer.param_groups] == [rate * scale, 0.3 * scale]
        scaled.restore()
        scaled.restore()
        assert [g["lr"] for g in optimizer.param_groups] == [rate, 0.3]


def test_applying_twice_scales_once() -> None:
    optimizer = two_groups(SGD, 0.1)
    scaled = ScaledLearningRate(optimizer)
    scaled.apply(0.5)
    scaled.apply(0.25)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1 * 0.25, 0.3 * 0.25]
    scaled.apply(1.0)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.3]


def test_a_tensor_is_scaled_in_place() -> None:
    """A captured graph holds that tensor."""
    rate = torch.tensor(0.1)
    optimizer = Adam(weights(), lr=rate, fused=True)
    scaled = ScaledLearningRate(optimizer)
    scaled.apply(0.5)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.05)
    scaled.restore()
    assert torch.equal(rate, torch.tensor(0.1))


def test_a_tensor_that_groups_share_is_scaled_once() -> None:
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Adam([{"params": [first]}, {"params": [second]}], lr=torch.tensor(0.1))
    scaled = ScaledLearningRate(optimizer)
    for _ in range(3):
        scaled.apply(0.5)
        assert [g["lr"].item() for g in optimizer.param_groups] == pytest.approx([0.05, 0.05])
        scaled.restore()
        assert all(torch.equal(g["lr"], torch.tensor(0.1)) for g in optimizer.param_groups)


def test_a_group_added_while_scaled_keeps_its_rate() -> None:
    optimizer = two_groups(SGD, 0.1)
    scaled = ScaledLearningRate(optimizer)
    scaled.apply(0.5)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.7})
    scaled.restore()
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.3, 0.7]


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (t + 1)]),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=[0.2, 0.5], total_steps=40),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=2, factor=0.5),
    "WarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, T_0=7),
}


@pytest.mark.parametrize("make", [SGD, Adam], ids=["SGD", "Adam"])
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_ever_sees_the_scale(
    name: str, make: Callable[..., Optimizer], rate: Any
) -> None:
    schedules = []
    for scale in (1.0, 0.125):
        own = rate.clone() if isinstance(rate, torch.Tensor) else rate
        optimizer = two_groups(make, own)
        schedule = SCHEDULES[name](optimizer)
        scaled = ScaledLearningRate(optimizer)
        rates = []
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        for step, _ in enumerate(gradient_steps(parameters, [1.0] * 30)):
            scaled.apply(scale)
            optimizer.step()
            scaled.restore()
            schedule.step(*([1.0 + step] if name == "ReduceLROnPlateau" else []))
            rates.append([float(g["lr"]) for g in optimizer.param_groups])
        schedules.append((rates, schedule.state_dict().get("_last_lr")))
    assert_same_bits(schedules[1], schedules[0])
    assert len({tuple(r) for r in schedules[0][0]}) > 2, "the schedule did nothing"
