"""The same inside a Trainer: a guard that watches gradients through time beside one that does not.

Shape suffixes: ``T`` time, ``B`` batch, ``I`` input, ``H`` hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from benchmarks.overhead.contenders import BARE, Contender
from benchmarks.overhead.timing import Schedule
from benchmarks.overhead.timing import compare as compare_trainers
from benchmarks.overhead.workloads import Workload
from benchmarks.timesteps.models import FUSED, Shape
from lightning_gradguard import GradGuard

# Past the end of any benchmark; the first step is measured exactly, and belongs to the warm-up.
_NEVER = 10**9


class Forecaster(nn.Module):
    """One fused recurrent layer and a linear head on every output."""

    def __init__(self, kind: str, shape: Shape) -> None:
        super().__init__()
        self.rnn = FUSED[kind](shape.input_size, shape.hidden_size, batch_first=True)
        self.head = nn.Linear(shape.hidden_size, shape.input_size)

    @override
    def forward(self, inputs_BTI: Tensor) -> Tensor:
        output_BTH, _ = self.rnn(inputs_BTI)
        forecast_BTI: Tensor = self.head(output_BTH)
        return forecast_BTI


def compare(
    kind: str,
    shape: Shape,
    schedule: Schedule,
    *,
    exact: bool,
    device: str,
    directory: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Quartiles of the ratio of ``timesteps="auto"`` to ``timesteps=None``, in observe mode.

    Args:
        kind: Key of ``FUSED``.
        shape: Sizes.
        schedule: How long.
        exact: Whether exact measurements are made at the default interval, or none.
        device: ``"cpu"`` or ``"cuda"``.
        directory: For what the Trainers log.
        say: Told about progress.
    """
    workload = Workload(
        f"{kind} in a Trainer",
        f"{kind}, {shape}",
        lambda: Forecaster(kind, shape),
        (shape.sequences, shape.timesteps, shape.input_size),
    )
    interval = {} if exact else {"exact_every_n_steps": _NEVER}
    ratios = compare_trainers(
        workload,
        [
            # The one that the others are compared with goes by this name there.
            _guard(BARE, timesteps=None),
            _guard("control", timesteps=None),
            _guard("auto", timesteps="auto", **interval),
        ],
        schedule,
        # It learns, so that nothing is found and no exact measurement is made beyond the usual.
        optimizer="adamw",
        device=device,
        directory=directory,
        say=say,
    )
    return {
        name: {clock: pairs.summary(clock, schedule.steps) for clock in ("cpu", "wall")}
        for name, pairs in ratios.items()
    }


def _guard(name: str, **options: Any) -> Contender:
    return Contender(
        name, lambda module, directory: {"callbacks": [GradGuard(mode="observe", **options)]}
    )
