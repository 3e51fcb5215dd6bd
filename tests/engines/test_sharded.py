"""``ModelParallelStrategy`` with FSDP2 on two real processes: norms are those of whole tensors."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_gradguard import GradGuard, GradientMonitor
from lightning_gradguard.measure.updates import RMS_FLOOR
from lightning_gradguard.respond import AdaptiveClip, SkipBadSteps
from tests.engines.test_ddp import RANKS, Messages, both_ranks, column, part_of, poison_last_half
from tests.engines.test_failures import FailingGuard
from tests.models import (
    Regression,
    adamw,
    assert_same_bits,
    fixed_cap,
    guard_without,
    loader,
    make_batches,
    plain_loop,
    quiet_trainer,
    sgd,
)

pytestmark = pytest.mark.slow

OPTIMIZERS = {"adamw": adamw, "sgd": sgd}


class Sharded(Regression):
    def configure_model(self) -> None:
        if hasattr(self, "sharded"):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.body[0], self.head):
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)
        self.sharded = True

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = self.whole()

    def on_train_batch_end(self, *_: Any) -> None:
        """The largest relative update of whole tensors."""
        self.largest = getattr(self, "largest", [])
        self.largest.append(
            max(
                (new - old).norm() / max(old.norm(), RMS_FLOOR * math.sqrt(old.numel()))
                for new, old in zip(self.whole().values(), self.before.values(), strict=True)
            ).item()
        )

    def whole(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().full_tensor().clone() for name, p in self.named_parameters()}


def fit(root: str, guard: Any, optimizer: str, batches: list[Any]) -> dict[str, Any]:
    messages = Messages()
    model = Sharded(OPTIMIZERS[optimizer])
    trainer = quiet_trainer(
        root,
        guard,
        devices=RANKS,
        strategy=ModelParallelStrategy(
            data_parallel_size=RANKS, tensor_parallel_size=1, process_group_backend="gloo"
        ),
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, loader([part_of(batch) for batch in batches]))
    assert all(type(p).__name__ == "DTensor" for p in model.parameters())
    layers = {k: v for k, v in trainer.logged_metrics.items() if k.startswith("grad_norm/")}
    return {
        "weights": model.whole(),
        "history": [asdict(row) for row in guard.history],
        "layers": layers,
        "largest": model.largest,
        "errors": messages.errors,
        "active": [engine.active for engine in guard.engines],
        "steps": trainer.global_step,
    }


def skip_run(root: str, optimizer: str) -> dict[str, Any]:
    batches = make_batches(10)
    poison_last_half(batches, 4)
    return fit(root, guard_without(skip=SkipBadSteps()), optimizer, batches)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_norms_equal_the_unsharded_ones_and_a_nan_is_skipped(
    tmp_path: Path, optimizer: str
) -> None:
    ((first, second),) = both_ranks(skip_run, tmp_path, (optimizer,))
    assert_same_bits(first, second)
    batches = make_batches(10)
    poison_last_half(batches, 4)
    plain = Regression(OPTIMIZERS[optimizer])
    run = plain_loop(plain, batches, omit={4})
    assert column(first, "total_norm") == pytest.approx(run.norms, rel=1e-4, nan_ok=True)
    assert column(first, "loss") == pytest.approx(run.losses, rel=1e-4, nan_ok=True)
    assert column(first, "skipped") == [number == 4 for number in range(10)]
    torch.testing.assert_close(
        first["weights"], {k: v.detach() for k, v in plain.named_parameters()}, rtol=1e-4, atol=1e-5
    )
    # The plain loop's last gradients are still there.
    for name, layer in (("body.0", plain.body[0]), ("head", plain.head)):
        squares = sum(p.grad.double().square().sum().item() for p in layer.parameters())
        logged = first["layers"][f"grad_norm/{name}"].item()
        assert logged == pytest.approx(math.sqrt(squares), rel=1e-4)


def bounded_run(root: str, optimizer: str) -> dict[str, Any]:
    guard = guard_without(
        clip=AdaptiveClip(multiple=0.5), cap=fixed_cap(0.005), skip=SkipBadSteps()
    )
    return fit(root, guard, optimizer, make_batches(40))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_cap_holds_for_whole_tensors(tmp_path: Path, optimizer: str) -> None:
    ((first, second),) = both_ranks(bounded_run, tmp_path, (optimizer,))
    assert_same_bits(first, second)
    assert any(0.0 < coefficient < 1.0 for coefficient in column(first, "clip_coef"))
    assert any(column(first, "capped_tensors"))
    assert max(first["largest"]) <= 0.005 * 1.005**16
    assert first["errors"] == []


def monitored_run(root: str) -> dict[str, Any]:
    return fit(root, GradientMonitor(), "adamw", make_batches(10))


def default_run(root: str) -> dict[str, Any]:
    return fit(root, GradGuard(), "adamw", make_batches(40, poisoned=(20,)))


def test_monitor_and_defaults(tmp_path: Path) -> None:
    ((first, second),) = both_ranks(monitored_run, tmp_path, ())
    assert_same_bits(first, second)
    run = plain_loop(Regression(), make_batches(10))
    assert column(first, "total_norm") == pytest.approx(run.norms, rel=1e-4)
    ((first, second),) = both_ranks(default_run, tmp_path, ())
    assert_same_bits(first, second)
    assert column(first, "skipped") == [number == 20 for number in range(40)]


class FailsOnOneRank(FailingGuard):
    def _make_engine(self, *args: Any) -> Any:
        if dist.get_rank() == 1:
            return super()._make_engine(*args)
        return GradGuard._make_engine(self, *args)


def failing_run(root: str) -> dict[str, Any]:
    return fit(root, FailsOnOneRank("recorder.step"), "adamw", make_batches(20))


def test_a_failure_on_one_rank_turns_both_off(tmp_path: Path) -> None:
    """Norms of sharded gradients take a collective: the failed rank may not stay away from it."""
    ((first, second),) = both_ranks(failing_run, tmp_path, (), timeout=50.0)
    assert (first["steps"], second["steps"]) == (20, 20)
    assert_same_bits(first["weights"], second["weights"])
    assert not any(first["active"] + second["active"])
    assert len(first["errors"]) == len(second["errors"]) == 1


def unwritable_monitor_run(root: str) -> dict[str, Any]:
    return fit(root, GradientMonitor(), "adamw", make_batches(20, poisoned=(3,)))


def test_a_monitor_whose_log_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "gradguard").write_text("in the way", encoding="utf-8")
    ((first, second),) = both_ranks(unwritable_monitor_run, tmp_path, (), timeout=50.0)
    assert (first["steps"], second["steps"]) == (20, 20)
    assert_same_bits(first["weights"], second["weights"])
