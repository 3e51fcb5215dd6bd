"""Learning rates that leap are followed by degrees; all others as they are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    OneCycleLR,
    StepLR,
)

from lightning_gradguard import GuardEngine
from lightning_gradguard.respond import LearningRateBackoff
from lightning_gradguard.respond.ladder import Ladder, LadderSettings
from lightning_gradguard.respond.rate_jumps import FollowedRate

RATES = st.lists(
    st.one_of(st.floats(1e-6, 1e3), st.just(0.0), st.just(math.nan)), min_size=1, max_size=40
)


def follow(rates: list[float], max_leap: float = 8.0) -> list[float]:
    followed = FollowedRate(max_leap)
    return [followed.follow([rate]) for rate in rates]


@given(rates=RATES)
def test_a_rate_is_never_raised(rates: list[float]) -> None:
    assert all(0.0 < scale <= 1.0 for scale in follow(rates))


@given(rates=RATES, power=st.integers(-10, 10))
def test_only_ratios_count(rates: list[float], power: int) -> None:
    assert follow([rate * 2.0**power for rate in rates]) == follow(rates)


@given(rates=RATES, at=st.integers(0, 40))
def test_state_round_trip(rates: list[float], at: int) -> None:
    expected, followed = follow(rates), FollowedRate(8.0)
    for number, rate in enumerate(rates):
        if number == at:
            state = followed.state_dict()
            followed = FollowedRate(8.0)
            followed.load_state_dict(state)
        assert followed.follow([rate]) == expected[number]


def test_a_leap_takes_as_many_steps_as_were_said_and_then_is_over() -> None:
    followed = FollowedRate(8.0)
    for rate in [0.1] * 12 + [100.0]:
        followed.follow([rate])
    left = followed.steps_left
    assert left == pytest.approx(math.log(1000) / math.log(1.05), abs=2)
    scales = [followed.follow([100.0]) for _ in range(left)]
    assert scales[-2] < 1.0
    assert scales[-1] == 1.0
    assert scales == sorted(scales)


def test_a_slip_that_is_undone_has_hardly_raised_the_rate() -> None:
    rates = [0.1] * 20 + [100.0] * 10 + [0.1] * 3
    real = [rate * scale for rate, scale in zip(rates, follow(rates), strict=True)]
    assert max(real) < 0.17
    assert real[-3:] == [0.1] * 3


def test_one_group_that_leaps_alone_is_followed_at_once() -> None:
    followed = FollowedRate(8.0)
    for _ in range(20):
        followed.follow([0.1, 1e-6])
    assert followed.follow([0.1, 0.1]) == 1.0


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: StepLR(o, 10, gamma=0.01),
        lambda o: CosineAnnealingLR(o, 20),
        lambda o: CosineAnnealingWarmRestarts(o, 15, eta_min=1e-9),
        lambda o: OneCycleLR(o, max_lr=1.0, total_steps=60),
        lambda o: LinearLR(o, start_factor=1e-3, total_iters=20),
    ],
    ids=["step", "cosine", "restarts", "one-cycle", "warm-up"],
)
def test_ordinary_schedules_are_followed_at_once(schedule) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    scheduler, followed = schedule(optimizer), FollowedRate(8.0)
    for step in range(50):
        scale = followed.follow([optimizer.param_groups[0]["lr"]])
        assert scale == 1.0, step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("max_leap", [8.0, math.inf])
def test_the_engine_holds_a_leap_back_and_says_so(max_leap: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rung = LearningRateBackoff(max_leap=max_leap)
    guard = GuardEngine(
        model, optimizer, clip=None, cap=None, skip=None, backoff=rung, rollback=None
    )
    for step in range(30):
        optimizer.param_groups[0]["lr"] = 1.0 if 15 <= step < 20 else 1e-3
        optimizer.zero_grad()
        loss = model(torch.ones(8, 4)).square().mean()
        loss.backward()
        guard.before_step(loss)
        rate = 1.0 if 15 <= step < 20 else 1e-3
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate * guard_scale(guard))
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == rate  # the schedule sees its own
    scales = [row.lr_scale for row in guard.history]
    said = [action.message for action in guard.actions]
    if max_leap == 8.0:
        assert scales[15] == pytest.approx(1.05e-3)
        assert scales[20:] == [1.0] * 10
        assert len(said) == 1
        assert said[0].startswith("The learning rate leaps to 1 at step 15; it is followed")
    else:
        assert scales == [1.0] * 30
        assert said == []


def test_the_rate_that_is_named_is_that_of_a_group_that_moves() -> None:
    ladder = Ladder(LadderSettings())
    for step in range(15):
        assert ladder.follow(step, [0.0, 1e-3]) == []
    (action,) = ladder.follow(15, [0.0, 1.0])
    assert action.message.startswith("The learning rate leaps to 1 at step 15")


def guard_scale(guard: GuardEngine) -> float:
    return guard._pipeline.plan.lr_scale
