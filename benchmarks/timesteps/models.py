"""What is trained: one recurrent module, fused or unrolled, and a loss on its last timestep.

Shape suffixes: ``T`` time, ``B`` batch, ``I`` input, ``H`` hidden, ``C`` classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

CLASSES = 10
VOCABULARY = 256
LEARNING_RATE = 1e-3

FUSED: dict[str, type[nn.LSTM | nn.GRU | nn.RNN]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS: dict[str, type[nn.LSTMCell | nn.GRUCell | nn.RNNCell]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn": nn.RNNCell,
}


class Shape(NamedTuple):
    """Sizes of a batch and of the module."""

    timesteps: int
    sequences: int
    input_size: int
    hidden_size: int

    def __str__(self) -> str:
        t, b, i, h = self
        return f"T={t}, B={b}, input {i}, hidden {h}"


class SequenceClassifier(nn.Module):
    """One fused recurrent layer and a linear head on its last output."""

    def __init__(self, kind: str, shape: Shape, inputs: str) -> None:
        super().__init__()
        width = shape.hidden_size if inputs == "embedding" else shape.input_size
        self.embedding = nn.Embedding(VOCABULARY, width) if inputs == "embedding" else nn.Identity()
        self.rnn = FUSED[kind](width, shape.hidden_size)
        self.head = nn.Linear(shape.hidden_size, CLASSES)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        output_TBH, _ = self.rnn(self.embedding(inputs))
        scores_BC: Tensor = self.head(output_TBH[-1])
        return scores_BC


class UnrolledClassifier(nn.Module):
    """The same with the same weights, one call of a cell for each timestep: states can be kept.

    Attributes:
        hidden: h_t of the last forward pass, whose gradients are kept.
        cells: c_t of an LSTM.
    """

    def __init__(self, kind: str, model: SequenceClassifier) -> None:
        super().__init__()
        rnn = model.rnn
        self.cell = CELLS[kind](rnn.input_size, rnn.hidden_size).to(model.head.weight.device)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        self.cell.load_state_dict({name: getattr(rnn, f"{name}_l0") for name in names})
        self.embedding, self.head = model.embedding, model.head
        self.hidden: list[Tensor] = []
        self.cells: list[Tensor] = []

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        self.hidden, self.cells = [], []
        state: Any = None
        for input_BI in self.embedding(inputs).unbind(0):
            state = self.cell(input_BI, state)
            if isinstance(state, tuple):
                self.cells.append(state[1])
            self.hidden.append(state[0] if isinstance(state, tuple) else state)
        for kept in (*self.hidden, *self.cells):
            kept.retain_grad()
        scores_BC: Tensor = self.head(self.hidden[-1])
        return scores_BC


class Task:
    """A model, its batch and its optimizer: what a bare training loop has.

    Args:
        kind: Key of ``FUSED``.
        shape: Sizes.
        device: ``"cpu"`` or ``"cuda"``.
        inputs: How the module gets its input: as ``"data"``, of which nobody else needs the
            gradient, or from an ``"embedding"``, which is as wide as the hidden state.
    """

    def __init__(self, kind: str, shape: Shape, device: str, inputs: str = "data") -> None:
        torch.manual_seed(0)
        self.kind, self.shape, self.device = kind, shape, device
        self.classifier = SequenceClassifier(kind, shape, inputs).to(device)
        self.model: nn.Module = self.classifier
        size = (shape.timesteps, shape.sequences)
        batch = (
            torch.randint(VOCABULARY, size)
            if inputs == "embedding"
            else torch.randn(*size, shape.input_size)
        )
        self.inputs = batch.to(device)
        self.targets_B = torch.randint(CLASSES, (shape.sequences,)).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def unrolled(self) -> UnrolledTask:
        """The same task for cells in a loop."""
        return UnrolledTask(self)

    def loss(self, scores_BC: Tensor) -> Tensor:
        """Cross entropy of the classes."""
        return nn.functional.cross_entropy(scores_BC, self.targets_B)

    def backward(self) -> None:
        """Forward and backward pass."""
        self.optimizer.zero_grad()
        self.loss(self.model(self.inputs)).backward()

    def step(self) -> None:
        """One training step."""
        self.backward()
        self.optimizer.step()

    def direct_gradient(self, output_TBH: Tensor) -> Tensor:
        """The gradient that the loss sends to each output, not through later ones."""
        output_TBH = output_TBH.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.loss(self.classifier.head(output_TBH[-1]))
            (grad_TBH,) = torch.autograd.grad(loss, output_TBH)
        return grad_TBH


class UnrolledTask(Task):
    """A task whose model is made of cells, with the weights and the batch of another."""

    def __init__(self, task: Task) -> None:
        self.kind, self.shape, self.device = task.kind, task.shape, task.device
        self.classifier = task.classifier
        self.cells = UnrolledClassifier(task.kind, task.classifier)
        self.model = self.cells
        self.inputs, self.targets_B = task.inputs, task.targets_B
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)
