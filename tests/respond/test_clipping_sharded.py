"""Tensors that are spread over real processes are clipped as whole ones are."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_gradguard.guard import DEVICE_DELAY, GuardEngine
from lightning_gradguard.respond import (
    AGC,
    AdaptiveClip,
    NormClip,
    PercentileClip,
    ValueClip,
    ZScoreClip,
)
from tests.distributed import run_on_ranks
from tests.models import Regression, fixed_cap, fused_adamw, make_batches, sgd

pytestmark = pytest.mark.slow

STEPS = 30
STRATEGIES: dict[str, Any] = {
    "none": None,
    "norm": NormClip(0.5),
    "layer": NormClip(0.3, scope="layer"),
    "adaptive": AdaptiveClip(0.8, scope="layer"),
    "percentile": PercentileClip(20.0, scope="group"),
    "z": ZScoreClip(0.5, warmup_steps=4, scope="layer"),
    "agc": AGC(0.03, scope="layer", exclude=("head.bias",)),
    "value": ValueClip(0.1),
    "unit": AGC(0.03),
}
OPTIMIZERS = {"sgd": sgd, "fused_adamw": fused_adamw}


def train(clip: Any, maker: Any, *, sharded: bool) -> dict[str, Any]:
    model = Regression(maker)
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model.body[0], model.head):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = model.configure_optimizers()
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("lightning_gradguard").addHandler(handler)
    guard = GuardEngine(
        model, optimizer, clip=clip, cap=fixed_cap(0.2), skip=None, backoff=None, rollback=None
    )
    for inputs, targets in make_batches(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        guard.before_step(loss)
        optimizer.step()
    guard.close()
    logging.getLogger("lightning_gradguard").removeHandler(handler)
    weights = {
        name: (p.full_tensor() if sharded else p).detach().flatten().tolist()
        for name, p in model.named_parameters()
    }
    return {
        "weights": weights,
        "coefficients": [row.clip_coef for row in guard.history],
        "told": [line for line in told if "AGC" in line],
    }


def on_every_rank() -> dict[str, Any]:
    return {
        f"{name} {optimizer}": train(clip, maker, sharded=True)
        for name, clip in STRATEGIES.items()
        for optimizer, maker in OPTIMIZERS.items()
    }


def same(weights: dict[str, list[float]]) -> dict[str, Any]:
    return {name: pytest.approx(values, rel=1e-3, abs=1e-4) for name, values in weights.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_on_ranks(on_every_rank)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "unit"])
def test_as_in_one_process(ranks: list[dict[str, Any]], name: str, optimizer: str) -> None:
    alone = train(STRATEGIES[name], OPTIMIZERS[optimizer], sharded=False)
    assert len(alone["coefficients"]) == STEPS
    assert (min(alone["coefficients"]) < 0.95) == (name != "none")
    for rank in ranks:
        found = rank[f"{name} {optimizer}"]
        assert found["coefficients"] == pytest.approx(alone["coefficients"], rel=1e-3)
        assert found["weights"] == same(alone["weights"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_units_may_be_on_several_processes_and_are_left_alone(
    ranks: list[dict[str, Any]], optimizer: str
) -> None:
    for rank in ranks:
        found = rank[f"unit {optimizer}"]
        assert set(found["coefficients"]) == {1.0}
        assert found["weights"] == same(rank[f"none {optimizer}"]["weights"])
        assert len(found["told"]) == 1
        assert "scope='layer'" in found["told"][0]


def train_until_one_fails(clip: Any, maker: Any, at: int) -> tuple[int, bool, bool]:
    """The guard of the last rank fails at step ``at``, right after the ranks have agreed."""
    model = Regression(maker)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.body[0], model.head):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = model.configure_optimizers()
    arguments = {"cap": None, "skip": None, "backoff": None, "rollback": None}
    guard = GuardEngine(model, optimizer, clip=clip, **arguments)
    for number, (inputs, targets) in enumerate(make_batches(STEPS)):
        if number == at and torch.distributed.get_rank() == 1:
            guard._samplers.before_step = None  # not callable
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        guard.before_step(loss)
        optimizer.step()
    finite = all(torch.isfinite(p.to_local()).all() for p in model.parameters())
    return guard.step, guard.active, bool(finite)


def one_fails() -> dict[str, Any]:
    return {
        f"{name} {optimizer}": train_until_one_fails(clip, maker, at=10)
        for name, clip in STRATEGIES.items()
        for optimizer, maker in OPTIMIZERS.items()
    }


def test_no_rank_waits_for_one_whose_guard_has_failed() -> None:
    first, second = run_on_ranks(one_fails)
    for name in first:
        delay = DEVICE_DELAY if "fused" in name else 0
        assert first[name][1:] == second[name][1:] == (False, True), name
        assert second[name][0] == 10, name
        assert first[name][0] <= 12 + delay, name
