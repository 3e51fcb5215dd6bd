"""Models with all that a training step can change, and the state to compare it by."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch
import torchmetrics
from lightning.pytorch import LightningModule
from torch import Tensor, nn

VOCABULARY = 30
TEXT = "the gradient goes back through time, and little of it arrives. " * 8


def text_batches(count: int, size: int = 8, timesteps: int = 40) -> list[Tensor]:
    """Batches (B, T + 1) of characters of a text, from random places of it."""
    letters = {letter: number for number, letter in enumerate(sorted(set(TEXT)))}
    assert len(letters) <= VOCABULARY
    numbers = torch.tensor([letters[letter] for letter in TEXT])
    generator = torch.Generator().manual_seed(5)
    starts = torch.randint(len(TEXT) - timesteps, (count, size), generator=generator)
    return [torch.stack([numbers[s : s + timesteps + 1] for s in row]) for row in starts.tolist()]


class CharacterModel(LightningModule):
    """Predicts the next character; everything about its training step leaves traces.

    Dropout and noise take random numbers from three libraries; batch norm, a metric with sums and
    one with a list, plain tensors, lists, dicts, sets, deques, arrays and a generator change.
    """

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.embed = nn.Embedding(VOCABULARY, 12)
            self.rnn = nn.LSTM(12, hidden, batch_first=True)
            self.norm = nn.BatchNorm1d(hidden)
            self.drop = nn.Dropout(0.2)
            self.head = nn.Linear(hidden, VOCABULARY)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=VOCABULARY)
        self.cat = torchmetrics.CatMetric()
        self.metrics = {"mean": torchmetrics.MeanMetric()}
        self.register_buffer("seen", torch.zeros(VOCABULARY))
        self.average: Tensor = torch.zeros(())
        self.history: list[float] = []
        self.nested: dict[str, Any] = {"counts": {"steps": 0}, "names": {"a"}}
        self.recent: deque[float] = deque(maxlen=3)
        self.array = np.zeros(3)
        self.generator = torch.Generator().manual_seed(11)
        self.numpy_generator = np.random.default_rng(3)

    def forward(self, letters: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.embed(letters))
        hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        logits: Tensor = self.head(self.drop(hidden))
        return logits

    def loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        noise = random.random() + np.random.rand() + self.numpy_generator.random()
        loss = loss * (1 + 1e-3 * noise + 1e-3 * torch.rand((), generator=self.generator))
        self.leave_traces(batch, logits.detach(), loss.detach())
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)
        self.log_dict({"noise": noise})
        return loss

    def leave_traces(self, batch: Tensor, logits: Tensor, loss: Tensor) -> None:
        self.accuracy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.cat.update(loss)
        self.metrics["mean"].update(loss)
        self.seen += torch.bincount(batch.flatten(), minlength=VOCABULARY)
        self.average = 0.9 * self.average + 0.1 * loss
        self.history.append(loss.item())
        self.nested["counts"]["steps"] += 1
        self.nested["names"].add(f"step {len(self.history)}")
        self.recent.append(loss.item())
        self.array += 1
        self.new_attribute = len(self.history)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def state_of(model: nn.Module, *, identity: bool = True) -> dict[str, Any]:
    """All that must be as it was found, copied.

    Args:
        model: The model.
        identity: Whether objects that have no value to compare must be the same objects; in two
            models they only have to be of the same type.
    """
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "attributes": [_plain(vars(module), identity) for module in model.modules()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }


def _plain(value: Any, identity: bool) -> Any:
    """A copy of values; of other objects who they are."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {str(key): _plain(part, identity) for key, part in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_plain(part, identity) for part in value]
    if isinstance(value, set):
        return sorted(map(str, value))
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, torchmetrics.Metric):
        return _plain(vars(value), identity)
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    return id(value) if identity else type(value).__name__
