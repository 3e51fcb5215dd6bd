"""Telling a frequency from others.

Shape suffixes: ``B`` batch, ``T`` time, ``I`` input.
"""

from __future__ import annotations

import math

import torch
from typing_extensions import override

from lightning_gradguard._validation import check_number
from lightning_gradguard.tasks.base import GeneratedTask
from lightning_gradguard.tasks.splits import Split

# Periods in milliseconds: those to be found lie between the other two ranges.
_SHORTEST, _FOUND_FROM, _FOUND_TO, _LONGEST = 1.0, 5.0, 6.0, 100.0


class FrequencyDiscrimination(GeneratedTask):
    """Whether the period of a sine is between 5 and 6 ms (Neil et al. 2016; Campos et al. 2018).

    Inputs (B, T, 1) are x_t = sin(2π (t Δ + φ) / P) with the sampling period Δ and a shift
    φ ~ U(0, P). Of class 1 are periods P ~ U(5, 6) ms, of class 0 those drawn evenly from
    (1, 5) and (6, 100) ms. Every second sequence of a split is of class 1, so guessing costs

        baseline = ln 2.

    No single step tells the class, and steps can be left out without harm, which is why the task
    was set for models that skip. Campos et al. take 100 ms of signal, that is ``length=100`` with
    Δ = 1 ms and ``length=200`` with Δ = 0.5 ms, and call it solved at an accuracy of 0.99. (Their
    code adds φ to the phase in radians, which leaves phases uneven for short periods; here all are
    equally likely, as their text has it.) At Δ = 1 ms, periods between 1.2 and 1.25 ms cannot be
    told from those of class 1, which is one sequence in 2,000 of class 0.

    Args:
        length: Steps of a sequence.
        sampling_period: Δ in milliseconds.
        batch_size: Sequences per batch.
        train_size: Sequences to train on.
        val_size: Sequences to validate on.
        test_size: Sequences to test on.
        seed: Of everything random in the data and in their order.
        num_workers: Worker processes per loader.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> task = FrequencyDiscrimination(length=200, sampling_period=0.5)
        >>> inputs, targets = task.split("val").batch()
        >>> inputs.shape, targets[:4]
        (torch.Size([1000, 200, 1]), tensor([0, 1, 0, 1]))
        >>> round(task.baseline, 4)
        0.6931
    """

    def __init__(
        self,
        length: int = 100,
        sampling_period: float = 1.0,
        *,
        batch_size: int = 64,
        train_size: int = 10_000,
        val_size: int = 1_000,
        test_size: int = 1_000,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
            seed=seed,
            num_workers=num_workers,
        )
        check_number("length", length, at_least=1, integer=True)
        check_number("sampling_period", sampling_period, above=0, below=math.inf)
        self.sampling_period = sampling_period
        self.kind = "classification"
        self.length, self.input_size, self.output_size = length, 1, 2
        self.baseline = math.log(2)

    @override
    def _draw(self, size: int, generator: torch.Generator) -> Split:
        # In double precision: the phase at the last step is a large number of turns.
        chosen_B, turns_B = torch.rand(2, size, generator=generator, dtype=torch.float64)
        gap = _FOUND_TO - _FOUND_FROM
        others_B = _SHORTEST + chosen_B * (_LONGEST - _SHORTEST - gap)
        others_B += gap * (others_B >= _FOUND_FROM)
        targets_B = torch.arange(size) % 2
        periods_B = torch.where(targets_B == 1, _FOUND_FROM + chosen_B * gap, others_B)
        times_T = torch.arange(self.length, dtype=torch.float64) * self.sampling_period
        phases_BT = times_T / periods_B.unsqueeze(1) + turns_B.unsqueeze(1)
        return Split((2 * math.pi * phases_BT).sin().float().unsqueeze(-1), targets_B)
