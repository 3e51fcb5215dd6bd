"""A run with ``GradientMonitor`` ends in the same bits as a run without it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from lightning_gradguard import GradGuard, GradientMonitor
from tests.engines.test_manual_optimization import Gan
from tests.models import (
    Regression,
    WithValidation,
    adamw,
    assert_same_bits,
    fused_adamw,
    fused_sgd,
    loader,
    make_batches,
    quiet_trainer,
    sgd,
)

OPTIMIZERS = pytest.mark.parametrize(
    "make_optimizer", [adamw, fused_adamw, sgd, fused_sgd], ids=lambda f: f.__name__
)
# A run that goes badly is left alone as much as one that goes well.
POISONED = pytest.mark.parametrize("poisoned", [(), (20,)], ids=["healthy", "with a NaN"])


def final_state(
    root: Path, model: LightningModule, batches: Any, *callbacks: Callback, **arguments: Any
) -> dict[str, Any]:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    trainer = quiet_trainer(root, *callbacks, **arguments)
    trainer.fit(model, loader(batches))
    return {
        "weights": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "metrics": {k: v for k, v in trainer.callback_metrics.items() if k == "val_loss"},
        "global_step": trainer.global_step,
    }


def watchers() -> list[list[Callback]]:
    return [[GradientMonitor()], [GradGuard(mode="observe")]]


@OPTIMIZERS
@POISONED
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_automatic_optimization(
    tmp_path: Path, make_optimizer: Any, poisoned: tuple[int, ...], precision: Any
) -> None:
    if make_optimizer is fused_sgd and precision == "bf16-true":
        pytest.skip("torch's fused SGD on a CPU has a momentum of random bits in bfloat16")
    batches = make_batches(24, poisoned=poisoned)
    settings = {"precision": precision, "log_every_n_steps": 1, "max_epochs": 2}
    states = [
        final_state(tmp_path, Regression(make_optimizer, 0.2), batches, *callbacks, **settings)
        for callbacks in [[], *watchers()]
    ]
    assert_same_bits(states[1], states[0])
    assert_same_bits(states[2], states[0])


@OPTIMIZERS
def test_accumulation_clipping_and_validation(tmp_path: Path, make_optimizer: Any) -> None:
    def run(*callbacks: Callback) -> dict[str, Any]:
        torch.manual_seed(3)
        model = WithValidation(make_optimizer, 0.2)
        trainer = quiet_trainer(
            tmp_path, *callbacks, accumulate_grad_batches=2, gradient_clip_val=1.0
        )
        trainer.fit(model, loader(make_batches(30)), loader(make_batches(3)))
        return {
            "weights": model.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "random": torch.get_rng_state(),
            "loss": trainer.callback_metrics["val_loss"],
        }

    plain = run()
    for callbacks in watchers():
        assert_same_bits(run(*callbacks), plain)


@pytest.mark.parametrize("make_optimizer", [adamw, fused_adamw], ids=lambda f: f.__name__)
@POISONED
def test_two_optimizers_by_hand(
    tmp_path: Path, make_optimizer: Any, poisoned: tuple[int, ...]
) -> None:
    batches = make_batches(30)
    states = [
        final_state(tmp_path, Gan(make_optimizer, poisoned), batches, *callbacks)
        for callbacks in [[], *watchers()]
    ]
    assert_same_bits(states[1], states[0])
    assert_same_bits(states[2], states[0])


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """One random number more than the other run, and it is noticed."""

    class Meddler(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            torch.rand(())

    batches = make_batches(5)
    state = final_state(tmp_path, Regression(dropout=0.2), batches)
    other = final_state(tmp_path, Regression(dropout=0.2), batches, Meddler())
    with pytest.raises(AssertionError):
        assert_same_bits(other, state)
