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
    "spike_steps": 1,
    "early_steps": 2,
    "block": 4,
    "diverging_blocks": 1,
    "far_blocks": 1,
    "critical_blocks": 1,
    "heal_steps": 1,
    "slow_heal_steps": 1,
    "phase_blocks": 1,
    "stage_points": 8,
    "runaway_points": 1,
    "flat_steps": 1,
    "stagnation_steps": 1,
    "stagnation_unplanned": 1,
    "leaving_blocks": 2,
    "swing_window": 8,
    "swing_windows": 1,
    "least_timesteps": 2,
    "time_persistence": 1,
    "time_spacing": 1,
    "layer_persistence": 1,
    "layer_span": 0,
    "fact_persistence": 1,
    "zero_gradient_start": 0,
    "zero_gradient_persistence": 1,
    "depth_layers": 3,
    "dead_examples": 1,
    "ratio_weights": 2,
    "slow_update_span": 0,
}
_ABOVE_ZERO = (
    "outlier_z",
    "gradient_floor",
    "growth",
    "start_growth",
    "margin",
    "lost_progress",
    "swing_ratio",
    "improved_z",
    "fast_update",
    "slow_update",
    "runaway_level",
    "swing_mean",
)
# Shares of a run, a loss, units, elements or layers.
_SHARES = (
    "early_share",
    "fallen_share",
    "fallen_share_alone",
    "fallen_level",
    "fallen_level_alone",
    "crawl_share",
    "runaway_pace",
    "crawl_gain",
    "solved_level",
    "stagnation_share",
    "telling_gain",
    "time_share",
    "layer_share",
    "depth_block",
    "dead_share",
    "all_dead_share",
    "share_growth",
    "saturated_share",
    "underflow_share",
    "underflow_tiny",
    "touched_share",
    "slow_reach",
)
_FACTORS = ("depth_factor", "update_factor")
_AT_LEAST_ZERO = (
    "reached",
    "least_gain",
    "leaving_growth",
    "gone_gradient",
    "swing_level",
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
    "dead_share": "all_dead_share",
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
    spike_steps: int = 24
    """Least steps since the spike: a loss is often lifted for 16 to 20 steps by the momentum of one
    outlier, and comes back."""
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
    slow_heal_steps: int = 64
    """The same for swings and stagnation, where one lucky block or window means nothing."""
    phase_blocks: int = 4
    """Blocks after a change of course in which a rise of the loss is its consequence: a jump of the
    learning rate has its whole effect within some 50 steps. Then the new phase has a level."""

    stage_points: int = 8
    """Blocks of losses before the stages of a run are compared, 128 steps: the first eighth is then
    one block."""
    improved_z: float = 2.0
    """Standard errors beyond which the loss has improved. Flat losses pass one of the four tests
    every fifteenth time, which only delays a finding; slow progress must not be missed."""
    early_share: float = 0.2
    """Share of the run so far within which the present level must have been reached for the loss
    to be stuck: whatever a sick model can learn, as the frequency of classes, it learns soon."""
    fallen_share: float = 0.1
    """The same once the loss has fallen below `fallen_level`, so that its level may be as good as
    it can be. A recurrent net that learns only the mean of its targets does so in 30 to 150 steps;
    a run that converges to the noise of its labels takes a tenth of its steps or more."""
    fallen_share_alone: float = 0.05
    """The same where there is no other symptom either."""
    reached: float = 0.05
    """Share of the whole fall that may be missing in a level that was reached early: what is left
    of an exponential after three of its time constants."""
    fallen_level: float = 0.75
    """Share of a positive first level below which a loss has fallen. Learning only how frequent
    the classes are takes the cross-entropy of a fresh model down by less than a quarter."""
    fallen_level_alone: float = 0.9
    """The same where there is no other symptom either. The loss of a click-through rate may be as
    low as it gets a tenth below that of its frequency, that of a pretrained model likewise."""
    crawl_share: float = 0.2
    """Share of the planned steps after which a loss is expected to have moved."""
    crawl_gain: float = 0.1
    """Share of a positive first level that it should have lost by then, where a symptom says why it
    has not. A classifier loses as much by learning how frequent the classes are."""
    runaway_level: float = 10.0
    """First levels (their size) that a loss must be below zero to be running away."""
    runaway_points: int = 4
    """Points of the loss over which its pace is taken."""
    runaway_pace: float = 0.9
    """Share of its fastest pace that it must still fall at. A loss that converges falls fastest
    early; of an exponential approach a tenth of the pace is lost with a tenth of the way."""
    solved_level: float = 0.1
    """Share of a positive first level that no run gets below without learning something."""
    least_gain: float = 0.01
    """Share of a positive level that it must have fallen to have improved, however sure: a fall of
    1% over most of a run leads nowhere."""
    telling_gain: float = 0.25
    """Share of a positive level that it might have fallen, at two standard errors, beyond which the
    noise is too large to call it flat."""
    flat_steps: int = 192
    """Steps with a flat loss that are noted, and the respite after a change of course."""
    stagnation_steps: int = 256
    """Least steps without learning that are a warning, in runs of any planned length."""
    stagnation_share: float = 0.25
    """The same as a share of the planned steps: the plateau before a sudden drop takes up to a
    fifth of many good runs."""
    stagnation_unplanned: int = 1024
    """The same where no number of steps is planned."""
    leaving_blocks: int = 8
    """Blocks over which a growing gradient shows that the run is leaving a plateau."""
    leaving_growth: float = 0.3
    """That growth, nats: a third in 128 steps. Leaving a saddle is exponential, and slower than
    this it would take thousands of steps."""
    gone_gradient: float = 0.01
    """Share of the first gradient norm below which a run whose loss has fallen has converged."""

    swing_window: int = 32
    """Losses whose spread is compared with their noise: its interquartile range is within a
    quarter of its limit, and a swing of up to 60 steps shows."""
    swing_windows: int = 3
    """Windows in a row with swings that are a warning beside a bad loss, and losses that are all
    above the first one: of as many independent losses the first is the least in one of 97 runs."""
    swing_ratio: float = 4.0
    """Spread of the loss in units of its noise that is a swing: independent losses have 1, slow
    waves around a plateau (AR(1), memory 50 steps) up to 3."""
    swing_mean: float = 1.5
    """Means of the first block that a window's mean must exceed to be worse than before training.
    With batches of one the mean of a block is uncertain by a quarter."""
    swing_level: float = 0.1
    """Share of a positive level that swings must span, and by which they must be above the first
    loss where there is no calm stretch to compare them with, and then span half as much."""

    least_timesteps: int = 8
    """Timesteps of a sequence below which nothing is said about time: in a shorter one a quarter is
    less than two steps back, too few to rest a rate on."""
    short_horizon: float = 0.4
    """Share of the timesteps below which a horizon is short: the first gets less than 6e-8 of the
    last, which float32 does not keep in the sum over time that is the gradient of a weight."""
    time_persistence: int = 3
    """Readings in a row that a symptom through time must last; as many without it re-arm."""
    time_spacing: int = 50
    """Steps between two readings that both count, as many as between two cheap measurements. In
    trial runs on handwritten digits, modules that began with a short horizon and learned all the
    same lengthened it within 130 steps; with 32 steps, one of them drew a warning."""
    better_level: float = 0.5
    """Share of a positive early level below which a loss is better than early, however noisy it
    was then: the counterpart of a loss that has doubled."""
    recovery: float = 0.1
    """Share of the rate that must have gone between the first and the last of these readings, and
    more than their errors, to be a recovery that deserves patience."""
    time_share: float = 0.04
    """Share of the planned steps before which a symptom through time is no warning: runs that are
    flat at first by design (warm-up, long plans) are so for more than two spacings."""

    layer_persistence: int = 3
    """Inspections in a row that a symptom in a layer must last, as through time; as many without it
    re-arm."""
    layer_span: int = 40
    """Steps that these must span. The first inspections are dense (steps 0, 1, 2, 4, 8, 16, 32),
    and three of them within the first steps are no persistence. With 40, a fault that is there from
    the start is found at the inspection of step 50, when three blocks of losses are known."""
    layer_share: float = 0.025
    """Share of the planned steps before which a flat loss is no evidence, as through time: long
    runs are flat at first by design (warm-up)."""
    fact_persistence: int = 2
    """Inspections that a fact must last that is read off the model and its optimizer. One is not
    enough: parameters may be handed to an optimizer after the first step."""
    zero_gradient_start: int = 32
    """Step up to which a gradient of exactly zero proves nothing: behind a zero-initialized branch
    (LoRA, residual branches) it is zero until the branch has moved, one step without a warm-up."""
    zero_gradient_persistence: int = 4
    """Inspections after that step at which the gradient must be zero: 150 steps and more at the
    usual spacing, longer than any branch stays at its initial value."""
    touched_share: float = 0.1
    """Share of the sampled gradient elements that must not be zero for an update of exactly zero to
    be news: in a sparse gradient (embeddings) the sample holds rows that no example has touched."""

    depth_layers: int = 4
    """Weights below which nothing is said about depth: three layers are passed by too few
    derivatives to lose three orders of magnitude, and a slope through them has one degree of
    freedom."""
    depth_factor: float = 1e3
    """Attenuation from the last layer to the first that counts as vanishing: three orders of
    magnitude, the same as for a gradient through time."""
    depth_block: float = 0.25
    """Share of the layers that must lie below the layers after them by `depth_factor`, side by
    side, where the slope does not show it: a single layer may do so by its size alone
    (embeddings)."""

    dead_examples: int = 256
    """Outputs per unit that a dead share must rest on: a unit that is active in one of a hundred
    examples is missed by all of them once in 13 times."""
    dead_share: float = 0.75
    """Share of a layer's units that are dead. Where the input of a layer hardly varies, half of its
    ReLU units are off whatever the batch holds (12-layer MLP at torch's initialization: up to
    0.58), and that is not the units' fault."""
    all_dead_share: float = 0.95
    """Share above which a layer passes hardly any signal, so that a loss that is bad now is
    evidence enough; alone it is worth noting even if it began so."""
    saturated_share: float = 0.3
    """Share of a layer's units that are saturated. At initialization of a tanh or sigmoid network
    next to none are; in one whose weights were made 60 times as large, a quarter to two thirds are,
    as each unit has some inputs near zero."""
    share_growth: float = 0.25
    """Rise of a share of units since the first inspection that is worth noting beside a good loss:
    gates and sparse layers have such units by design, but then from the start."""

    ratio_weights: int = 4
    """Weights below which their median update ratio is no standard to hold one of them to."""
    update_factor: float = 1e3
    """Update ratio of a weight over the median of all that is out of range, or the inverse. Layers
    of one healthy model differ by up to two orders of magnitude (embeddings, zero-initialized
    heads)."""
    fast_update: float = 0.2
    """Median update ratio at which the learning rate is far too high: five steps replace the
    weights. In trial runs with AdamW on handwritten digits the largest learning rates that learned
    began at 0.03 to 0.3, those that ruined the run at 0.1 to 1, so the loss has to tell."""
    slow_update: float = 1e-6
    """Median update ratio below which the learning rate is far too low, where the length of the run
    is not known: a tenth of a percent in a thousand steps."""
    slow_reach: float = 0.01
    """Where it is known, share of the weights that all steps together would replace if every one
    went the same way: with less, they end where they began."""
    slow_update_span: int = 100
    """Steps that updates must be too small: as long as warm-ups begin near zero."""

    underflow_share: float = 0.5
    """Share of the gradient elements of a weight that are zero or subnormal."""
    underflow_tiny: float = 0.3
    """Share of the elements that are not zero that must be subnormal: the gradient of a sparse
    layer has many zeros and hardly any subnormal element, and every fp16 gradient has a few."""

    def __post_init__(self) -> None:
        for name, least in _LEAST_COUNT.items():
            check_number(name, getattr(self, name), at_least=least, integer=True)
        for name in _ABOVE_ZERO:
            check_number(name, getattr(self, name), above=0.0, below=math.inf)
        for name in _AT_LEAST_ZERO:
            check_number(name, getattr(self, name), at_least=0.0, below=math.inf)
        for name in _SHARES:
            check_number(name, getattr(self, name), above=0.0, at_most=1.0)
        for name in _FACTORS:
            check_number(name, getattr(self, name), above=1.0, below=math.inf)
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
