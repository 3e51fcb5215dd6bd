"""Handwritten digits, one pixel per step.

Shape suffixes: ``B`` batch, ``N`` examples, ``T`` time (pixels), ``I`` input.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradguard._validation import check_type
from lightning_gradguard.tasks.base import PERMUTATION, SequenceTask, SplitName
from lightning_gradguard.tasks.splits import Batch, Split

_IDX_BYTES = 8  # the type code of unsigned bytes
_MNIST_FILES = {"train": "train", "val": "train", "test": "t10k"}


class PixelSequences(SequenceTask):
    """Images of ten classes read pixel by pixel, row after row or in one random order."""

    def __init__(
        self,
        length: int,
        permuted: bool,
        *,
        batch_size: int,
        train_size: int,
        val_size: int,
        test_size: int,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
            seed=seed,
            num_workers=num_workers,
        )
        check_type("permuted", permuted, bool, "True or False")
        self.permuted = permuted
        self.kind = "classification"
        self.length, self.input_size, self.output_size = length, 1, 10
        self.baseline = math.log(10)

    @property
    def permutation(self) -> Tensor:
        """The pixel that is read at each step, (T,); the same for every image and split."""
        if not self.permuted:
            return torch.arange(self.length)
        return torch.randperm(self.length, generator=self._generator(PERMUTATION))


class SequentialDigits(PixelSequences):
    """Scikit-learn's handwritten digits as sequences of 64 pixels, the sequential MNIST in small.

    Inputs (B, 64, 1) are the pixels of 8×8 images, between 0 and 1; targets (B,) are the digits.
    There are 1,797 images, which come with scikit-learn, so that nothing is downloaded; ``seed``
    decides which of them are in which split. Guessing costs baseline = ln 10. With
    ``permuted=True`` all images are read in one order drawn from ``seed``, as Le et al. (2015) do
    with MNIST: neighbors are then far apart in time.

    Args:
        permuted: Read pixels in a random order instead of row by row.
        batch_size: Sequences per batch.
        train_size: Images to train on; the three sizes must not exceed 1,797 together.
        val_size: Images to validate on.
        test_size: Images to test on.
        seed: Of the splits, their order, and the permutation.
        num_workers: Worker processes per loader.

    Raises:
        ModuleNotFoundError: When the data are made, if scikit-learn is not installed.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, or there are too few images.

    Example:
        >>> task = SequentialDigits(permuted=True)
        >>> inputs, targets = next(iter(task.train_dataloader()))
        >>> inputs.shape, targets.shape, task.permutation.shape
        (torch.Size([64, 64, 1]), torch.Size([64]), torch.Size([64]))
    """

    def __init__(
        self,
        permuted: bool = False,
        *,
        batch_size: int = 64,
        train_size: int = 1_297,
        val_size: int = 250,
        test_size: int = 250,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            64,
            permuted,
            batch_size=batch_size,
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
            seed=seed,
            num_workers=num_workers,
        )
        _check_enough("train_size, val_size and test_size", [train_size, val_size, test_size], 1797)

    @override
    def _make(self, name: SplitName) -> Split:
        pixels_NT, labels_N = _digits()
        order_N = torch.randperm(len(labels_N), generator=self._generator(0))
        sizes = [self.train_size, self.val_size, self.test_size]
        index = ("train", "val", "test").index(name)
        chosen = order_N[sum(sizes[:index]) :][: sizes[index]]
        return Split(pixels_NT[chosen][:, self.permutation].unsqueeze(-1), labels_N[chosen])


class SequentialMNIST(PixelSequences):
    """MNIST as sequences of 784 pixels (Le et al. 2015), from files that are on disk already.

    Inputs (B, 784, 1) are the pixels of 28×28 images, between 0 and 1; targets (B,) are the digits.
    The files are those that torchvision leaves, ``ROOT/MNIST/raw/train-images-idx3-ubyte`` and its
    three companions, packed (``.gz``) or not. They are read without torchvision, and nothing is
    ever downloaded. Guessing costs baseline = ln 10. With ``permuted=True`` all images are read in
    one order drawn from ``seed``.

    Args:
        root: The folder that was given to torchvision, or the one that holds the files.
        permuted: Read pixels in a random order instead of row by row.
        batch_size: Sequences per batch.
        train_size: Images to train on, the first of the 60,000.
        val_size: Images to validate on, those after them.
        test_size: Images to test on, the first of the 10,000.
        seed: Of the order in training, and the permutation.
        num_workers: Worker processes per loader.

    Raises:
        FileNotFoundError: If the files are not there.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, a file is no IDX file of such images, or holds
            too few of them.

    Example:
        >>> SequentialMNIST("nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: root must hold MNIST/raw/train-images-idx3-ubyte (or .gz), as \
torchvision.datasets.MNIST(root, download=True) leaves it, got 'nowhere'
    """

    def __init__(
        self,
        root: str | Path,
        permuted: bool = False,
        *,
        batch_size: int = 64,
        train_size: int = 55_000,
        val_size: int = 5_000,
        test_size: int = 10_000,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            784,
            permuted,
            batch_size=batch_size,
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
            seed=seed,
            num_workers=num_workers,
        )
        check_type("root", root, (str, Path), "a folder")
        self.root = root
        for part in ("train", "t10k"):
            _mnist_file(root, f"{part}-images-idx3-ubyte")
            _mnist_file(root, f"{part}-labels-idx1-ubyte")

    @override
    def _make(self, name: SplitName) -> Split:
        part = _MNIST_FILES[name]
        images_NHW = read_idx(_mnist_file(self.root, f"{part}-images-idx3-ubyte"))
        labels_N = read_idx(_mnist_file(self.root, f"{part}-labels-idx1-ubyte"))
        if images_NHW.shape != (len(labels_N), 28, 28):
            raise ValueError(
                f"root must hold as many images of 28x28 pixels as labels, got images of shape "
                f"{tuple(images_NHW.shape)} and {len(labels_N)} labels in {part!r}"
            )
        if part == "t10k":
            _check_enough("test_size", [self.test_size], len(labels_N))
        else:
            _check_enough(
                "train_size and val_size", [self.train_size, self.val_size], len(labels_N)
            )
        start = self.train_size if name == "val" else 0
        chosen = slice(start, start + self._size(name))
        pixels_NT = images_NHW[chosen].flatten(1)[:, self.permutation]
        return Split(pixels_NT, labels_N[chosen], _as_shares)


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, MNIST's format, packed or not.

    Two zero bytes, the type, the number of axes, each axis as a big-endian integer of four bytes,
    and the values.

    Raises:
        ValueError: If the file is no such file, or not a whole one.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"path must be a whole gzip file, got '{path}' ({error})") from error
    axes = data[3] if data[:3] == bytes([0, 0, _IDX_BYTES]) and len(data) > 3 else 0
    start = 4 + 4 * axes
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    if not axes or len(data) != start + math.prod(shape):
        raise ValueError(f"path must be a whole IDX file of unsigned bytes, got '{path}'")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).view(shape)


def _as_shares(pixels_BT: Tensor) -> Tensor:
    return (pixels_BT.float() / 255).unsqueeze(-1)


def _mnist_file(root: str | Path, name: str) -> Path:
    for folder in (Path(root) / "MNIST" / "raw", Path(root)):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"root must hold MNIST/raw/{name} (or .gz), as "
        f"torchvision.datasets.MNIST(root, download=True) leaves it, got {str(root)!r}"
    )


def _check_enough(names: str, sizes: list[int], there: int) -> None:
    if sum(sizes) > there:
        raise ValueError(f"{names} must not exceed {there} images together, got {sum(sizes)}")


def _digits() -> Batch:
    """All pixels, (N, 64), and labels, (N,)."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "SequentialDigits needs the digits that come with scikit-learn, which is not "
            "installed: pip install scikit-learn",
            name=error.name,
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    # Plain values of Python, so that torch need not understand this version of NumPy.
    return torch.tensor(pixels.tolist()) / 16, torch.tensor(labels.tolist())
