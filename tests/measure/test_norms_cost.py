"""What a measurement may not cost, and may not do to the gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gradguard.measure import NormMeter, grad_norms
from tests.measure.dispatch import OperationLog
from tests.measure.gradients import with_grads


@pytest.mark.parametrize(
    ("shapes", "most"),
    [
        pytest.param([(i + 1, 3) for i in range(100)], 3, id="all-different"),
        pytest.param([(70, 70)] * 100, 3, id="large"),
        pytest.param([()] * 50 + [(70, 70)] * 50, 3, id="scalars"),
        pytest.param([(7, 7)] * 100, 3, id="one-small-shape"),
        pytest.param([(10, 10), (10,)] * 50, 7, id="two-small-shapes"),
        pytest.param([(i % 10 + 1,) for i in range(100)], 13, id="many-small-shapes"),
    ],
)
def test_operations_in_a_step(shapes: list[tuple[int, ...]], most: int) -> None:
    named = with_grads(*[torch.randn(shape) for shape in shapes])
    meter = NormMeter(named)
    meter.measure()
    with OperationLog() as log:
        meter.measure()
    assert len(log.names) <= most, log.names
    assert log.count("_foreach_norm") <= 1


def test_two_dtypes_take_one_multi_tensor_norm_each() -> None:
    grads = [torch.randn(i + 1).to(d) for i in range(20) for d in (torch.float32, torch.bfloat16)]
    meter = NormMeter(with_grads(*grads))
    meter.measure()
    with OperationLog() as log:
        meter.measure()
    assert log.count("_foreach_norm") == 2
    assert len(log.names) == 7


@pytest.mark.parametrize("grad", ["dense", "complex", "none"])
def test_no_host_read(grad: str) -> None:
    dense = [torch.randn(4, 4) for _ in range(20)]
    odd = {"dense": torch.ones(2), "complex": torch.ones(2, dtype=torch.complex64), "none": None}
    meter = NormMeter(with_grads(*dense, odd[grad]))
    meter.measure().layer_values(1)
    with OperationLog() as log:
        meter.measure().layer_values(1)
    assert log.names
    assert not log.count("_local_scalar_dense")
    assert not log.count("item")
    assert not log.count("equal")
    with OperationLog() as log:
        meter.measure().total.item()
    assert log.count("_local_scalar_dense") == 1, "the log must be able to see a host read"


def test_gradients_and_graph_are_left_alone() -> None:
    weight = nn.Parameter(torch.randn(3, 3))
    (grad,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
    weight.grad = grad
    before, version = grad.detach().clone(), grad._version
    norms = grad_norms([("weight", weight)])
    assert weight.grad is grad
    assert grad._version == version
    assert torch.equal(grad.detach().view(torch.int32), before.view(torch.int32))
    assert not norms.values.requires_grad
    assert not norms.total.requires_grad
