"""What every task shares: sizes and seeds, the splits and their loaders, a loss and a score.

Shape suffixes: ``B`` batch, ``T`` time, ``I`` input, ``C`` classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader

from lightning_gradguard._validation import check_choice, check_number
from lightning_gradguard.tasks.splits import Batch, Shuffled, Split

try:
    from lightning.pytorch import LightningDataModule
except ModuleNotFoundError as error:  # only its older name may be installed
    if error.name != "lightning":
        raise
    from pytorch_lightning import LightningDataModule  # type: ignore[assignment]

Kind = Literal["regression", "classification", "per step"]
SplitName = Literal["train", "val", "test"]

_SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
_NEEDED: dict[str | None, tuple[SplitName, ...]] = {
    None: _SPLITS,
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": (),
}
_ORDER, _LOADERS, PERMUTATION = 3, 4, 5


class SequenceTask(LightningDataModule, ABC):
    """Sequences to learn from, with the loss of whoever ignores them.

    Use it with a Trainer (``trainer.fit(model, datamodule=task)``) or by its loaders alone, as in
    the example; the loaders also serve a Trainer of the other of Lightning's two namespaces. Data
    and their order follow from ``seed``, whatever ``num_workers`` is, and torch's global random
    state is neither used nor changed.

    Args:
        batch_size: Sequences per batch.
        train_size: Sequences to train on.
        val_size: Sequences to validate on.
        test_size: Sequences to test on.
        seed: Of everything random in the data and in their order.
        num_workers: Worker processes per loader; 0 loads in this process, which is fast enough for
            data that are in memory anyway.

    Attributes:
        kind: ``"regression"`` (targets (B,), real), ``"classification"`` (targets (B,), classes) or
            ``"per step"`` (targets (B, T), classes).
        length: Steps of a sequence, ``T``.
        input_size: Inputs per step, ``I``; with index inputs, how many symbols there are.
        output_size: Outputs the loss wants, ``C``: 1 for a regression, else the number of classes.
        baseline: What `loss` comes to for the best answer that remembers nothing of the sequence.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_gradguard.tasks import AddingProblem
        >>> task = AddingProblem(length=20, batch_size=8)
        >>> for inputs, targets in task.val_dataloader():
        ...     outputs = torch.ones(len(inputs), task.output_size)  # the mean: knows nothing
        ...     loss = task.loss(outputs, targets)
    """

    kind: Kind
    length: int
    input_size: int
    output_size: int
    baseline: float

    def __init__(
        self,
        *,
        batch_size: int,
        train_size: int,
        val_size: int,
        test_size: int,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        sizes = {"train": train_size, "val": val_size, "test": test_size}
        check_number("batch_size", batch_size, at_least=1, integer=True)
        for name, size in sizes.items():
            check_number(f"{name}_size", size, at_least=1, integer=True)
        check_number("seed", seed, at_least=0, at_most=2**32 - 1, integer=True)
        check_number("num_workers", num_workers, at_least=0, integer=True)
        self.batch_size = batch_size
        self.train_size, self.val_size, self.test_size = train_size, val_size, test_size
        self.seed = seed
        self.num_workers = num_workers
        self._made: dict[SplitName, Split] = {}

    @property
    def classes(self) -> int:
        """Number of classes, 0 for a regression."""
        return 0 if self.kind == "regression" else self.output_size

    @abstractmethod
    def _make(self, name: SplitName) -> Split:
        """Make the split of a name, the same at every call."""

    def split(self, name: SplitName) -> Split:
        """The split ``"train"``, ``"val"`` or ``"test"``, made on first use."""
        check_choice("name", name, _SPLITS)
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def setup(self, stage: str | None = None) -> None:
        """Make the splits that a stage of the Trainer needs; without a stage, all."""
        for name in _NEEDED[stage]:
            self.split(name)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches to train on, in another order every epoch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches to validate on, always in the same order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches to test on, always in the same order."""
        return self._loader("test")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of a regression, else mean cross entropy in nats.

        Args:
            outputs: Of shape (*targets.shape, C); a regression may leave out the last axis.
            targets: As they come from a loader.

        Raises:
            ValueError: If the shapes do not belong together, which would be broadcast otherwise.
        """
        outputs = self._checked(outputs, targets)
        if self.kind == "regression":
            return mse_loss(outputs, targets)
        return cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What is higher for better, 1 at best: of a regression 1 − loss/baseline, else accuracy.

        An output that is not finite counts as a wrong answer.
        """
        if self.kind == "regression":
            return 1.0 - self.loss(outputs, targets) / self.baseline
        return self._right(outputs, targets).float().mean()

    def _right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = self._checked(outputs, targets)
        return (outputs.argmax(-1) == targets) & outputs.isfinite().all(-1)

    def _checked(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.kind == "regression" and outputs.shape == (*targets.shape, 1):
            return outputs.squeeze(-1)
        wanted = targets.shape if self.kind == "regression" else (*targets.shape, self.output_size)
        if outputs.shape != wanted:
            raise ValueError(f"outputs must have the shape {tuple(wanted)}, got {outputs.shape}")
        return outputs

    def _size(self, name: SplitName) -> int:
        return {"train": self.train_size, "val": self.val_size, "test": self.test_size}[name]

    def _seed(self, purpose: int) -> int:
        """A seed of its own for each of six purposes: three splits, order, loaders, permutation."""
        return 6 * self.seed + purpose

    def _generator(self, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(purpose))

    def _loader(self, name: SplitName, *, shuffle: bool = True) -> DataLoader[Batch]:
        split = self.split(name)
        shuffle = shuffle and name == "train"
        return DataLoader(
            split,
            batch_size=self.batch_size,
            sampler=Shuffled(len(split), self._seed(_ORDER)) if shuffle else None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # Without one, even a loader that shuffles nothing draws from the global generator.
            generator=self._generator(_LOADERS),
        )


class GeneratedTask(SequenceTask):
    """A task whose sequences are drawn, all of a split at once."""

    @abstractmethod
    def _draw(self, size: int, generator: torch.Generator) -> Split:
        """Draw as many examples."""

    def _make(self, name: SplitName) -> Split:
        return self._draw(self._size(name), self._generator(_SPLITS.index(name)))
