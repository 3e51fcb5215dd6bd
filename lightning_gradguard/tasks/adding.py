"""The adding problem.

Shape suffixes: ``B`` batch, ``T`` time, ``I`` input.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradguard._validation import check_choice, check_number
from lightning_gradguard.tasks.base import GeneratedTask
from lightning_gradguard.tasks.splits import Split

# Where each of the two markers may be, in percent of the length.
_RANGES = {
    "halves": ((0, 50), (50, 100)),
    "first_tenth": ((0, 10), (50, 100)),
    "first_half": ((0, 10), (10, 50)),
}
_SHORTEST = {"anywhere": 2, "halves": 2, "first_tenth": 10, "first_half": 10}


class AddingProblem(GeneratedTask):
    """The sum of the two numbers of a sequence that are marked (Hochreiter & Schmidhuber 1997).

    Inputs (B, T, 2) are pairs of a value v_t ~ U(low, high) and a marker m_t, which is 1 at two
    steps and 0 at all others; targets (B,) are y = Σ_t m_t v_t. Whoever has to answer without
    having remembered a value says the mean, low + high, and pays

        baseline = Var(y) = 2 Var(v) = (high − low)² / 6,

    0.1667 for U(0, 1). Where the markers are decides how long a value has to be remembered, and
    papers differ in it:

    =================  ====================================  =====================================
    ``variant``        markers                               as in
    =================  ====================================  =====================================
    ``"anywhere"``     two different steps                   Le et al. 2015, Bai et al. 2018
    ``"halves"``       one in each half                      Arjovsky et al. 2016
    ``"first_tenth"``  first tenth, and last half            Neil et al. 2016, Campos et al. 2018
    ``"first_half"``   first tenth, and from there to the    Pascanu et al. 2013, close to the
                       middle: nothing in the last half      original of 1997
    =================  ====================================  =====================================

    The original also varies the length by a tenth, draws values from U(−1, 1) and scales the sum.
    Campos et al. take ``variant="first_tenth", low=-0.5, high=0.5`` and call it solved at a
    hundredth of the variance of the sum.

    Args:
        length: Steps of a sequence; at least 2, with a marker in the first tenth at least 10.
        variant: Where the markers are.
        low: The least value.
        high: The greatest value.
        batch_size: Sequences per batch.
        train_size: Sequences to train on. Arjovsky et al. have 100,000, Bai et al. 50,000. With
            ``batch_size`` times the steps of a run, a run sees no sequence twice.
        val_size: Sequences to validate on.
        test_size: Sequences to test on.
        seed: Of everything random in the data and in their order.
        num_workers: Worker processes per loader.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> task = AddingProblem(length=100)
        >>> inputs, targets = next(iter(task.train_dataloader()))
        >>> inputs.shape, targets.shape
        (torch.Size([64, 100, 2]), torch.Size([64]))
        >>> bool((inputs.prod(-1).sum(1) - targets).abs().max() < 1e-6)
        True
        >>> round(task.baseline, 4)
        0.1667
    """

    def __init__(
        self,
        length: int = 50,
        variant: Literal["anywhere", "halves", "first_tenth", "first_half"] = "anywhere",
        low: float = 0.0,
        high: float = 1.0,
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
        check_choice("variant", variant, tuple(_SHORTEST))
        check_number("length", length, at_least=_SHORTEST[variant], integer=True)
        check_number("low", low, above=-math.inf, below=math.inf)
        check_number("high", high, above=low, below=math.inf)
        self.variant = variant
        self.low, self.high = low, high
        self.kind = "regression"
        self.length, self.input_size, self.output_size = length, 2, 1
        self.baseline = (high - low) ** 2 / 6

    @override
    def _draw(self, size: int, generator: torch.Generator) -> Split:
        values_BT = torch.rand(size, self.length, generator=generator)
        values_BT.mul_(self.high - self.low).add_(self.low)
        marked_B2 = _marked(self.variant, self.length, size, generator)
        markers_BT = torch.zeros_like(values_BT).scatter_(1, marked_B2, 1.0)
        sums_B = values_BT.gather(1, marked_B2).sum(1)
        return Split(torch.stack([values_BT, markers_BT], dim=-1), sums_B)


def _marked(variant: str, length: int, size: int, generator: torch.Generator) -> Tensor:
    """The two marked steps of each sequence, (B, 2)."""
    if variant == "anywhere":
        first_B = torch.randint(length, (size,), generator=generator)
        ahead_B = torch.randint(1, length, (size,), generator=generator)
        return torch.stack([first_B, (first_B + ahead_B) % length], dim=1)
    columns = [
        torch.randint(length * start // 100, length * end // 100, (size,), generator=generator)
        for start, end in _RANGES[variant]
    ]
    return torch.stack(columns, dim=1)
