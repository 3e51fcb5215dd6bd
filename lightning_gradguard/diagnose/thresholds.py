"""Every number that decides a finding, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_gradguard._validation import check_number

# Least value of each count. Below these a median of the values means nothing.
_LEAST_COUNT = {
    "window": 8,
    "warmup": 4,
    "accept_after": 4,
    "persistence": 1,
    "stuck_persistence": 1,
    "growth_block": 1,
    "start_steps": 1,
    "start_jump": 1,
    "start_leak": 1,
    "moves": 1,
    "least_moves": 1,
    "recent": 1,
    "spike_persistence": 1,
    "early_steps": 2,
    "block": 4,
    "diverging_blocks": 1,
    "far_blocks": 1,
    "critical_blocks": 1,
    "heal_steps": 1,
    "least_timesteps": 2,
    "time_persistence": 1,
    "time_spacing": 1,
}
_ABOVE_ZERO = ("outlier_z", "gradient_floor", "growth", "start_growth", "margin", "lost_progress")
_AT_LEAST_ZERO = (
    "loss_floor",
    "growth_allowance",
    "level_margin",
    "young_level_margin",
    "wander_margin",
)
_NOT_ABOVE = {
    "warmup": "window",
    "accept_after": "window",
    "early_steps": "block",
    "recent": "block",
    "spike_persistence": "block",
    "least_moves": "moves",
}


@dataclass(frozen=True)
class Thresholds:
    """Every number used by the detectors.

    None has a unit of loss or gradient: all are counts of steps, robust z-scores, or ratios, so
    scaling the loss changes no finding.

    Raises:
        TypeError: If a value is not a number, or not an integer where it counts steps.
        ValueError: If a number is outside its allowed range.
    """

    window: int = 128
    """Steps in a baseline. OLMo-core's `StabilityMonitor`/`SkipStep` use 128: its median has a
    standard error of 0.11 scale, and it is short beside any phase of training."""
    warmup: int = 16
    """Values before a baseline judges. A MAD of 16 normal values is within a factor of two of its
    limit, which `outlier_z` absorbs; OLMo-core waits for 64, too long for a run that dies early."""
    accept_after: int = 16
    """Consecutive outliers on one side that are accepted as the new level (equal to `warmup`, so
    that the restarted baseline is ready at once). Refusing for ever is how ZClip latches."""
    outlier_z: float = 6.0
    """Robust z beyond which a value is an outlier (OLMo-core `SkipStep`: 6 sigma)."""
    gradient_floor: float = 0.05
    """Least scale of log-norms, nats: a norm within 35% of its median is no outlier."""
    loss_floor: float = 0.01
    """Least scale of a loss, as a share of a positive median: within 6% is no outlier."""
    tail_factor: float = 2.0
    """A one-step outlier must also stand out this many times further than the outliers of the last
    window: heavy-tailed noise has outliers by MAD all the time."""

    persistence: int = 5
    """Steps that an explosion must last beside a loss that is worse (llm-foundry: 5 in a row)."""
    stuck_persistence: int = 32
    """The same beside a loss that is merely no better than early: leaving a plateau raises the
    gradient by orders of magnitude some steps before the loss falls."""
    growth: float = math.log(1e3)
    """Sustained growth of the log-norm, nats, above its lowest level: three
    orders of magnitude, the same as for a gradient through time."""
    growth_allowance: float = 0.01
    """Growth per step that is forgiven, nats: an e-fold in 100 steps is not an explosion."""
    growth_block: int = 5
    """Log-norms whose median makes one step of the growth statistic."""
    growth_noise_weight: float = 0.1
    """Weight of the newest block in the noise of log-norms, whose `outlier_z`-fold the growth must
    exceed as well. It starts at zero: an explosion from the first step must not pass for noise."""
    start_growth: float = math.log(10.0)
    """Log-norm above the very first, nats, that counts as blown up beside a doubled loss."""
    start_steps: int = 12
    """Such steps that make an explosion of a run with no past. In trial runs on handwritten digits
    learning rates that ruin a run showed it by step 6 to 14."""
    start_jump: int = 2
    """What a step counts for whose log-norm is above the first by `growth`."""
    start_leak: int = 4
    """What any other step takes back. With batches of one the first loss may lie far below most
    others, but then it is not the only one."""

    recent: int = 8
    """Losses whose median is the present level of the loss."""
    spike_persistence: int = 16
    """Steps over which a spike must persist to be a warning. With batches of one, every fifth loss
    is far above the others, and 6 of 8 happen by chance in a few thousand steps."""
    spike_share: float = 0.75
    """Share of the last `spike_persistence` losses that must be above the limit."""
    early_steps: int = 3
    """Losses that make the first reference, before a block is full."""
    block: int = 16
    """Losses in a block; the level of the loss is followed by block medians."""
    margin: float = 3.0
    """Noise scales above a reference level that count as beyond it, for medians of several steps
    that also have to persist."""
    level_margin: float = 0.1
    """Share of a positive reference level that the loss must be above it in any case."""
    young_level_margin: float = 0.25
    """The same before the wander of the loss is known: overshooting by a few percent in the first
    hundred steps is how many good runs begin."""
    moves: int = 32
    """Moves between blocks whose median is the wander of the loss: 512 steps, so that a run that
    starts to diverge is found long before its own rise passes for wander."""
    least_moves: int = 8
    """Moves needed before their median is worth something."""
    wander_margin: float = 5.0
    """Moves that count as one noise scale. A loss with slow waves (AR(1), memory 50 steps) moves by
    half their deviation between blocks; highest and lowest level lie seven deviations apart."""
    lost_progress: float = 0.5
    """Share of the improvement since early training that must be gone: the functional gate. A
    cosine or step restart gives back less than a quarter of a cross-entropy."""
    diverging_blocks: int = 4
    """Consecutive blocks above the best level that make a divergence."""
    far_blocks: int = 2
    """Consecutive blocks above the early level that make a divergence."""
    critical_blocks: int = 8
    """Consecutive blocks above the early level after which a divergence is critical."""
    heal_steps: int = 16
    """Steps without the symptom after which a detector re-arms."""

    least_timesteps: int = 8
    """Timesteps of a sequence below which nothing is said about time: in a shorter one a quarter is
    less than two steps back, too few to rest a rate on."""
    short_horizon: float = 0.25
    """Share of the timesteps below which a horizon is short: three of four get less than a
    thousandth of the gradient, and the first less than 1e-12 of the last, far below what float32
    (6e-8) keeps of it in the sum over time that is the gradient of a weight."""
    time_persistence: int = 3
    """Readings in a row that a symptom through time must last; as many without it re-arm."""
    time_spacing: int = 64
    """Steps between two readings that both count. In trial runs on handwritten digits, modules that
    began with a short horizon and learned all the same lengthened it within 130 steps at learning
    rates from 3e-4; with 32 steps, one of them drew a warning."""
    better_level: float = 0.5
    """Share of a positive early level below which a loss is better than early, however noisy it
    was then: the counterpart of a loss that has doubled."""
    recovery: float = 0.1
    """Share of the rate that must have gone between the first and the last of these readings, and
    more than their errors, to be a recovery that deserves patience."""

    def __post_init__(self) -> None:
        for name, least in _LEAST_COUNT.items():
            check_number(name, getattr(self, name), at_least=least, integer=True)
        for name in _ABOVE_ZERO:
            check_number(name, getattr(self, name), above=0.0, below=math.inf)
        for name in _AT_LEAST_ZERO:
            check_number(name, getattr(self, name), at_least=0.0, below=math.inf)
        check_number("tail_factor", self.tail_factor, at_least=1.0, below=math.inf)
        check_number("growth_noise_weight", self.growth_noise_weight, above=0.0, at_most=1.0)
        check_number("short_horizon", self.short_horizon, above=0.0, at_most=1.0)
        check_number("better_level", self.better_level, above=0.0, at_most=1.0)
        check_number("recovery", self.recovery, above=0.0, at_most=1.0)
        check_number("spike_share", self.spike_share, above=0.0, at_most=1.0)
        for name, limit in _NOT_ABOVE.items():
            value, most = getattr(self, name), getattr(self, limit)
            if value > most:
                raise ValueError(f"{name} must be at most {limit} ({most}), got {value}")
