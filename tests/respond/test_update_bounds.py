"""No tensor moves by more than its cap, whatever the optimizer and the gradients.

What holds exactly: after a step for which a tensor was copied, and for plain SGD between two
measurements of the weights. What holds only nearly is said at each test.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.guard import DEVICE_DELAY
from lightning_gradguard.respond.update_bounds import GradientBound, SampledBound, StepSizeBound
from lightning_gradguard.respond.weight_norms import NEAR_SHARE, REFRESH_EVERY
from tests.respond.optimizers import (
    ALL,
    NORMALIZING,
    OTHERS,
    SGD,
    Bounded,
    gradient_steps,
    weights,
)

CAP = 0.005
ROUNDING = 2e-3  # of the cap: float32 weights, whose last bit is 1e-7 of the weight
# The weight norms of GradientBound are up to REFRESH_EVERY steps old, and so are those by which
# the gradients in the momentum were bounded.
STALE = (1.0 - REFRESH_EVERY * CAP) ** -2

FACTORS = st.lists(
    st.sampled_from([1.0, 1.0, 1.0, -1.0, 1e6, 0.0, 1e-3]), min_size=2 * REFRESH_EVERY, max_size=40
)
JUMPS = st.lists(st.sampled_from([1.0, 1.0, 1000.0, 1e-3]), min_size=40, max_size=40)
SEEDS = st.integers(0, 1000)


def largest_share(
    name: str,
    factors: Sequence[float],
    seed: int,
    jumps: Sequence[float] = (),
    *,
    on_device: bool = False,
) -> float:
    """The largest relative update of a run, as a multiple of the cap."""
    parameters = weights()
    run = Bounded(ALL[name](parameters), CAP, on_device)
    (group,) = run.optimizer.param_groups
    rate, largest = group["lr"], 0.0
    for step, _ in enumerate(gradient_steps(parameters, factors, seed)):
        group["lr"] = rate * (jumps[step] if jumps else 1.0)
        largest = max(largest, *run.step())
    assert all(p.isfinite().all() for p in parameters)
    return largest / CAP


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (SGD, GradientBound),
        ([n for n in NORMALIZING if "momentum" not in n and "centered" not in n], StepSizeBound),
        ([*OTHERS, "rmsprop momentum", "rmsprop centered"], SampledBound),
    ],
    ids=["SGD", "normalizing", "any other"],
)
def test_each_family_gets_its_own_means(names: Sequence[str], kind: type) -> None:
    for name in names:
        assert type(Bounded(ALL[name](weights()), CAP).bound) is kind, name


@pytest.mark.parametrize("name", SGD)
@settings(max_examples=5)
@given(factors=FACTORS, seed=SEEDS)
def test_sgd_on_any_gradients(name: str, factors: list[float], seed: int) -> None:
    decay = 1e-4 * 0.1 / (1.0 - 0.9) / CAP if "decay" in name else 0.0
    assert largest_share(name, factors, seed) <= STALE + decay


@settings(max_examples=10)
@given(factors=FACTORS, jumps=JUMPS, seed=SEEDS)
def test_plain_sgd_on_any_learning_rates(
    factors: list[float], jumps: list[float], seed: int
) -> None:
    assert largest_share("sgd", factors, seed, jumps) <= STALE


def test_momentum_from_a_learning_rate_that_grows_slowly() -> None:
    """A warm-up: the gradients in the momentum were bounded for a rate up to 10 steps older."""
    for name in SGD:
        jumps = [min(1.0, (step + 1) / 100) for step in range(120)]
        assert largest_share(name, [1.0] * 120, 0, jumps) <= 1.5 * STALE, name


def test_momentum_from_a_learning_rate_that_jumps() -> None:
    """A restart of the schedule."""
    assert largest_share("sgd momentum", [1.0] * 40, 0, [1.0] * 20 + [1000.0] * 20) <= 1.5 * STALE


@pytest.mark.parametrize("name", [n for n in NORMALIZING if n not in ("rmsprop", "nadam")])
@settings(max_examples=5)
@given(factors=FACTORS, jumps=JUMPS, seed=SEEDS)
def test_normalizing_optimizers(
    name: str, factors: list[float], jumps: list[float], seed: int
) -> None:
    """Exact for the tensors that are looked at.

    The others expect less than NEAR_SHARE of the cap, and Adam's largest step, a spike after a
    long calm, is (1 - beta1) / sqrt(1 - beta2) = 3.2 of what is expected.
    """
    allowed = max(1.0, NEAR_SHARE * 0.1 / math.sqrt(0.001)) * STALE
    assert largest_share(name, factors, seed, jumps) <= allowed


@pytest.mark.parametrize(("name", "leap"), [("rmsprop", 10.0), ("nadam", 18.0)])
@settings(max_examples=5)
@given(factors=FACTORS, jumps=JUMPS, seed=SEEDS)
def test_normalizing_optimizers_that_leap_on_a_spike(
    name: str, leap: float, factors: list[float], jumps: list[float], seed: int
) -> None:
    """Like Adam, with a larger step after a long calm: RMSprop's is 1 / sqrt(1 - alpha)."""
    assert largest_share(name, factors, seed, jumps) <= NEAR_SHARE * leap * STALE


