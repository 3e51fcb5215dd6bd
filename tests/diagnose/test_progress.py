"""The functional gate: what counts as a run that does not learn."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.diagnose.progress import LossProgress
from lightning_gradguard.diagnose.stages import MAX_POINTS, LossStages
from lightning_gradguard.diagnose.thresholds import Thresholds
from tests.diagnose.traces import FLAT, HEALTHY, Make, learned_the_mean, noisy_labels

T = Thresholds()
few = settings(max_examples=25)
LEARNS = ("falling", "slow_progress", "four_orders", "epochs", "log_likelihood", "converged")


def follow(losses: Iterable[float], progress: LossProgress | None = None) -> LossProgress:
    progress = progress or LossProgress(T)
    for loss in losses:
        progress.update(loss)
    return progress


def losses(make: Make, seed: int, n: int) -> list[float]:
    return [loss for loss, _ in make(random.Random(seed), n)]


def stuck_share(make: Make, n: int, seeds: int = 10) -> float:
    return sum(follow(losses(make, seed, n)).is_stuck() for seed in range(seeds)) / seeds


# ---- the series ---------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100), max_size=400))
def test_the_series_keeps_the_mean_in_bounded_memory(levels: list[float]) -> None:
    stages = LossStages(T)
    for level in levels:
        stages.enter(level)
    assert len(stages.points) < MAX_POINTS
    covered = levels[: len(stages.points) * stages.stride]
    assert len(levels) - len(covered) < stages.stride
    for number, point in enumerate(stages.points):
        part = covered[number * stages.stride : (number + 1) * stages.stride]
        assert point == pytest.approx(math.fsum(part) / len(part), abs=1e-9)


def test_half_a_full_series_at_least_is_kept() -> None:
    stages = LossStages(T)
    for level in range(10_000):
        stages.enter(float(level))
    assert MAX_POINTS // 2 <= len(stages.points) < MAX_POINTS


@few
@given(seed=st.integers(0, 1000), cut=st.integers(0, 900))
def test_a_restored_gate_continues_bit_for_bit(seed: int, cut: int) -> None:
    run = losses(random.Random(seed).choice([*HEALTHY.values(), *FLAT.values()]), seed, 900)
    whole, first, second = follow([]), follow(run[:cut]), LossProgress(T)
    first.new_phase()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    follow(run[:cut], whole).new_phase()
    for loss in run[cut:]:
        assert whole.update(loss) == second.update(loss)
        assert whole.is_stuck() == second.is_stuck()
        assert whole.is_worse() == second.is_worse()
    assert whole.state_dict() == second.state_dict()


# ---- stuck --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [128, 300, 1000, 3000])
@pytest.mark.parametrize("name", ["noisy_plateau", "constant"])
def test_a_loss_that_never_moved_is_stuck(name: str, n: int) -> None:
    assert stuck_share(FLAT[name], n) >= 0.8


@pytest.mark.parametrize("name", LEARNS)
def test_a_loss_that_falls_is_not_stuck_however_slowly(name: str) -> None:
    # At 1% in 100 steps, 2% of noise hide the first 250 of them.
    for n in (400, 700, 1500, 3000):
        assert stuck_share(HEALTHY[name], n) == 0.0


@pytest.mark.parametrize("steps", [30, 60, 100])
def test_a_run_that_learned_only_the_mean_is_stuck_in_the_end(steps: int) -> None:
    def make(rng: random.Random, n: int) -> list[tuple[float, float]]:
        return learned_the_mean(rng, n, steps)

    assert stuck_share(make, 2 * steps) == 0.0
    assert stuck_share(make, 20 * steps) >= 0.7


def test_a_run_that_improved_for_a_tenth_of_its_steps_is_not_stuck() -> None:
    """What tells noisy labels from a mean of targets is only how long the loss fell."""
    for n in (300, 600, 1000, 2000, 3000):
        for share in (0.3, 0.5, 0.75, 1.0):
            found = [
                follow(losses(noisy_labels, seed, n)[: int(share * n)]).is_stuck()
                for seed in range(5)
            ]
            assert not any(found)
    for seed in range(5):
        much_later = losses(noisy_labels, seed, 300) + [
            1.38 * math.exp(random.Random(k).gauss(0, 0.05)) for k in range(3000)
        ]
        assert follow(much_later).has_fallen()
        assert follow(much_later[:300]).has_fallen()


def test_a_drop_ends_it_at_once() -> None:
    rng = random.Random(0)
    progress = follow(2.3 + rng.gauss(0, 0.05) for _ in range(640))
    assert progress.is_stuck()
    follow((1.9 + rng.gauss(0, 0.05) for _ in range(8)), progress)
    assert not progress.is_stuck()


def test_what_fell_below_a_tenth_has_learned() -> None:
    rng = random.Random(0)
    start = [2.3] * 3
    for level, expected in ((0.3, True), (0.2, False)):
        run = start + [level * math.exp(rng.gauss(0, 0.05)) for _ in range(1000)]
        assert follow(run).is_stuck() is expected


def test_a_run_that_blows_up_at_once_and_comes_back_has_learned_nothing() -> None:
    rng = random.Random(0)
    run = [2.3, 400.0, 900.0, 90.0, 30.0] + [2.4 + rng.gauss(0, 0.05) for _ in range(1000)]
    assert follow(run).is_stuck()


def test_noise_as_large_as_the_level_proves_nothing() -> None:
    for seed in range(10):
        rng = random.Random(seed)
        assert not follow(math.exp(rng.gauss(0, 2.0)) for _ in range(300)).is_stuck()


@few
@given(seed=st.integers(0, 1000), exponent=st.floats(-9, 9))
def test_the_unit_of_the_loss_does_not_matter(seed: int, exponent: float) -> None:
    run = losses(random.Random(seed).choice([*HEALTHY.values(), *FLAT.values()]), seed, 600)
    scaled = [10.0**exponent * loss for loss in run]
    assert follow(run).is_stuck() == follow(scaled).is_stuck()


def test_a_negative_loss_is_stuck_and_falls_like_any_other() -> None:
    rng = random.Random(0)
    flat = [-5.0 + rng.gauss(0, 0.1) for _ in range(1000)]
    assert follow(flat).is_stuck()
    assert not follow(loss - 0.001 * step for step, loss in enumerate(flat)).is_stuck()
    assert follow([-3.0] * 1000).is_stuck()


# ---- a new phase --------------------------------------------------------------------------------


def phases(height: float, *, told: bool) -> list[bool]:
    """Whether the loss was worse, at each step after a restart that lifts it."""
    rng = random.Random(0)
    progress = follow(0.1 + 2.2 * math.exp(-t / 40) + rng.gauss(0, 0.01) for t in range(400))
    if told:
        progress.new_phase()
    worse = []
    for t in range(300):
        rise = height * min(1.0, t / 20) * math.exp(-max(0, t - 20) / 100)
        progress.update(0.1 + rise + rng.gauss(0, 0.01))
        worse.append(progress.is_worse())
    return worse


def test_the_rise_after_a_restart_is_no_loss_of_progress() -> None:
    assert any(phases(1.4, told=False))
    assert not any(phases(1.4, told=True))


def test_a_restart_that_ruins_the_run_is() -> None:
    assert any(phases(4.0, told=True)[:64])


def test_a_new_phase_keeps_the_evidence_of_the_whole_run() -> None:
    progress = follow(2.3 * 0.99**t for t in range(400))
    early, best = progress.early, progress.best
    progress.new_phase()
    follow([1.0] * 200, progress)
    assert (progress.early, progress.best) == (early, best)
