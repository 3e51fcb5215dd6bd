"""The temporal order problem.

Shape suffixes: ``B`` batch, ``T`` time, ``I`` input, ``K`` relevant symbols.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from typing_extensions import override

from lightning_gradguard._validation import check_number
from lightning_gradguard.tasks.base import GeneratedTask
from lightning_gradguard.tasks.splits import Split, encoder

_SHOWN = 2  # X and Y
_ALPHABET = 6  # and the four distractors
# Where the relevant symbols begin, in percent of the length; each comes within a tenth of it.
_STARTS = {2: (10, 50), 3: (10, 33, 66)}


class TemporalOrder(GeneratedTask):
    """Which of two symbols came at two or three steps (Hochreiter & Schmidhuber 1997, task 6).

    Inputs (B, T, 6) are one-hot symbols. Four distractors (2 to 5) come at all steps but K, where
    X (0) or Y (1) comes, equally likely. Those steps are drawn from a tenth of the length each:

    ===========  ========================================  ====================
    ``symbols``  steps, as shares of the length            classes
    ===========  ========================================  ====================
    2            .10 to .20, .50 to .60                    4: XX, XY, YX, YY
    3            .10 to .20, .33 to .43, .66 to .76        8: XXX, XXY, … YYY
    ===========  ========================================  ====================

    The class k = Σ_i s_i 2^(K−i) reads the symbols s_i in their order as a binary number. As with
    Pascanu et al. 2013, the length is the same for all, and neither a symbol that starts nor one
    that ends the sequence is added; their code puts the three symbols at .1, .3 and .6. Who
    remembers nothing guesses, at a cross entropy of

        baseline = K ln 2 = ln 4 or ln 8.

    Args:
        length: Steps of a sequence, at least 10.
        symbols: How many have to be remembered, 2 or 3.
        one_hot: Inputs as floats (B, T, 6), else as indices (B, T) for models with an embedding.
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
        A sequence of 10 steps can be 2 1 3 2 4 0 4 5 2 5: Y and then X, which is class 2.

        >>> task = TemporalOrder(length=10, one_hot=False)
        >>> inputs, targets = next(iter(task.train_dataloader()))
        >>> inputs.shape, bool((2 * inputs[:, 1] + inputs[:, 5] == targets).all())
        (torch.Size([64, 10]), True)
        >>> task.classes, TemporalOrder(symbols=3).classes
        (4, 8)
    """

    def __init__(
        self,
        length: int = 100,
        symbols: Literal[2, 3] = 2,
        one_hot: bool = True,
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
        check_number("length", length, at_least=10, integer=True)
        check_number("symbols", symbols, at_least=2, at_most=3, integer=True)
        self.symbols = symbols
        self.kind = "classification"
        self.length, self.input_size, self.output_size = length, _ALPHABET, _SHOWN**symbols
        self.baseline = symbols * math.log(_SHOWN)
        self._encode = encoder(_ALPHABET, one_hot)

    @override
    def _draw(self, size: int, generator: torch.Generator) -> Split:
        inputs_BT = torch.randint(
            _SHOWN, _ALPHABET, (size, self.length), generator=generator, dtype=torch.int32
        )
        shown_BK = torch.randint(
            _SHOWN, (size, self.symbols), generator=generator, dtype=torch.int32
        )
        starts_K = torch.tensor([self.length * percent // 100 for percent in _STARTS[self.symbols]])
        steps_BK = starts_K + torch.randint(
            self.length // 10, (size, self.symbols), generator=generator
        )
        worth_K = _SHOWN ** torch.arange(self.symbols - 1, -1, -1)
        return Split(
            inputs_BT.scatter_(1, steps_BK, shown_BK), (shown_BK * worth_K).sum(1), self._encode
        )
