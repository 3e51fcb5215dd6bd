"""A look at every layer against the same numbers computed one by one in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gradguard.measure import NormMeter
from lightning_gradguard.measure.depth import depth_slope
from lightning_gradguard.measure.inspection import LayerInspector
from lightning_gradguard.readings import Inspection, ParameterReading
from tests.measure.test_activations import hooks_of
from tests.models import assert_same_bits

SMALL = 64  # elements up to which a tensor is looked at as a whole


def look(
    model: nn.Module,
    optimizer: Any = None,
    backward: Callable[[], None] = lambda: None,
    *,
    elsewhere: Any = (),
    dropped: bool | Tensor = False,
    update: Callable[[], None] | None = None,
    **scale: Any,
) -> Inspection:
    """One step under an inspector."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    meter = NormMeter((n, p) for n, p in model.named_parameters() if id(p) in owned)
    inspector = LayerInspector(model, optimizer, elsewhere)
    inspector.watching = True
    backward()
    inspector.before_step(meter.measure(), **scale)
    inspector.watching = False
    (update or optimizer.step)()
    snapshot = inspector.after_step(dropped)
    assert snapshot is not None
    inspection = snapshot.decode(snapshot.values.tolist(), step=7)
    inspector.close()
    assert hooks_of(model) == 0
    assert Inspection.from_dict(inspection.to_dict()).step == 7
    return inspection


def by_name(inspection: Inspection) -> dict[str, ParameterReading]:
    return {reading.name: reading for reading in inspection.parameters}


def run(model: nn.Module, x: Tensor, factor: float = 1.0) -> Callable[[], None]:
    def backward() -> None:
        output = model(x)
        output = output[0] if isinstance(output, tuple) else output
        (factor * output.square().mean()).backward()

    return backward


def small_model() -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)
    )
    with torch.no_grad():
        model[0].bias[:3] = -100.0  # of three units nothing comes and nothing goes back
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_number_against_its_definition(dtype: torch.dtype) -> None:
    model = small_model().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    inspection = look(model, optimizer, run(model, torch.randn(16, 4, dtype=dtype)))
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-5
    assert [r.name for r in inspection.parameters] == list(before)
    for name, parameter in model.named_parameters():
        reading, grad = by_name(inspection)[name], parameter.grad.double()
        norm = before[name].norm().item()
        change = (parameter.detach().double() - before[name]).norm().item()
        floor = 0.1 * math.sqrt(parameter.numel())
        assert reading.elements == parameter.numel() <= SMALL
        assert reading.dims == parameter.dim()
        assert reading.used is True
        assert (reading.in_optimizer, reading.requires_grad, reading.lr) == (True, True, 0.05)
        assert reading.grad_norm == pytest.approx(grad.norm().item(), rel=tolerance)
        assert reading.weight_norm == pytest.approx(norm, rel=tolerance)
        assert reading.update_ratio == pytest.approx(
            change / max(norm, floor), rel=max(tolerance, 1e-4)
        )
        assert reading.zero_share == pytest.approx((grad == 0).double().mean().item())
        assert reading.tiny_share == 0.0
        if parameter.dim() == 2:
            rows = (grad == 0).all(1).double().mean().item()
            assert reading.dead_rows == pytest.approx(rows)
        else:
            assert math.isnan(reading.dead_rows)
    assert by_name(inspection)["0.weight"].dead_rows >= 3 / 8
    weights = [name for name in before if name.endswith("weight")]
    slope = depth_slope(
        weights,
        [model.get_parameter(name).grad.double().norm().item() for name in weights],
        [before[name].norm().item() for name in weights],
    )
    assert inspection.depth_slope == pytest.approx(slope.slope, rel=tolerance, abs=tolerance)
    assert inspection.depth_error == pytest.approx(slope.error, rel=10 * tolerance)
    assert inspection.depth_layers == 4


def test_large_tensors_are_sampled() -> None:
    model = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 200))
    with torch.no_grad():
        model[0].bias[::3] = -1e3
    reading = by_name(look(model, backward=run(model, torch.randn(32, 200))))["0.weight"]
    grad = model[0].weight.grad
    assert reading.dead_rows == pytest.approx((grad == 0).all(1).double().mean().item())
    assert reading.zero_share == pytest.approx((grad == 0).double().mean().item(), abs=0.2)


