"""Sharded models: each process looks at its own shard, and nothing is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed, nn

from lightning_gradguard.measure import NormMeter
from lightning_gradguard.measure.inspection import LayerInspector
from tests.distributed import run_on_ranks


def sharded_look() -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 1))
    whole = {name: p.detach().norm().item() for name, p in model.named_parameters()}
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in (model[0], model[2], model[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inspector, meter = LayerInspector(model, optimizer), NormMeter(model.named_parameters())
    inspector.watching = True
    model(torch.randn(16, 4)).square().mean().backward()
    norms = meter.measure()
    with CommDebugMode() as before:
        inspector.before_step(norms)
    optimizer.step()
    with CommDebugMode() as after:
        snapshot = inspector.after_step()
    assert snapshot is not None
    inspection = snapshot.decode(snapshot.values.tolist(), step=0)
    return {
        "sent": before.get_total_counts() + after.get_total_counts(),
        "whole": whole,
        "norms": norms.parameters,
        "parameters": {reading.name: reading for reading in inspection.parameters},
        "activations": [reading.module for reading in inspection.activations],
    }


@pytest.mark.slow
def test_every_process_looks_at_its_own_shard() -> None:
    for rank, seen in enumerate(run_on_ranks(sharded_look)):
        assert seen["sent"] == 0
        assert seen["activations"] == ["1"]
        for name, reading in seen["parameters"].items():
            assert reading.used is True
            assert reading.grad_norm == pytest.approx(seen["norms"][name])
            if name.startswith("3.") and rank == 1:  # of one row the second process has nothing
                assert reading.weight_norm != reading.weight_norm
                continue
            assert reading.weight_norm == pytest.approx(seen["whole"][name], rel=0.5)
            assert reading.update_ratio > 0
