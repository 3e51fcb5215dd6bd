"""A dropped step leaves every bit of parameters and optimizer state as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.measure import NormMeter
from lightning_gradguard.respond import SkipBadSteps
from lightning_gradguard.respond.apply import FusedControls, apply_on_host, runs_fused
from lightning_gradguard.respond.ladder import StepPlan
from lightning_gradguard.respond.skipping import SkipBudget
from tests.models import assert_same_bits
from tests.respond.optimizers import ALL, Make, gradient_steps, weights

MAKE: dict[str, Make] = {
    **ALL,
    "rmsprop loop": lambda p: torch.optim.RMSprop(p, foreach=False),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, fused=True),
    "sgd fused plain": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adam capturable": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3), fused=True),
}
FUSED = [name for name in MAKE if "fused" in name or name == "adam capturable"]
DROP = StepPlan(may_skip=True, skip_limit=100.0, clip_threshold=1.0)


@pytest.fixture
def _no_luck_with_uninitialized_memory() -> Iterator[None]:
    """Memory that was never written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def norm_of(parameters: list[nn.Parameter]) -> torch.Tensor:
    return NormMeter((str(i), p) for i, p in enumerate(parameters)).measure().total


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e3])
@pytest.mark.parametrize("name", MAKE)
def test_a_dropped_step_changes_no_bit(name: str, value: float, at: int) -> None:
    parameters = weights()
    optimizer = MAKE[name](parameters)
    for step, _ in enumerate(gradient_steps(parameters, [1.0] * 4)):
        if step == at:
            break
        optimizer.step()
    before = copy.deepcopy((parameters, optimizer.state_dict()))
    parameters[0].grad[0, 0] = value
    assert apply_on_host(DROP, norm_of(parameters).item(), parameters) == 0.0
    optimizer.step()
    assert_same_bits((parameters, optimizer.state_dict()), before)


@pytest.mark.usefixtures("_no_luck_with_uninitialized_memory")
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e3])
@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("name", FUSED)
def test_a_step_dropped_inside_the_kernel_is_as_if_it_was_never_taken(
    name: str, at: int, value: float
) -> None:
    """The kernel may make its state on a dropped first step: what counts is the next one."""
    runs = []
    for bad_step in (at, None):
        parameters = weights()
        optimizer = MAKE[name](parameters)
        controls = FusedControls(optimizer)
        for step, _ in enumerate(gradient_steps(parameters, [1.0] * 6)):
            if step == bad_step:
                before = copy.deepcopy((parameters, optimizer.state_dict()))
                parameters[0].grad[0, 0] = value
            elif step == at:
                continue
            bounds = StepPlan(may_skip=True, skip_limit=100.0)
            coefficient = controls.apply(bounds, norm_of(parameters))
            optimizer.step()
            controls.restore()
            assert coefficient.item() == (0.0 if step == bad_step else 1.0)
            if step == bad_step:
                assert_same_bits(parameters, before[0])
                assert (
                    at == 0 or optimizer.state_dict()["state"].keys() == before[1]["state"].keys()
                )
        runs.append((parameters, optimizer.state_dict()))
    assert_same_bits(*runs)


@pytest.mark.parametrize("name", FUSED)
def test_the_controls_come_off_again(name: str) -> None:
    parameters = weights()
    optimizer = MAKE[name](parameters)
    controls = FusedControls(optimizer)
    attributes = set(vars(optimizer))
    controls.restore()
    for _ in gradient_steps(parameters, [1.0, 1.0]):
        controls.apply(DROP, norm_of(parameters))
        assert set(vars(optimizer)) == attributes | {"grad_scale", "found_inf"}
        optimizer.step()
        controls.restore()
        controls.restore()
        assert set(vars(optimizer)) == attributes


def test_which_optimizers_run_fused() -> None:
    for name, make in MAKE.items():
        optimizer = make(weights())
        # Before torch 2.13 a fused Adagrad does not take part in this, and is decided on the host.
        takes_part = getattr(optimizer, "_step_supports_amp_scaling", False)
        assert takes_part == (name in FUSED) or "adagrad" in name
        assert runs_fused(optimizer) == (name in FUSED and takes_part), name
    one, other = weights(), weights()
    half = torch.optim.SGD([{"params": one, "fused": True}, {"params": other}], lr=0.1)
    assert not runs_fused(half)


def test_a_zeroed_gradient_is_no_skip() -> None:
    """Why the gradients are set to None: the test above could fail."""
    parameters = weights()
    optimizer = torch.optim.AdamW(parameters)
    for _ in gradient_steps(parameters, [1.0, 0.0]):
        before = copy.deepcopy(parameters)
        optimizer.step()
    assert not torch.equal(parameters[0], before[0])


@given(norm=st.floats(allow_nan=True, allow_infinity=True, min_value=None), limit=st.floats(0, 1e9))
def test_host_device_and_settings_drop_the_same_steps(norm: float, limit: float) -> None:
    norm = abs(torch.tensor(norm, dtype=torch.float32).item())
    limit = torch.tensor(limit, dtype=torch.float32).item()
    plan = StepPlan(may_skip=True, skip_limit=limit)
    optimizer = torch.optim.AdamW(weights(), fused=True)
    controls = FusedControls(optimizer)
    on_device = controls.apply(plan, torch.tensor(norm)).item() == 0.0
    controls.restore()
    assert plan.skips(norm) == on_device == (not norm <= limit)
    assert not StepPlan(skip_limit=limit).skips(norm)


@given(skips=st.lists(st.booleans(), max_size=60), budget=st.integers(1, 10))
def test_the_budget_counts_skips_in_a_row(skips: list[bool], budget: int) -> None:
    counter = SkipBudget(SkipBadSteps(max_consecutive=budget))
    run = 0
    for skipped in skips:
        counter.record(skipped)
        run = run + 1 if skipped else 0
        assert counter.spent == (run >= budget)
    assert (counter.total, counter.consecutive) == (sum(skips), run)
