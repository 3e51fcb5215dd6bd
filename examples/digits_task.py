"""Handwritten digits, pixel by pixel, and a recurrent net. Nothing here knows of a guard."""

from __future__ import annotations

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

BATCH_SIZE = 64


class PixelSequences(LightningDataModule):
    """8x8 digits as sequences of 64 standardized pixels, in a fixed stratified split."""

    def __init__(self, steps: int, seed: int) -> None:
        super().__init__()
        self.steps = steps
        self.seed = seed

    @override
    def setup(self, stage: str) -> None:
        digits = load_digits()
        split = train_test_split(
            digits.data.astype(np.float32),
            digits.target,
            test_size=0.25,
            stratify=digits.target,
            random_state=0,
        )
        train_x, test_x, train_y, test_y = map(torch.as_tensor, split)
        mean, std = train_x.mean(), train_x.std()
        self.train = TensorDataset(((train_x - mean) / std).unsqueeze(-1), train_y)
        self.test = TensorDataset(((test_x - mean) / std).unsqueeze(-1), test_y)

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        # Shuffled passes over the data, one after the other, as one long epoch.
        order = RandomSampler(
            self.train,
            num_samples=self.steps * BATCH_SIZE,
            generator=torch.Generator().manual_seed(self.seed),
        )
        return DataLoader(self.train, batch_size=BATCH_SIZE, sampler=order)

    @override
    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, batch_size=len(self.test))


class SequenceClassifier(LightningModule):
    """An LSTM that reads the pixels and names the digit after the last one."""

    def __init__(self, learning_rate: float, hidden_size: int = 64) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.rnn = nn.LSTM(1, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, 10)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    @override
    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.rnn(x)
        logits: Tensor = self.head(outputs[:, -1])
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.accuracy(self(x), y)
        self.log("test_accuracy", self.accuracy)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)