def test_rows_of_transposed_convolutions_and_of_many_tensors_of_one_shape() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), *(nn.Conv2d(4, 4, 1),) * 1)
    for _ in range(9):
        model.append(nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[0].bias[1] = -1e3
        model[5].weight[:, 2] = 0.0
    readings = by_name(look(model, backward=run(model, torch.randn(2, 3, 5, 5))))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            grad = parameter.grad.transpose(0, 1) if name == "0.weight" else parameter.grad
            expected = (grad.flatten(1) == 0).all(1).double().mean().item()
            assert readings[name].dead_rows == pytest.approx(expected)
    assert readings["0.weight"].dead_rows == 0.25
    assert readings["4.weight"].dead_rows == 0.25


def test_embeddings_and_parameters_without_rows_have_no_dead_rows() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.positions = nn.Parameter(torch.zeros(9, 4))
            self.tied = nn.Linear(4, 9, bias=False)
            self.tied.weight = self.embedding.weight
            self.head = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.embedding(x) + self.positions[: len(x)]
            return self.tied(hidden).sum() + self.head(hidden)

    model = Model()
    readings = by_name(look(model, backward=run(model, torch.tensor([1, 2]))))
    assert list(readings) == ["positions", "embedding.weight", "head.weight", "head.bias"]
    assert all(math.isnan(reading.dead_rows) for reading in readings.values())
    assert readings["positions"].zero_share == pytest.approx(7 / 9)


# -- digits that are lost -------------------------------------------------------------------------


def one_weight(grad: Tensor, *, half: bool = False, **scale: Any) -> ParameterReading:
    model = nn.Linear(len(grad), 1, bias=False)

    def backward() -> None:
        model.weight.grad = grad.view(1, -1).to(torch.float32)
        if half:
            with torch.autocast("cpu", torch.float16):
                model(torch.ones(2, len(grad)))

    return look(model, backward=backward, **scale).parameters[0]


def test_a_small_loss_in_float32_loses_no_digits() -> None:
    model = small_model()
    x = torch.randn(16, 4)
    inspection = look(model, backward=run(model, x, 1e-5))
    assert [reading.tiny_share for reading in inspection.parameters] == [0.0] * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_below_the_least_normal_number_of_its_dtype(dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).tiny
    model = nn.Linear(4, 1, bias=False).to(dtype)

    def backward() -> None:
        model.weight.grad = torch.tensor([[0.0, least / 2, -least / 4, least]], dtype=dtype)

    reading = look(model, backward=backward).parameters[0]
    assert (reading.zero_share, reading.tiny_share) == (0.25, 0.5)


@pytest.mark.parametrize("scale", [1024.0, 65536.0, 3000.0])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_computed_in_float16_with_a_scaled_loss(scale: float, scaled: bool) -> None:
    in_half = torch.tensor([0.0, 2.0**-24, 3 * 2.0**-20, 2.0**-14, 0.7, 2.0**-14 * 0.99]).half()
    grad = in_half.float() if scaled else in_half.float() * (1 / scale)
    reading = one_weight(grad, scale=scale, scaled=scaled)
    assert reading.zero_share == pytest.approx(1 / 6)
    assert reading.tiny_share == pytest.approx(3 / 6)


def test_the_dtype_of_outputs_tells_of_float16_where_the_scale_is_one() -> None:
    grad = torch.tensor([2.0**-24, 2.0**-16, 1.0])
    assert one_weight(grad, half=True).tiny_share == pytest.approx(2 / 3)
    assert one_weight(grad).tiny_share == 0.0  # in float32 these are ordinary numbers


def test_small_numbers_of_float32_are_no_steps_of_float16() -> None:
    grad = torch.rand(64) * 1e-9
    assert one_weight(grad, scale=65536.0).tiny_share == 0.0


# -- who took part --------------------------------------------------------------------------------


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.idle = nn.Linear(2, 2)
        self.cut = nn.Linear(2, 2)
        self.resting = nn.BatchNorm1d(2).eval()
        self.functional = nn.Linear(2, 2)
        self.attention = nn.MultiheadAttention(2, 1)
        self.extra = nn.ParameterList([nn.Parameter(torch.ones(2))])
        self.own = nn.Parameter(torch.ones(2))
        self.dead = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.trained(self.frozen(x))
        with torch.no_grad():
            self.resting(self.cut(x))
        y = nn.functional.linear(y, self.functional.weight)
        y = y + (self.dead(y) - 1e6).relu()
        return self.attention(y, y, y)[0]


def test_who_took_part() -> None:
    model = Parts()
    readings = by_name(look(model, backward=run(model, torch.randn(3, 2))))
    used = {name: (reading.used, reading.used_without_grad) for name, reading in readings.items()}
    assert used["trained.weight"] == (True, False)
    assert used["frozen.weight"] == (True, False)
    assert used["idle.weight"] == used["idle.bias"] == (False, False)
    assert used["cut.weight"] == (False, True)
    assert used["resting.weight"] == (None, False)
    assert used["functional.weight"] == (True, False)
    assert used["functional.bias"] == (False, False)
    assert used["attention.out_proj.weight"] == (True, False)
    assert used["extra.0"] == (None, False)
    assert used["own"] == (True, False)  # as its module did; that it was left out shows elsewhere
    assert math.isnan(readings["own"].grad_norm)
    assert used["dead.weight"] == (True, False)
    assert readings["dead.weight"].grad_norm == 0.0
    assert math.isnan(readings["idle.weight"].grad_norm)
    assert not readings["frozen.weight"].requires_grad


def test_what_cannot_be_known_of_attention() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.add_module("attention", nn.MultiheadAttention(2, 1))
    model.add_module("encoder", nn.TransformerEncoderLayer(2, 1, 2))
    readings = by_name(look(model, backward=run(model[0], torch.randn(3, 2))))
    assert readings["attention.in_proj_weight"].used is False
    assert readings["attention.out_proj.weight"].used is None
    assert readings["encoder.linear1.weight"].used is None


def test_without_a_forward_pass_nothing_is_known() -> None:
    model = nn.Linear(2, 2)
    assert [reading.used for reading in look(model).parameters] == [None, None]


def test_a_gradient_of_zeros_is_no_proof_of_use() -> None:
    model = Parts()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    readings = by_name(look(model, backward=run(model, torch.randn(3, 2))))
    assert readings["idle.weight"].used is None
    assert readings["idle.weight"].grad_norm == 0.0


def test_a_compiled_part_is_not_called_unused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].compile(backend="eager")
    readings = by_name(look(model, backward=run(model[0], torch.randn(3, 2))))
    assert (readings["0.weight"].used, readings["1.weight"].used) == (True, None)


