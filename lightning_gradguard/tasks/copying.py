"""The copy memory task.

Shape suffixes: ``B`` batch, ``T`` time, ``I`` input, ``L`` what is copied.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradguard._validation import check_choice, check_number
from lightning_gradguard.tasks.base import GeneratedTask
from lightning_gradguard.tasks.splits import Split, encoder

_VARIANTS = ("fixed", "variable", "selective")


class CopyMemory(GeneratedTask):
    """Symbols to be repeated, in order, when a signal comes (Hochreiter & Schmidhuber 1997).

    With S ``symbols``, L = ``copy_length`` and D = ``delay``, a sequence has T = D + 2L steps. The
    inputs are blank (0) but for L symbols (1 to S), each equally likely, and one signal (S + 1).
    The targets (B, T) are blank but for the L steps after the signal, which are the symbols again.

    =================  ============================  ============================================
    ``variant``        symbols, and then the signal  as in
    =================  ============================  ============================================
    ``"fixed"``        the first L steps; D steps    Arjovsky et al. 2016, where D is called T
                       after the last of them
    ``"variable"``     the first L steps; 1 to D     Henaff et al. 2016, as Tallec & Ollivier 2018
                       steps after, equally likely   describe it; blanks fill up the rest
    ``"selective"``    L random steps, with blanks   Gu & Dao 2023, after the variable copying of
                       between; as with ``"fixed"``  the S4 code
    =================  ============================  ============================================

    With ``"fixed"`` the number of a step alone says what to do; with ``"variable"`` the inputs
    decide when to answer, with ``"selective"`` what to keep.

    Who sees the signal but has forgotten the symbols answers blanks, and guesses L times:

        baseline = L ln(S) / T,

    0.1733 for a delay of 100: 10 ln 8 / 120. It is little because most steps are blanks, so
    `score` counts the steps to be recalled only; chance is 1/S.

    Args:
        delay: Steps from the last symbol to the signal.
        variant: Where symbols and signal are.
        symbols: How many there are to choose from.
        copy_length: How many have to be copied.
        one_hot: Inputs as floats (B, T, S + 2), which every recurrent module takes as they are and
            through which the gradient of the input can be measured; else as indices (B, T), for
            models with an embedding.
        batch_size: Sequences per batch.
        train_size: Sequences to train on; Arjovsky et al. have 100,000.
        val_size: Sequences to validate on.
        test_size: Sequences to test on.
        seed: Of everything random in the data and in their order.
        num_workers: Worker processes per loader.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.

    Example:
        With 4 symbols, of which 2 are copied, and a delay of 3, a sequence can be 1 4 0 0 5 0 0,
        and its targets 0 0 0 0 0 1 4.

        >>> task = CopyMemory(delay=3, copy_length=2, symbols=4, one_hot=False)
        >>> inputs, targets = next(iter(task.train_dataloader()))
        >>> inputs.shape, inputs[0, 2:]
        (torch.Size([64, 7]), tensor([0, 0, 5, 0, 0]))
        >>> bool((inputs[:, :2] == targets[:, -2:]).all())
        True
        >>> round(CopyMemory(delay=1000).baseline, 4)
        0.0204
    """

    def __init__(
        self,
        delay: int = 100,
        variant: Literal["fixed", "variable", "selective"] = "fixed",
        symbols: int = 8,
        copy_length: int = 10,
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
        check_number("delay", delay, at_least=1, integer=True)
        check_choice("variant", variant, _VARIANTS)
        check_number("symbols", symbols, at_least=2, integer=True)
        check_number("copy_length", copy_length, at_least=1, integer=True)
        self.delay, self.variant = delay, variant
        self.symbols, self.copy_length = symbols, copy_length
        self.kind = "per step"
        self.length = delay + 2 * copy_length
        self.input_size, self.output_size = symbols + 2, symbols + 1
        self.baseline = copy_length * math.log(symbols) / self.length
        self._encode = encoder(self.input_size, one_hot)

    @override
    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The share of the symbols that are recalled rightly; chance is 1/S."""
        recalled = targets > 0
        return (self._right(outputs, targets) & recalled).sum() / recalled.sum()

    @override
    def _draw(self, size: int, generator: torch.Generator) -> Split:
        copied_BL = torch.randint(
            1, self.symbols + 1, (size, self.copy_length), generator=generator, dtype=torch.int32
        )
        shown_BL, signal_B1 = self._places(size, generator)
        inputs_BT = torch.zeros(size, self.length, dtype=torch.int32)
        targets_BT = inputs_BT.clone()
        inputs_BT.scatter_(1, shown_BL, copied_BL).scatter_(1, signal_B1, self.symbols + 1)
        targets_BT.scatter_(1, signal_B1 + 1 + torch.arange(self.copy_length), copied_BL)
        return Split(inputs_BT, targets_BT, self._encode)

    def _places(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The steps of the symbols, (B, L), and of the signal, (B, 1)."""
        shown_BL = torch.arange(self.copy_length).expand(size, -1)
        before = self.copy_length - 1 + self.delay
        signal_B1 = torch.full((size, 1), before)
        if self.variant == "variable":
            delays_B1 = torch.randint(1, self.delay + 1, (size, 1), generator=generator)
            signal_B1 = self.copy_length - 1 + delays_B1
        elif self.variant == "selective":
            order_BT = torch.rand(size, before, generator=generator).argsort(1)
            shown_BL = order_BT[:, : self.copy_length].sort(1).values
        return shown_BL, signal_B1
