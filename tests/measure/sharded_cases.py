"""What each process does in the tests of sharded gradients, and what it reports."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from lightning_gradguard.measure import NormMeter
from tests.measure import reference
from tests.measure.dispatch import OperationLog

COLLECTIVE = re.compile(r"c10d.*(reduce|gather|scatter|broadcast|all_?to_?all)")


def measured(named: list[tuple[str, Tensor]]) -> dict[str, Any]:
    """What this rank measures, and how many collectives a later step takes."""
    meter = NormMeter(named)
    meter.measure()
    with OperationLog() as log:
        norms = meter.measure()
    assert not log.count("_local_scalar_dense")
    return {
        "parameters": norms.parameters,
        "total": norms.total.item(),
        "layers": norms.layers(1),
        "present": norms.present,
        "collectives": sum(COLLECTIVE.search(name) is not None for name in log.names),
        "dtype": str(norms.values.dtype),
    }


def scatter(mesh: DeviceMesh, dense: Tensor, placements: list[Placement]) -> nn.Parameter:
    """A parameter whose gradient is ``dense``, spread as told; every rank passes the same."""
    spread = [Replicate() if place.is_partial() else place for place in placements]
    parameter = nn.Parameter(distribute_tensor(torch.zeros_like(dense), mesh, spread))
    parameter.grad = distribute_tensor(dense, mesh, placements)
    return parameter


def grads_of(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def norms_of(grads: list[Tensor]) -> dict[str, float]:
    return {f"layer_{i}.weight": reference.norm(reference.elements(g)) for i, g in enumerate(grads)}


def named(*parameters: Tensor) -> list[tuple[str, Tensor]]:
    return [(f"layer_{i}.weight", p) for i, p in enumerate(parameters)]


# Even and uneven shards, and shapes that leave the second rank with an empty one.
SHAPES = [(4, 3), (5, 3), (3,), (1,), (1, 4), (7, 2)]


def shard_every_shape() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    return measured(named(*[scatter(mesh, grad, [Shard(0)]) for grad in grads_of(SHAPES)]))


def mix_everything() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    first, second, third, fourth, fifth, sixth = grads_of([(4, 3)] * 6)
    plain = nn.Parameter(torch.zeros(4, 3))
    plain.grad = fourth
    wide = scatter(mesh, sixth.double(), [Shard(1)])
    return measured(
        named(
            scatter(mesh, first, [Shard(0)]),
            scatter(mesh, second, [Replicate()]),
            scatter(mesh, third, [Partial()]),
            plain,
            scatter(mesh, torch.complex(fifth, fifth), [Shard(0)]),
            wide,
        )
    )


def absent_on_one_rank() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    parameters = [scatter(mesh, grad, [Shard(0)]) for grad in grads_of([(4, 3)] * 3)]
    if dist.get_rank() == 1:
        parameters[1].grad = None
    if dist.get_rank() == 0:
        parameters[2].grad = None
    return measured(named(*parameters))


def absent_everywhere_but_one_rank() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    parameters = [scatter(mesh, grad, [Shard(0)]) for grad in grads_of([(4, 3)] * 2)]
    if dist.get_rank() == 1:
        for parameter in parameters:
            parameter.grad = None
    return measured(named(*parameters))


def changes_on_one_rank() -> list[float]:
    """One meter, whose ranks have to look at their gradients anew on different steps."""
    mesh = init_device_mesh("cpu", (2,))
    plain = nn.Parameter(torch.zeros(4))
    whole = torch.ones(4)
    parameters = [scatter(mesh, whole, [Partial()]), plain, scatter(mesh, whole, [Shard(0)])]
    meter = NormMeter(named(*parameters))
    totals = []
    for absent_on in (None, 1, 0, 1, None):
        plain.grad = None if dist.get_rank() == absent_on else whole
        totals.append(meter.measure().total.item())
    return totals


def non_finite_on_one_rank() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    poisoned = torch.ones(4)
    poisoned[3] = math.nan
    large = torch.full((2,), 1.5e19)
    grads = [torch.ones(4), poisoned, torch.full((4,), 1e15).half(), large]
    return measured(named(*[scatter(mesh, grad, [Shard(0)]) for grad in grads]))


def two_dimensional(shape: tuple[int, int]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    first, second, third, fourth = grads_of([(4, 6)] * 4)
    both = measured(
        named(
            scatter(mesh, first, [Shard(0), Shard(1)]), scatter(mesh, second, [Shard(1), Shard(0)])
        )
    )
    mixed = measured(
        named(
            scatter(mesh, first, [Shard(0), Shard(1)]),
            scatter(mesh, second, [Replicate(), Shard(1)]),
            scatter(mesh, third, [Shard(0), Replicate()]),
            scatter(mesh, fourth, [Partial(), Shard(0)]),
        )
    )
    return {"both": both, "mixed": mixed}


def network() -> nn.Sequential:
    torch.manual_seed(11)
    blocks = [nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 6)) for _ in range(3)]
    return nn.Sequential(*blocks, nn.Linear(6, 1))


def train_fully_sharded() -> dict[str, Any]:
    bare = network()
    sharded = copy.deepcopy(bare)
    for block in sharded:
        fully_shard(block)
    fully_shard(sharded)
    batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    rank, world = dist.get_rank(), dist.get_world_size()
    meter = NormMeter(sharded.named_parameters())
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sharded(batch[rank::world]).square().mean().backward()
        bits = [p.grad.to_local().clone() for p in sharded.parameters()]
        norms = meter.measure()
        for p, before in zip(sharded.parameters(), bits, strict=True):
            assert torch.equal(p.grad.to_local(), before)
        clipped_by = nn.utils.clip_grad_norm_(sharded.parameters(), 1e9).full_tensor().item()
        assert norms.total.item() == pytest.approx(clipped_by, rel=1e-6)
        result = measured(list(sharded.named_parameters()))
        optimizer.step()

        bare.zero_grad()
        bare(batch).square().mean().backward()
        expected = reference.parameter_norms(list(bare.named_parameters()))
        assert result["parameters"] == pytest.approx(expected, rel=1e-5)
        assert result["layers"] == pytest.approx(reference.layer_norms(expected, 1), rel=1e-5)
        torch.optim.SGD(bare.parameters(), lr=0.1).step()
    return result


def tensor_parallel(data_parallel: bool) -> dict[str, Any]:
    bare = network()
    batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    bare(batch).square().mean().backward()
    expected = reference.parameter_norms(list(bare.named_parameters()))
    model = copy.deepcopy(bare)
    model.zero_grad()
    shape = (2, dist.get_world_size() // 2) if data_parallel else (1, dist.get_world_size())
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    for block in list(model)[:3]:
        # The normalization between the two needs the whole vector.
        plan = {
            "0": ColwiseParallel(output_layouts=Replicate()),
            "2": RowwiseParallel(input_layouts=Replicate()),
        }
        parallelize_module(block, mesh["tensor"], plan)
    if data_parallel:
        fully_shard(model, mesh=mesh["data"])
    rank = mesh.get_local_rank("data")
    model(batch[rank :: shape[0]]).square().mean().backward()
    result = measured(list(model.named_parameters()))
    assert result["parameters"] == pytest.approx(expected, rel=1e-5)
    return result


def all_cases() -> dict[str, Any]:
    # In one launch, because starting the processes takes longer than all of them together.
    return {
        "shapes": shard_every_shape(),
        "mixed": mix_everything(),
        "absent": absent_on_one_rank(),
        "absent_everywhere": absent_everywhere_but_one_rank(),
        "changes": changes_on_one_rank(),
        "non_finite": non_finite_on_one_rank(),
        "two_dimensional": two_dimensional((2, 1)),
        "fsdp": train_fully_sharded(),
        "tensor_parallel": tensor_parallel(data_parallel=False),
    }


def four_ranks() -> dict[str, Any]:
    return {
        "two_dimensional": two_dimensional((2, 2)),
        "both_parallel": tensor_parallel(data_parallel=True),
    }
