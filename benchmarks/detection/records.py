"""What a program is, what its runs leave behind, and what a peer is given at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.diagnose import Finding, Observation


@dataclass
class Setup:
    """A model about to be trained, from one seed.

    Attributes:
        model: The model.
        optimizer: Its optimizer.
        batch: Returns the batch of a step.
        loss: Returns the scalar loss of a batch.
        score: Returns the figure of merit at the end, on data of its own.
        accuracy: Returns the accuracy on one fixed batch (for peers that ask for it); ``None``
            for regressions.
        before_step: Called after the backward pass and before the optimizer, as a user would clip.
        after_step: Called after the optimizer, as a user would step a scheduler.
    """

    model: nn.Module
    optimizer: Optimizer
    batch: Callable[[int], Any]
    loss: Callable[[Any], Tensor]
    score: Callable[[], float]
    accuracy: Callable[[], float] | None = None
    before_step: Callable[[], None] | None = None
    after_step: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Program:
    """Something that people train, with a fault or without.

    Attributes:
        name: Unique name.
        family: Programs of one family are held out together: a failing one and its healthy twins.
        faulty: Whether the fault is in it. A run counts as failing only if it is faulty *and*
            misses its target, as healthy only if it is not faulty and reaches it; all others are
            ambiguous, left out and counted.
        steps: Budget.
        target: What the score has to reach.
        higher_is_better: Whether the score has to be at least the target, or at most.
        build: Makes the set-up of a seed.
        causes: Names of the pathology, values of `Pathology`; the first is the label, the others
            are as right. Empty without a fault.
        layers: Places that localize the fault, module paths; empty where it has no place.
        onset: Step at which the fault sets in.
        about: One sentence.
    """

    name: str
    family: str
    faulty: bool
    steps: int
    target: float
    higher_is_better: bool
    build: Callable[[int], Setup]
    causes: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    onset: int = 0
    about: str = ""

    def reached(self, score: float) -> bool:
        """Whether a score is good enough; NaN is not."""
        return score >= self.target if self.higher_is_better else score <= self.target


@dataclass(frozen=True)
class TensorFeatures:
    """Of one parameter tensor at one step: what the peers' rules are made of.

    Gradients are as they are before any clipping; all are NaN where there is no gradient.
    """

    name: str
    mean_abs_grad: float
    median_abs_grad: float
    max_abs_grad: float
    grad_norm: float
    zero_share: float
    finite: bool
    weight_norm: float
    mean_abs_weight: float
    mean_abs_update: float  # of the last step
    is_weight: bool  # two dimensions or more


@dataclass(frozen=True)
class ActivationFeatures:
    """Of one activation module at one step."""

    name: str
    kind: str  # "relu", "tanh", "sigmoid", ...
    share_not_above_zero: float  # of all outputs
    units_below_percentile: float  # share of units whose 95th percentile of |a| is below 1e-5
    units_inactive: float  # share of units active (> 0) in less than 1 % of the examples
    inputs_beyond_5: float  # share of inputs with |x| > 5
    inputs_beyond_tanh_limit: float  # share of inputs with |x| > 9.4999
    saturation: float  # mean |a| for tanh; mean 2 |a - 0.5| for sigmoid; NaN for others


@dataclass(frozen=True)
class StepFeatures:
    """One optimizer step as the peers see it.

    Attributes:
        step: Number of the step.
        steps: Budget of the run.
        loss: Training loss.
        tensors: One per trainable parameter that has or had a gradient, in forward order.
        activations: One per activation module.
        accuracy: On one fixed batch, on steps where it was asked for; ``None`` elsewhere.
        lr: Learning rate of the first group.
        inputs: Smallest and largest value of the inputs; ``None`` if they are not real numbers.
    """

    step: int
    steps: int
    loss: float
    tensors: Sequence[TensorFeatures]
    activations: Sequence[ActivationFeatures]
    accuracy: float | None
    lr: float
    inputs: tuple[float, float] | None = None


@dataclass(frozen=True)
class Alarm:
    """What a detector said: when, what (a value of `Pathology`, or empty), and where."""

    step: int
    cause: str = ""
    layer: str = ""


class Peer(Protocol):
    """A rule set of somebody else, written anew from its published description."""

    name: str

    def observe(self, features: StepFeatures) -> list[Alarm]:
        """Takes in one step."""

    def finish(self) -> list[Alarm]:
        """The run is over; what can be said only now."""


@dataclass
class RunResult:
    """What one run leaves behind.

    Attributes:
        program: Its name.
        family: Its family.
        seed: Its seed.
        steps: Budget.
        score: Figure of merit at the end.
        label: ``"failing"``, ``"healthy"`` or ``"ambiguous"``.
        causes: As of the program.
        layers: As of the program.
        onset: As of the program.
        findings: Ours, each in its last state.
        alarms: By name of the peer.
        observations: All that our detectors were given, to replay them with other thresholds.
        seconds: Of each part: ``"run"`` bare, ``"guard"``, and each peer by name.
    """

    program: str
    family: str
    seed: int
    steps: int
    score: float
    label: str
    causes: tuple[str, ...]
    layers: tuple[str, ...]
    onset: int
    findings: list[Finding]
    alarms: Mapping[str, list[Alarm]]
    observations: list[Observation] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=dict)
