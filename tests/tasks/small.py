"""Every task, small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from lightning_gradguard.tasks import (
    AddingProblem,
    CharacterCorpus,
    CopyMemory,
    FrequencyDiscrimination,
    SequenceTask,
    SequentialDigits,
    SequentialMNIST,
    TemporalOrder,
)

SIZES = {"train_size": 24, "val_size": 8, "test_size": 8, "batch_size": 4}


def write_idx(path: Path, values: Tensor) -> None:
    header = bytes([0, 0, 8, values.dim()])
    axes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(header + axes + bytes(values.flatten().tolist()))


def write_mnist(root: Path, train: int = 32, test: int = 8) -> Path:
    """Write random images in MNIST's format; the first pixel of image n is n."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(7)
    for part, size in (("train", train), ("t10k", test)):
        images = torch.randint(256, (size, 28, 28), generator=generator)
        images[:, 0, 0] = torch.arange(size)
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", torch.arange(size) % 10)
    return root


def write_text(root: Path) -> Path:
    path = root / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 12, encoding="utf-8")
    return path


TASKS: dict[str, Callable[..., SequenceTask]] = {
    "adding": lambda root, **more: AddingProblem(12, **{**SIZES, **more}),
    "copy": lambda root, **more: CopyMemory(6, "variable", **{**SIZES, **more}),
    "selective copy": lambda root, **more: CopyMemory(6, "selective", **{**SIZES, **more}),
    "order": lambda root, **more: TemporalOrder(12, **{**SIZES, **more}),
    "order of three": lambda root, **more: TemporalOrder(12, 3, **{**SIZES, **more}),
    "frequency": lambda root, **more: FrequencyDiscrimination(12, **{**SIZES, **more}),
    "digits": lambda root, **more: SequentialDigits(True, **{**SIZES, **more}),
    "mnist": lambda root, **more: SequentialMNIST(write_mnist(root), True, **{**SIZES, **more}),
    "characters": lambda root, **more: CharacterCorpus(write_text(root), 9, **{**SIZES, **more}),
    "stream": lambda root, **more: CharacterCorpus(write_text(root), 9, True, **{**SIZES, **more}),
}


def digest(task: SequenceTask) -> str:
    """Stands for all that the loaders of a task give, in its order, in two epochs."""
    hashed = sha256()
    for loader in (task.train_dataloader(), task.val_dataloader(), task.test_dataloader()):
        for _ in range(2):
            for inputs, targets in loader:
                hashed.update(inputs.numpy().tobytes() + targets.numpy().tobytes())
    return hashed.hexdigest()
