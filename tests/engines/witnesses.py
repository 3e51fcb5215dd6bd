"""Guards that keep what their detectors were given, and a model with something in every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard import GradGuard, GradientMonitor, GuardEngine
from lightning_gradguard.diagnose import Finding, Observation, Pathology, Severity
from lightning_gradguard.readings import Inspection
from tests.models import adamw


class Witness:
    """A detector that finds nothing and remembers everything."""

    def __init__(self) -> None:
        self.observations: list[Observation] = []

    def observe(self, observation: Observation) -> list[Finding]:
        self.observations.append(observation)
        return []

    def is_open(self, where: str) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def reset(self) -> None:
        self.observations = []

    @property
    def inspections(self) -> list[Inspection]:
        return [o.inspection for o in self.observations if o.inspection is not None]

    @property
    def inspected(self) -> list[int]:
        """Steps that were looked at."""
        return [inspection.step for inspection in self.inspections]

    @property
    def new_phases(self) -> list[int]:
        return [o.step for o in self.observations if o.new_phase]


def with_witness(engine: GuardEngine, witnesses: list[Witness]) -> GuardEngine:
    witness = Witness()
    witnesses.append(witness)
    diagnosis = engine._pipeline._diagnosis
    diagnosis.detectors = (*diagnosis.detectors, witness)
    return engine


class WitnessedMonitor(GradientMonitor):
    """A monitor with a witness for each optimizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.witnesses: list[Witness] = []

    def _make_engine(self, *args: Any) -> GuardEngine:
        return with_witness(super()._make_engine(*args), self.witnesses)


class WitnessedGuard(GradGuard):
    """A guard with a witness for each optimizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.witnesses: list[Witness] = []

    def _make_engine(self, *args: Any) -> GuardEngine:
        return with_witness(super()._make_engine(*args), self.witnesses)


def serious(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity >= Severity.WARNING]


def not_training(findings: Iterable[Finding]) -> list[Finding]:
    return [f for f in findings if f.pathology is Pathology.LAYER_NOT_TRAINING]


WIDTH, TIME, BATCH = 8, 6, 64


class Mixed(LightningModule):
    """Convolution, normalization, ReLU, dropout and a recurrent module, on data of the step.

    Args:
        optimizer: Makes the optimizer from the parameters.
        dead: Units of 32 that no input wakes.
        seeds: Whether dropout's random numbers follow from the step too, as Lightning does not
            restore them.
    """

    def __init__(
        self,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = adamw,
        dead: int = 0,
        *,
        seeds: bool = True,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.rnn = nn.RNN(WIDTH, WIDTH, batch_first=True)
            self.body = nn.Sequential(
                nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.Linear(32, 32)
            )
            self.act = nn.ReLU()
            self.head = nn.Linear(32, 1)
        if dead:
            with torch.no_grad():
                self.body[3].bias[:dead] = -100.0
        self.make_optimizer = optimizer
        self.seeds = seeds

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.act(self.body(self.rnn(inputs)[0][:, -1])))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # From the number of the step, so that a resumed run sees what it would have seen.
        step = self.global_step
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(BATCH, TIME, WIDTH, generator=generator)
        if self.seeds:
            torch.manual_seed(step)
        return nn.functional.mse_loss(self(inputs).float(), inputs[:, -1].sum(-1, keepdim=True))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class MixedWithValidation(Mixed):
    """The same; validation runs as training does, for which Lightning's mode is no sign.

    What runs has no state of its own, so that the run is the same with and without it.
    """

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.act.train()
        self.head.train()
        with torch.enable_grad():
            self.head(self.act(torch.ones(BATCH, 32)))
