"""Tasks that need a long memory, as LightningDataModules.

Each says before it makes any data what a model needs to know (``length``, ``input_size``,
``output_size``, ``kind``), brings the ``loss`` and ``score`` that belong to it, and knows the loss
of whoever remembers nothing, ``baseline``: a model that is not below it has learned nothing.

Example:
    >>> import torch
    >>> from lightning.pytorch import LightningModule, Trainer
    >>> from lightning_gradguard.tasks import AddingProblem
    >>> task = AddingProblem(length=20, train_size=256)
    >>> class Model(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.rnn = torch.nn.GRU(task.input_size, 16, batch_first=True)
    ...         self.head = torch.nn.Linear(16, task.output_size)
    ...
    ...     def training_step(self, batch, batch_idx):
    ...         inputs, targets = batch
    ...         outputs, _ = self.rnn(inputs)
    ...         return task.loss(self.head(outputs[:, -1]), targets)
    ...
    ...     def validation_step(self, batch, batch_idx):
    ...         inputs, targets = batch
    ...         outputs, _ = self.rnn(inputs)
    ...         self.log("score", task.score(self.head(outputs[:, -1]), targets))
    ...
    ...     def configure_optimizers(self):
    ...         return torch.optim.Adam(self.parameters(), 1e-2)
    >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    >>> trainer = Trainer(max_steps=4, accelerator="cpu", enable_model_summary=False, **quiet)
    >>> trainer.fit(Model(), datamodule=task)
"""

from __future__ import annotations

from lightning_gradguard.tasks.adding import AddingProblem
from lightning_gradguard.tasks.base import SequenceTask
from lightning_gradguard.tasks.copying import CopyMemory
from lightning_gradguard.tasks.corpus import CharacterCorpus
from lightning_gradguard.tasks.digits import SequentialDigits, SequentialMNIST
from lightning_gradguard.tasks.frequency import FrequencyDiscrimination
from lightning_gradguard.tasks.temporal_order import TemporalOrder
from lightning_gradguard.tasks.truncation import bptt_chunks, detach_state

__all__ = [
    "AddingProblem",
    "CharacterCorpus",
    "CopyMemory",
    "FrequencyDiscrimination",
    "SequenceTask",
    "SequentialDigits",
    "SequentialMNIST",
    "TemporalOrder",
    "bptt_chunks",
    "detach_state",
]
