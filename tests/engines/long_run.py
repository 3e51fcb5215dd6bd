"""A run that is hard on the guard, that leaves checkpoints, and that can kill itself on the way.

``python -m tests.engines.long_run ROOT OPTIMIZER KILL_AT``
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_gradguard import GradGuard
from tests.models import loader, quiet_trainer

STEPS = 90
CHECKPOINT_EVERY = 10
POISONED = (13, 14, 47)
TOKENS = 40

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "fused_adamw": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "fused_sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, fused=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.05),
}


class Tagger(LightningModule):
    """An embedding of which each step touches other rows, dropout, and a loss that jumps.

    Batches follow from the number of the step, so that a run which resumes within an epoch sees
    the batches that it would have seen.
    """

    def __init__(self, optimizer: str, kill_at: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.embedding = nn.Embedding(TOKENS, 8)
            self.rnn = nn.RNN(8, 16, batch_first=True)
            self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 2))
        self.optimizer = optimizer
        self.kill_at = kill_at

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        step = self.global_step
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, TOKENS, (4, 6), generator=generator)
        # Dropout's random numbers follow from the step too: Lightning does not restore them.
        torch.manual_seed(step)
        logits = self.head(self.rnn(self.embedding(tokens))[0][:, -1])
        loss = nn.functional.cross_entropy(logits, tokens[:, 0] % 2)
        if step in POISONED:
            loss = loss * torch.nan
        return loss * 50 if 60 <= step < 75 else loss

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def run(
    root: Path, optimizer: str, *, kill_at: int | None = None, checkpoint: Path | None = None
) -> tuple[Trainer, Tagger, GradGuard]:
    guard = GradGuard()
    keep = ModelCheckpoint(
        dirpath=root / "checkpoints",
        filename="{step}",
        every_n_train_steps=CHECKPOINT_EVERY,
        save_top_k=-1,
    )
    model = Tagger(optimizer, kill_at)
    trainer = quiet_trainer(
        root,
        guard,
        keep,
        enable_checkpointing=True,
        max_epochs=-1,
        max_steps=STEPS,
    )
    trainer.fit(model, loader(list(range(30))), ckpt_path=checkpoint, weights_only=True)
    return trainer, model, guard


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), sys.argv[2], kill_at=int(sys.argv[3]))