@pytest.mark.parametrize("name", [*OTHERS, "rmsprop momentum", "rmsprop centered"])
def test_any_other_optimizer(name: str) -> None:
    """Nearly: a tensor is copied when its forecast is NEAR_SHARE of the cap, and a forecast from
    64 of 160 elements is off by some 20 %. These runs stay below the cap altogether."""
    # Two of them use a learning rate at another time than in the step for which it was set.
    any_rate = name not in ("asgd", "rprop")
    for seed in range(8):
        draw = random.Random(seed).choices
        factors = draw([1.0, 1.0, 1.0, -1.0, 1e6, 0.0, 1e-3], k=40)
        jumps = draw([1.0, 1.0, 1000.0, 1e-3], k=40) if any_rate and seed % 2 else []
        assert largest_share(name, factors, seed, jumps) <= 1.0 + ROUNDING


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("name", [*OTHERS, "rmsprop momentum", "rmsprop centered"])
def test_a_cap_that_widens_at_once(name: str, on_device: bool) -> None:
    """As after a trial in vain: updates that were shrunk say how large the next ones will be."""
    parameters = weights()
    run = Bounded(ALL[name](parameters), CAP, on_device)
    for group in run.optimizer.param_groups:
        group["lr"] *= 10.0
    for step, _ in enumerate(gradient_steps(parameters, [1.0] * 60)):
        run.max_ratio = CAP / 20 if 5 <= step % 30 < 20 else CAP
        assert max(run.step()) <= run.max_ratio * (1.0 + ROUNDING)


@pytest.mark.parametrize("factor", [1e3, 1e6])
@pytest.mark.parametrize("name", ["radam", "rmsprop", "rmsprop momentum", "rmsprop centered"])
def test_the_first_steps_of_averages_that_start_at_zero(name: str, factor: float) -> None:
    """RAdam does not normalize at first; RMSprop's first step is ten times its learning rate."""
    assert largest_share(name, [factor] * 8, 0) <= 1.0 + ROUNDING


def test_nothing_known_after_a_step_without_gradient() -> None:
    """A tensor that did not move may leap in the next step: zero times any growth is zero."""
    factors = [1.0] * 4 + [0.0] * 20 + [1.0, 1e6, 1.0]
    for name in OTHERS:
        assert largest_share(name, factors, 0) <= 1.0 + ROUNDING, name


# -- on the device --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NORMALIZING, *OTHERS])
@settings(max_examples=3)
@given(factors=st.lists(st.sampled_from([1.0, -1.0, 0.5]), min_size=40, max_size=40), seed=SEEDS)
def test_on_the_device(name: str, factors: list[float], seed: int) -> None:
    assert largest_share(name, factors, seed, on_device=True) <= 1.0 + ROUNDING


@pytest.mark.parametrize("name", SGD)
@settings(max_examples=3)
@given(factors=st.lists(st.sampled_from([1.0, -1.0]), min_size=40, max_size=40), seed=SEEDS)
def test_sgd_on_the_device_while_gradients_grow_slowly(
    name: str, factors: list[float], seed: int
) -> None:
    """What is read is DEVICE_DELAY steps old: it holds while gradients do not double in them."""
    decay = 1e-4 * 0.1 / (1.0 - 0.9) / CAP if "decay" in name else 0.0
    assert largest_share(name, factors, seed, on_device=True) <= STALE + decay


def test_sgd_on_the_device_on_a_spike() -> None:
    """Later than the last reading, and before the clip has a baseline that could bound it."""
    factors = [1e-5] * 10 + [1e3] + [1e-5] * DEVICE_DELAY
    assert largest_share("sgd fused", factors, 0, on_device=True) <= STALE
