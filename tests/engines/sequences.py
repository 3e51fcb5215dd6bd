"""A model that reads sequences, their data, and a plain loop around it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_gradguard import GuardEngine

T, B = 24, 6


class Reader(LightningModule):
    """Says whether the first input of a sequence was positive."""

    def __init__(self, rnn: nn.Module | None = None, lr: float = 1e-2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.rnn = nn.LSTM(3, 16) if rnn is None else rnn
            self.head = nn.Linear(16, 1)
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        output, _ = self.rnn(inputs)
        return nn.functional.binary_cross_entropy_with_logits(self.head(output[-1]), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)


class Validated(Reader):
    """The same with a validation loss."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=B)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(T, B, 3, generator=generator) for _ in range(count)]
    return [(x, (x[0, :, :1] > 0).float()) for x in inputs]


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def train(model: Any, optimizer: Any, engine: GuardEngine, steps: Any, change: Any = None) -> None:
    for step, (inputs, _) in enumerate(batches(steps)):
        if change is not None:
            change(step)
        optimizer.zero_grad()
        loss = model(inputs)[0][-1].square().mean()
        loss.backward()
        engine.before_step(loss)
        optimizer.step()
    engine.close()
