"""Synthetic runs: (loss, total gradient norm) per step, healthy and failing, from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable

from lightning_gradguard.diagnose import Detector, Finding, Observation, default_detectors
from lightning_gradguard.readings import ModelFacts

Trace = list[tuple[float, float]]
Make = Callable[[random.Random, int], Trace]


def diagnose(
    trace: Iterable[tuple[float | None, float]],
    detectors: list[Detector] | None = None,
    *,
    planned: int | None = None,
    phases: Collection[int] = (),
) -> list[Finding]:
    """Runs the detectors over a trace and returns all findings; new phases begin at `phases`."""
    detectors = default_detectors() if detectors is None else detectors
    findings: list[Finding] = []
    model = ModelFacts(planned_steps=planned)
    for step, (loss, norm) in enumerate(trace):
        observation = Observation(step, loss, norm, new_phase=step in phases, model=model)
        for detector in detectors:
            findings += detector.observe(observation)
    return findings


def log_normal(rng: random.Random, sigma: float) -> float:
    return math.exp(rng.gauss(0.0, sigma))


def curve(t: int, n: int, start: float = 2.3, end: float = 0.1, rate: float = 6.0) -> float:
    """The usual shape of a training loss."""
    return end + (start - end) * math.exp(-rate * t / n)


# ---- healthy ------------------------------------------------------------------------------------


def falling(rng: random.Random, n: int) -> Trace:
    return [(curve(t, n) * (1 + rng.gauss(0, 0.1)), log_normal(rng, 0.3)) for t in range(n)]


def warm_up(rng: random.Random, n: int) -> Trace:
    """Loss flat and gradient rising while the learning rate warms up, then both fall."""
    out = []
    for t in range(n):
        up = min(1.0, t / 300)
        loss = 2.3 * (1 + rng.gauss(0, 0.02)) if t < 300 else curve(t - 300, n)
        out.append((loss + rng.gauss(0, 0.03), (0.2 + 3 * up) * log_normal(rng, 0.2)))
    return out


def outlier_batches(rng: random.Random, n: int) -> Trace:
    """One batch in 300 is 10 times as hard and has 100 times the gradient."""
    out = []
    for loss, norm in falling(rng, n):
        out.append((loss * 10, norm * 100) if rng.random() < 1 / 300 else (loss, norm))
    return out


def plateau_then_drop(rng: random.Random, n: int) -> Trace:
    """The gradient grows 1000-fold as the run leaves a saddle, then the loss falls."""
    out = []
    leave, fall = n // 3, 40
    for t in range(n):
        rise = min(1.0, max(0.0, (t - leave + 60) / 60))
        loss = 2.3 if t < leave else 2.3 * math.exp(-(t - leave) / fall) + 0.2
        norm = 1e-3 * math.exp(6.9 * rise) if t < leave + fall else 0.1
        out.append((min(loss, 2.3) + rng.gauss(0, 0.02), norm * log_normal(rng, 0.2)))
    return out


def converged(rng: random.Random, n: int) -> Trace:
    """Loss and gradient go to zero over eight decades; only noise is left."""
    out = []
    for t in range(n):
        level = max(1e-8, math.exp(-40 * t / n))
        out.append((2.3 * level * log_normal(rng, 0.7), level * log_normal(rng, 1.0)))
    return out


def heavy_tailed(rng: random.Random, n: int) -> Trace:
    """Log-normal losses with sigma 1, as with batches of one or two."""
    return [(curve(t, n, 2.3, 1.0) * log_normal(rng, 1.0), log_normal(rng, 1.0)) for t in range(n)]


def student_t(rng: random.Random, n: int) -> Trace:
    """Losses and log-norms with two degrees of freedom: no variance."""

    def t2() -> float:
        return rng.gauss(0, 1) / math.sqrt(rng.expovariate(1.0))

    return [
        (curve(t, n) + 0.05 * t2(), math.exp(min(50.0, max(-50.0, 0.3 * t2())))) for t in range(n)
    ]


def four_orders(rng: random.Random, n: int) -> Trace:
    return [
        (100 * math.exp(-9.2 * t / n) * log_normal(rng, 0.2), log_normal(rng, 0.3))
        for t in range(n)
    ]


def step_schedule(rng: random.Random, n: int) -> Trace:
    """The learning rate is cut twice: the loss drops at once and the gradient changes level."""
    out = []
    for t in range(n):
        phase = (t > n // 3) + (t > 2 * n // 3)
        loss = curve(t, n // 3, 2.3, 0.6) / 3**phase
        out.append((loss * log_normal(rng, 0.1), 4**phase * log_normal(rng, 0.2)))
    return out


def warm_restarts(rng: random.Random, n: int) -> Trace:
    """Every fifth of the run the learning rate jumps up: loss 0.1 -> 0.5, gradient x 5."""
    cycle = n // 5
    out = []
    for t in range(n):
        k, u = t // cycle, (t % cycle) / cycle
        start = 2.3 if k == 0 else 0.55
        loss = 0.08 + (start - 0.08) * math.exp(-5 * u)
        norm = 0.3 + 1.5 * math.exp(-5 * u)
        out.append((loss * log_normal(rng, 0.15), norm * log_normal(rng, 0.3)))
    return out


def log_likelihood(rng: random.Random, n: int) -> Trace:
    """A negative log-likelihood of continuous data: from above zero to far below it."""
    return [
        (50 - 1000 * (1 - math.exp(-5 * t / n)) + rng.gauss(0, 15), 20 * log_normal(rng, 0.4))
        for t in range(n)
    ]


def slow_growth(rng: random.Random, n: int) -> Trace:
    """The gradient grows 30-fold over the run while the loss falls, as in many language models."""
    return [
        (curve(t, n) * log_normal(rng, 0.05), math.exp(3.4 * t / n) * log_normal(rng, 0.2))
        for t in range(n)
    ]


def hinge(rng: random.Random, n: int) -> Trace:
    """More and more steps have a loss and gradient of exactly zero."""
    out = []
    for t in range(n):
        zero = rng.random() < 0.9 * t / n
        loss = 0.0 if zero else curve(t, n, 1.0, 0.05) * log_normal(rng, 0.5)
        out.append((loss, 0.0 if zero else log_normal(rng, 0.5)))
    return out


def correlated(rng: random.Random, n: int) -> Trace:
    """Slow waves in loss and gradient (AR(1) with a memory of 50 steps)."""
    wave = 0.0
    out = []
    for t in range(n):
        wave = 0.98 * wave + rng.gauss(0, 0.2 * 0.1)
        noise = rng.gauss(0, 0.05)
        out.append((curve(t, n, 2.3, 0.8) * math.exp(wave + noise), math.exp(6 * wave + 4 * noise)))
    return out


def correlated_plateau(rng: random.Random, n: int) -> Trace:
    """The same waves, smaller, around a loss that does not fall."""
    wave = 0.0
    out = []
    for _ in range(n):
        wave = 0.98 * wave + rng.gauss(0, 0.2 * 0.05)
        out.append((2.3 * math.exp(wave + rng.gauss(0, 0.02)), log_normal(rng, 0.3)))
    return out


def batch_of_one(rng: random.Random, n: int) -> Trace:
    """Mostly tiny losses; as long as the run is young, every third example is wrong."""
    out = []
    for t in range(n):
        wrong = rng.random() < curve(t, n, 0.6, 0.1)
        loss = 2.3 * log_normal(rng, 0.5) if wrong else 0.02 * log_normal(rng, 1.5)
        out.append((loss, 10 * loss * log_normal(rng, 0.3)))
    return out


def epochs(rng: random.Random, n: int) -> Trace:
    """A sawtooth: the loss drops when an epoch begins and creeps up within it."""
    length = 200
    out = []
    for t in range(n):
        saw = 1 + 0.3 * (t % length) / length
        out.append((curve(t, n, 2.3, 0.2) * saw * log_normal(rng, 0.1), saw * log_normal(rng, 0.2)))
    return out


def unfreezing(rng: random.Random, n: int) -> Trace:
    """The head alone until a third of the run, then the whole model: 30 times the gradient."""
    out = []
    for t in range(n):
        k = t - n // 3
        loss = 1.3 + math.exp(-30 * t / n) if k < 0 else 0.2 + 1.25 * math.exp(-6 * k / n)
        norm = 0.1 if k < 0 else 3.0
        out.append((loss * log_normal(rng, 0.05), norm * log_normal(rng, 0.3)))
    return out


def slow_progress(rng: random.Random, n: int) -> Trace:
    """1% in 100 steps, beneath noise of 2%."""
    return [
        (2.3 * 0.99 ** (t / 100) * log_normal(rng, 0.02), 0.3 * log_normal(rng, 0.3))
        for t in range(n)
    ]


def plateau_of_a_fifth(rng: random.Random, n: int) -> Trace:
    """As `plateau_then_drop`, after a fifth of the run and at once."""
    leave = n // 5
    out = []
    for t in range(n):
        rise = min(1.0, max(0.0, (t - leave + 60) / 60))
        loss = 2.3 if t < leave else 2.3 * math.exp(-(t - leave) / 40) + 0.2
        norm = 1e-3 * math.exp(6.9 * rise) if t < leave + 40 else 0.1
        out.append((min(loss, 2.3) + rng.gauss(0, 0.05), norm * log_normal(rng, 0.2)))
    return out


def noisy_labels(rng: random.Random, n: int) -> Trace:
    """Falls to 60% of its start within a tenth of the run; the rest is noise in the labels."""
    return [
        (2.3 * (0.6 + 0.4 * math.exp(-30 * t / n)) * log_normal(rng, 0.05), log_normal(rng, 0.3))
        for t in range(n)
    ]


def noisy_plateau(rng: random.Random, n: int) -> Trace:
    """Nothing is learned, nothing gets worse: shuffled labels."""
    return [(2.303 + rng.gauss(0, 0.05), 0.3 * log_normal(rng, 0.3)) for _ in range(n)]


def constant(rng: random.Random, n: int) -> Trace:
    return [(0.7, 0.1)] * n


HEALTHY: dict[str, Make] = {
    make.__name__: make
    for make in (
        falling,
        warm_up,
        outlier_batches,
        plateau_then_drop,
        converged,
        heavy_tailed,
        student_t,
        four_orders,
        step_schedule,
        warm_restarts,
        log_likelihood,
        slow_growth,
        hinge,
        correlated,
        batch_of_one,
        epochs,
        slow_progress,
        plateau_of_a_fifth,
        noisy_labels,
        unfreezing,
    )
}


# Steps of a run of n at which a new phase begins, for healthy runs that have such.
PHASES: dict[str, Callable[[int], set[int]]] = {
    "warm_restarts": lambda n: {k * (n // 5) for k in range(1, 5)},
    "unfreezing": lambda n: {n // 3},
}


# ---- flat: only its stagnation is wrong ---------------------------------------------------------


def learned_the_mean(rng: random.Random, n: int, steps: int = 60) -> Trace:
    """The adding problem: the mean of the targets in the first steps, and then nothing more."""
    return [
        (
            (0.167 + math.exp(-4 * t / steps)) * log_normal(rng, 0.08),
            (0.03 + math.exp(-4 * t / steps)) * log_normal(rng, 0.3),
        )
        for t in range(n)
    ]


def learned_the_frequencies(rng: random.Random, n: int) -> Trace:
    """A cross-entropy that starts a little above ln 10 and gets there."""
    return [
        (2.303 + 0.2 * math.exp(-t / 20) + rng.gauss(0, 0.03), 0.3 * log_normal(rng, 0.3))
        for t in range(n)
    ]


FLAT: dict[str, Make] = {
    make.__name__: make
    for make in (
        noisy_plateau,
        constant,
        correlated_plateau,
        learned_the_frequencies,
    )
}


# ---- swinging -----------------------------------------------------------------------------------


def thrown_about(rng: random.Random, n: int) -> Trace:
    """A learning rate far too high from the first step: around 3 ln 10 at once."""
    first = [(2.303, 1.0)]
    return first + [(6.9 + rng.gauss(0, 1), 5 * log_normal(rng, 0.7)) for _ in range(n - 1)]


def edge_of_stability(rng: random.Random, n: int, start: int = 200) -> Trace:
    """Falls to 0.5, then momentum swings it between that and 3, in waves of about 30 steps."""
    out = []
    phase = 0.0
    for t in range(n):
        phase += 0.2 * log_normal(rng, 0.3)
        wave = max(0, min(1.0, (t - start) / 100)) * (1 + math.sin(phase))
        loss = 0.5 + 1.8 * math.exp(-t / 40) + 1.25 * wave
        out.append((loss * log_normal(rng, 0.05), (0.3 + wave) * log_normal(rng, 0.3)))
    return out


SWINGING: dict[str, Make] = {make.__name__: make for make in (thrown_about, edge_of_stability)}


# ---- failing: healthy for `start` steps, then something goes wrong ------------------------------


def explosion(rng: random.Random, start: int, rate: float = 0.2, n: int = 400) -> Trace:
    """Gradient and loss grow by `rate` nats per step from step `start` on."""
    out = falling(rng, max(start, 1) * 2)[:start]
    level = out[-1][0] if out else 2.3
    for t in range(n):
        up = math.exp(min(rate * t, 80.0))
        out.append((level + 0.05 * (up - 1) + rng.gauss(0, 0.02), up * log_normal(rng, 0.2)))
    return out


def lasting_spike(rng: random.Random, start: int, height: float = 5.0, n: int = 200) -> Trace:
    out = falling(rng, 2 * start)[:start]
    return out + [(height * log_normal(rng, 0.1), log_normal(rng, 0.3)) for _ in range(n)]


def slow_divergence(rng: random.Random, start: int, slope: float = 0.005, n: int = 1500) -> Trace:
    out = falling(rng, 2 * start)[:start]
    level = out[-1][0]
    return out + [(level + slope * t + rng.gauss(0, 0.1), log_normal(rng, 0.3)) for t in range(n)]