def test_parameters_that_others_train_and_none() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("ours", "theirs", "nobodys")})
    optimizer = torch.optim.SGD(model["ours"].parameters(), lr=0.1)
    model["theirs"].requires_grad_(False)  # as in every step but their own

    def backward() -> None:
        x = torch.randn(3, 2)
        sum(layer(x).square().sum() for layer in model.values()).backward()

    inspection = look(model, optimizer, backward, elsewhere=list(model["theirs"].parameters()))
    readings = by_name(inspection)
    assert [reading.in_optimizer for reading in inspection.parameters] == [True] * 4 + [False] * 2
    ours, theirs = readings["ours.weight"], readings["theirs.weight"]
    nobodys = readings["nobodys.weight"]
    assert math.isnan(theirs.grad_norm)
    assert theirs.used is None
    assert theirs.requires_grad
    expected = model["nobodys"].weight.grad.norm().item()
    assert nobodys.grad_norm == pytest.approx(expected)
    assert ours.update_ratio > 0
    for reading in (theirs, nobodys):
        for value in (reading.weight_norm, reading.update_ratio, reading.lr, reading.zero_share):
            assert math.isnan(value)
    assert inspection.depth_layers == 1


# -- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropped", [True, torch.tensor(True)])
def test_a_dropped_step_has_no_update(dropped: Any) -> None:
    model = small_model()
    x = torch.randn(4, 4)
    inspection = look(model, backward=run(model, x), dropped=dropped, update=lambda: None)
    assert all(math.isnan(reading.update_ratio) for reading in inspection.parameters)


def test_a_step_that_changes_nothing_has_an_update_of_zero() -> None:
    model = small_model()
    x = torch.randn(4, 4)
    still = look(model, backward=run(model, x), dropped=torch.tensor(False), update=lambda: None)
    assert [reading.update_ratio for reading in still.parameters] == [0.0] * 8
    model.zero_grad()
    lost = look(model, backward=run(model, x * math.nan), update=lambda: None)  # dropped unseen
    assert all(math.isnan(reading.update_ratio) for reading in lost.parameters)


