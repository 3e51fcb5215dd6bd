"""The next character of a text.

Shape suffixes: ``N`` characters, ``W`` windows, ``B`` batch, ``T`` time, ``C`` classes.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_gradguard._validation import check_number, check_type
from lightning_gradguard.tasks.base import SequenceTask, SplitName
from lightning_gradguard.tasks.splits import Batch, Split, encoder

UNKNOWN = "\N{REPLACEMENT CHARACTER}"

# Single files in every Python from 3.10 on, about a million characters.
_MODULES = (
    *("argparse", "ast", "calendar", "configparser", "dataclasses", "difflib", "doctest", "enum"),
    *("fractions", "functools", "heapq", "inspect", "ipaddress", "optparse", "pdb", "pickle"),
    *("platform", "random", "shutil", "statistics", "subprocess", "tarfile", "textwrap"),
    *("threading", "traceback", "typing", "uuid"),
)
_HELD_OUT = 20  # a twentieth each to validate and to test on, as is usual with text8 and enwik8


class CharacterCorpus(SequenceTask):
    """The next character of a text, in windows of ``length``.

    Inputs (B, T, C) are characters x_1 … x_T, one-hot; targets (B, T) are x_2 … x_(T+1). The text
    is cut into windows that follow each other: first those to train on, then those to validate on,
    then those to test on. ``vocabulary`` holds each character of the training windows, after
    ``UNKNOWN`` at index 0, which stands for any other. Who knows only how often each comes pays

        baseline = −Σ_c p_c ln p_c,

    the entropy of single characters in the training windows, in nats (about 3 for source code).

    With ``stateful=True`` batches are made for truncated backpropagation through time over the
    whole text: row b of batch k + 1 goes on where row b of batch k ended, so that the state can be
    carried over with `detach_state`. Each row then is a stream of its own through a part of the
    split, nothing is shuffled, windows that fill no whole batch are left out, and at the start of
    an epoch every stream begins anew: start with a fresh state. It is for one process.

    Args:
        path: A text file, UTF-8. By default the source of some modules of Python's standard
            library, which every machine has; it differs between versions of Python.
        length: Characters per window.
        stateful: Whether each batch goes on where the one before ended.
        one_hot: Inputs as floats (B, T, C), else as indices (B, T) for models with an embedding.
        batch_size: Windows per batch.
        train_size: Windows to train on; by default all that are left.
        val_size: Windows to validate on; by default a twentieth.
        test_size: Windows to test on; by default a twentieth.
        seed: Of the order of the windows in training.
        num_workers: Worker processes per loader.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, or the text is too short for it.

    Example:
        >>> task = CharacterCorpus(length=50, stateful=True)
        >>> inputs, targets = next(iter(task.train_dataloader()))
        >>> tuple(inputs.shape) == (64, 50, task.input_size) and targets.shape
        torch.Size([64, 50])
        >>> task.decode(inputs[0, 1:].argmax(-1)) == task.decode(targets[0, :-1])
        True
        >>> 2.5 < task.baseline < 3.5
        True
    """

    def __init__(
        self,
        path: str | Path | None = None,
        length: int = 100,
        stateful: bool = False,
        one_hot: bool = True,
        *,
        batch_size: int = 64,
        train_size: int | None = None,
        val_size: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        check_type("path", path, (str, Path, type(None)), "a text file or None")
        check_number("length", length, at_least=1, integer=True)
        check_type("stateful", stateful, bool, "True or False")
        codes_N = _codes(_text(path))
        windows = max(len(codes_N) - 1, 0) // length
        val_size = max(windows // _HELD_OUT, 1) if val_size is None else val_size
        test_size = max(windows // _HELD_OUT, 1) if test_size is None else test_size
        super().__init__(
            batch_size=batch_size,
            # At least one, so that a text that is too short is what gets reported.
            train_size=max(windows - val_size - test_size, 1) if train_size is None else train_size,
            val_size=val_size,
            test_size=test_size,
            seed=seed,
            num_workers=num_workers,
        )
        self.stateful = stateful
        self._check_text(windows, length)
        known_C, counts_C = codes_N[: self.train_size * length].unique(return_counts=True)
        shares_C = counts_C.double() / counts_C.sum()
        self.kind = "per step"
        self.length = length
        self.vocabulary = UNKNOWN + "".join(map(chr, known_C.tolist()))
        self.input_size = self.output_size = len(self.vocabulary)
        self.baseline = float(-(shares_C * shares_C.log()).sum())
        self._encode = encoder(self.input_size, one_hot)
        self._indices_N = _indices(codes_N[: windows * length + 1], known_C)

    def decode(self, indices: Tensor) -> str:
        """The text that indices, in one row, stand for."""
        return "".join(self.vocabulary[index] for index in indices.flatten().tolist())

    @override
    def _make(self, name: SplitName) -> Split:
        windows = slice(*self._bounds(name))
        inputs_WT = self._indices_N[:-1].view(-1, self.length)[windows]
        targets_WT = self._indices_N[1:].view(-1, self.length)[windows]
        if self.stateful:
            per_row = len(inputs_WT) // self.batch_size
            # Row b of batch k is window k of the b-th of as many equal parts as there are rows.
            order_W = torch.arange(self.batch_size * per_row).view(-1, per_row).T.flatten()
            inputs_WT, targets_WT = inputs_WT[order_W], targets_WT[order_W]
        return Split(inputs_WT, targets_WT, self._encode)

    @override
    def _loader(self, name: SplitName, *, shuffle: bool = True) -> DataLoader[Batch]:
        processes = 1 if self.trainer is None else self.trainer.world_size
        if self.stateful and processes > 1:
            raise ValueError(
                "stateful must be False with more than one process, among which the windows of a "
                f"stream would be shared out, got True with {processes} processes"
            )
        return super()._loader(name, shuffle=shuffle and not self.stateful)

    def _bounds(self, name: SplitName) -> tuple[int, int]:
        start = {"train": 0, "val": self.train_size, "test": self.train_size + self.val_size}[name]
        return start, start + self._size(name)

    def _check_text(self, windows: int, length: int) -> None:
        wanted = self.train_size + self.val_size + self.test_size
        if wanted > windows:
            raise ValueError(
                f"path must hold at least {wanted * length + 1} characters for {wanted} windows of "
                f"length {length}, got enough for {windows}"
            )
        smallest = min(self.train_size, self.val_size, self.test_size)
        if self.stateful and smallest < self.batch_size:
            raise ValueError(
                "batch_size must be at most the windows of the smallest split with stateful=True, "
                f"{smallest}, got {self.batch_size}"
            )


def _text(path: str | Path | None) -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{name}.py" for name in _MODULES] if path is None else [Path(path)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"path must be a text file, got {path!r}: there is no file '{file}'"
            )
    return "".join(_text_in(file) for file in files)


def _text_in(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"path must be a text file in UTF-8, got '{file}' ({error})") from error


def _codes(text: str) -> Tensor:
    """The code points of a text, (N,)."""
    encoded = bytearray(text.encode(f"utf-32-{sys.byteorder[0]}e"))
    return torch.frombuffer(encoded, dtype=torch.int32) if encoded else torch.empty(0).int()


def _indices(codes_N: Tensor, known_C: Tensor) -> Tensor:
    """Where each code is in the sorted ``known_C``, from 1 on, or 0 if it is not there."""
    places_N = torch.searchsorted(known_C, codes_N, out_int32=True).clamp_(max=len(known_C) - 1)
    return torch.where(known_C[places_N] == codes_N, places_N + 1, 0)
