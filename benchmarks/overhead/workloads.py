"""What is trained: four models with batches of ordinary size, at an ordinary learning rate.

Shape suffixes: ``B`` batch, ``T`` time, ``D`` features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from typing_extensions import override

LEARNING_RATE = 3e-4
DISTINCT_BATCHES = 8

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda parameters: AdamW(parameters, lr=LEARNING_RATE),
    "adamw_fused": lambda parameters: AdamW(parameters, lr=LEARNING_RATE, fused=True),
    "sgd": lambda parameters: SGD(parameters, lr=LEARNING_RATE, momentum=0.9),
}

Batch = tuple[Tensor, Tensor]


class Regression(LightningModule):
    """A network and a squared error, and nothing else: what is added to it is what is measured."""

    def __init__(self, net: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs), targets)

    @override
    def configure_optimizers(self) -> Optimizer:
        return OPTIMIZERS[self.optimizer](list(self.parameters()))


class Recurrent(nn.Module):
    """An LSTM with a linear head on every step."""

    def __init__(self, size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(size, hidden_size, num_layers, batch_first=True)
        self.head = nn.Linear(hidden_size, size)

    @override
    def forward(self, inputs_BTD: Tensor) -> Tensor:
        outputs_BTH, _ = self.rnn(inputs_BTD)
        head: Tensor = self.head(outputs_BTH)
        return head


class DeepResidual(nn.Module):
    """Very many very small tensors: a deep stack of narrow residual layers."""

    def __init__(self, size: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(depth))

    @override
    def forward(self, state_BD: Tensor) -> Tensor:
        for layer in self.layers:
            state_BD = state_BD + 0.1 * torch.tanh(layer(state_BD))
        return state_BD


def transformer(depth: int, width: int, heads: int) -> nn.Module:
    """Pre-norm encoder layers without dropout: 12 tensors each."""
    return nn.Sequential(
        *(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
    )


@dataclass(frozen=True)
class Workload:
    """A model and the shape of its batches.

    Args:
        name: Short name, for tables.
        summary: What it is, in a line.
        make_net: Builds it.
        shape: Shape of a batch of inputs, and of targets.
        heavy: Whether a step takes so long on a CPU that fewer contenders and steps must do.
    """

    name: str
    summary: str
    make_net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    heavy: bool = False

    def make_module(self, optimizer: str) -> Regression:
        """The same weights for everyone."""
        torch.manual_seed(0)
        return Regression(self.make_net(), optimizer)

    def make_batches(self, device: str) -> list[Batch]:
        """A few batches that are gone through again and again, on the device already."""
        generator = torch.Generator().manual_seed(1)
        size = self.shape[-1]
        mixing_DD = torch.randn(size, size, generator=generator) / size**0.5
        batches = []
        for _ in range(DISTINCT_BATCHES):
            inputs = torch.randn(self.shape, generator=generator)
            batches.append((inputs.to(device), (inputs @ mixing_DD).to(device)))
        return batches

    def describe(self) -> dict[str, Any]:
        """As plain values for a result file."""
        net = self.make_net()
        parameters = list(net.parameters())
        return {
            "summary": self.summary,
            "batch_shape": list(self.shape),
            "tensors": len(parameters),
            "parameters": sum(p.numel() for p in parameters),
        }


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "lstm",
            "2-layer LSTM, hidden 256, T=64, B=32",
            lambda: Recurrent(64, 256, 2),
            (32, 64, 64),
        ),
        Workload(
            "transformer12",
            "12-layer transformer, d=128, T=64, B=8",
            lambda: transformer(12, 128, 4),
            (8, 64, 128),
        ),
        Workload(
            "transformer24",
            "24-layer transformer, d=512, T=64, B=2",
            lambda: transformer(24, 512, 8),
            (2, 64, 512),
            heavy=True,
        ),
        Workload(
            "tiny1000",
            "1,000 tensors of 8 or 64 elements, B=32",
            lambda: DeepResidual(8, 500),
            (32, 8),
        ),
    )
}


def counting_workload(tensors: int) -> Workload:
    """Small enough to count every operation, with a number of tensors to choose."""
    return Workload(
        f"tensors{tensors}",
        f"{tensors} tensors of 8 or 64 elements",
        lambda: DeepResidual(8, tensors // 2),
        (8, 8),
    )