@pytest.mark.parametrize("lr", [0.25, torch.tensor(0.25)])
def test_learning_rates_of_groups(lr: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": model[0].parameters(), "lr": lr}, {"params": model[1].parameters()}]
    optimizer = torch.optim.Adam(groups, lr=0.5, capturable=False)
    inspection = look(model, optimizer, run(model, torch.randn(3, 2)))
    assert [reading.lr for reading in inspection.parameters] == [0.25, 0.25, 0.5, 0.5]


def test_after_a_step_that_was_not_begun_there_is_nothing() -> None:
    model = small_model()
    inspector = LayerInspector(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert inspector.after_step() is None


def test_odd_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.imaginary = nn.Parameter((0.6 + 0.8j) * torch.ones(2, 2))
            self.sparse = nn.Embedding(5, 2, sparse=True)
            self.integers = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
            self.scalar = nn.Parameter(torch.tensor(2.0))
            self.wide = nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.narrow = nn.Parameter(torch.ones(2, dtype=torch.float16))
            self.holes = nn.Parameter(torch.ones(4, 4)[:, ::2])
            self.lazy = nn.LazyLinear(3)

        def forward(self, x: Tensor) -> Tensor:
            total = self.sparse(x).sum() + self.scalar * self.wide.sum() + self.narrow.sum()
            y = self.lazy(torch.ones(1, 2)).sum() + self.empty.sum() + self.holes.sum()
            return total + y + torch.view_as_real(self.imaginary * (1 + 1j)).square().sum()

    model = Odd()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.is_floating_point()
                                 or p.is_complex()], lr=0.1)  # fmt: skip
    reading = by_name(look_lazily(model, optimizer, torch.tensor([1, 2])))
    for name in ("imaginary", "scalar", "wide", "narrow"):
        value = model.get_parameter(name)
        assert reading[name].update_ratio > 0, name
        assert reading[name].grad_norm == pytest.approx(value.grad.norm().item(), rel=1e-3), name
        assert reading[name].zero_share == 0.0, name
    assert reading["imaginary"].weight_norm == pytest.approx(2.0)
    assert math.isnan(reading["sparse.weight"].zero_share)
    assert reading["sparse.weight"].grad_norm > 0
    assert math.isnan(reading["empty"].zero_share)
    assert not reading["integers"].in_optimizer
    assert reading["lazy.weight"].elements == 6
    assert reading["lazy.weight"].update_ratio > 0
    assert reading["lazy.weight"].used is True


def look_lazily(model: nn.Module, optimizer: Any, x: Tensor) -> Inspection:
    """A look that was prepared before all parameters had a shape."""
    inspector = LayerInspector(model, optimizer)
    inspector.watching = True
    model(x).sum().backward()
    meter = NormMeter(
        (name, p)
        for name, p in model.named_parameters()
        if any(p is q for group in optimizer.param_groups for q in group["params"])
    )
    inspector.before_step(meter.measure())
    optimizer.step()
    snapshot = inspector.after_step()
    assert snapshot is not None
    inspector.close()
    return snapshot.decode(snapshot.values.tolist(), step=0)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_changes_no_bit(checkpointed: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.LSTM(8, 2))
    twin = copy.deepcopy(model)
    results = []
    for one, inspected in ((model, True), (twin, False)):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.1)
        inspector = LayerInspector(one, optimizer)
        meter = NormMeter(one.named_parameters())
        for _ in range(5):
            inspector.watching = inspected
            optimizer.zero_grad()
            x = torch.randn(3, 4)
            y = checkpoint(one, x, use_reentrant=False) if checkpointed else one(x)
            y[0].square().sum().backward()
            if inspected:
                inspector.before_step(meter.measure())
            optimizer.step()
            assert (inspector.after_step() is not None) == inspected
        inspector.close()
        grads = [parameter.grad for parameter in one.parameters()]
        results.append([one.state_dict(), optimizer.state_dict(), grads, torch.rand(1)])
    assert_same_bits(*results)


def test_hooks_are_gone_after_an_exception() -> None:
    model = small_model()
    inspector = LayerInspector(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inspector.watching = True
    assert hooks_of(model) == 6  # four layers and two activations
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))
    inspector.close()
    assert hooks_of(model) == 0


@pytest.mark.gpu
def test_a_look_never_waits_for_a_gpu() -> None:
    model = small_model().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1, device="cuda"))
    inspector, meter = LayerInspector(model, optimizer), NormMeter(model.named_parameters())
    x = torch.randn(16, 4, device="cuda")
    snapshots = []
    for number in range(3):  # the first one prepares
        if number:
            torch.cuda.set_sync_debug_mode("error")
        try:
            inspector.watching = True
            run(model, x)()
            inspector.before_step(meter.measure())
            with torch.no_grad():
                torch._foreach_add_(list(model.parameters()), 0.01)
            snapshots.append(inspector.after_step(torch.zeros((), device="cuda")))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for snapshot in snapshots:
        inspection = snapshot.decode(snapshot.values.tolist(), step=0)
        assert all(reading.update_ratio > 0 for reading in inspection.parameters)
        assert all(math.isnan(reading.lr) for reading in inspection.parameters)
        assert len(inspection.activations) == 2
