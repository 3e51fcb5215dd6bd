"""Which gradients are measured, and what becomes of values out of the ordinary."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard.measure import GradNorms, NormMeter, grad_norms
from lightning_gradguard.measure import _plan as plan_module
from tests.measure import reference
from tests.measure.gradients import with_grads


@pytest.mark.parametrize("count", [1, 20], ids=["listed", "stacked"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_stay_visible(bad: float, count: int) -> None:
    grads = [torch.ones(3) for _ in range(count)]
    grads[-1][1] = bad
    norms = grad_norms(with_grads(*grads))
    assert not math.isfinite(norms.total.item())
    finite = norms.values.isfinite().tolist()
    assert finite == [True] * (count - 1) + [False]
    layers = norms.layers()
    assert [math.isfinite(value) for value in layers.values()] == finite
    assert math.isnan(norms.total.item()) == math.isnan(bad)


@pytest.mark.parametrize("count", [1, 20], ids=["listed", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_that_overflow_half_precision(dtype: torch.dtype, count: int) -> None:
    grads = [torch.full((1000,), 1000.0).to(dtype) for _ in range(count)]
    named = with_grads(*grads)
    norms = grad_norms(named)
    assert norms.values.dtype == torch.float32
    assert norms.total.item() == pytest.approx(reference.total_norm(named), rel=1e-6)


@pytest.mark.parametrize("count", [1, 20], ids=["listed", "stacked"])
def test_a_long_half_precision_gradient_is_not_rounded_away(count: int) -> None:
    # Summed in bfloat16 the squares stop growing at 256.
    grads = [torch.ones(4096, dtype=torch.bfloat16) for _ in range(count)]
    norms = grad_norms(with_grads(*grads))
    assert norms.values.tolist() == [64.0] * count


def test_the_range_that_float32_sums_of_squares_have() -> None:
    within = grad_norms(with_grads(torch.full((4,), 1e18), torch.full((4,), 1e-18)))
    assert within.values.tolist() == pytest.approx([2e18, 2e-18], rel=1e-5)
    beyond = grad_norms(with_grads(torch.full((4,), 1e20), torch.full((4,), 1e-30)))
    assert beyond.values.tolist() == [math.inf, 0.0]


def test_layer_norms_have_the_range_of_parameter_norms() -> None:
    weight, bias = (nn.Parameter(torch.zeros(1, dtype=torch.float32)) for _ in range(2))
    named = [("a.weight", weight), ("a.bias", bias)]
    norms = GradNorms(
        ("a.weight", "a.bias"), torch.tensor([3e30, 4e30]), torch.zeros(()), (True,) * 2
    )
    assert norms.layers() == pytest.approx({"a": 5e30}, rel=1e-6)
    assert grad_norms(named).layers() == {}


def test_no_parameters() -> None:
    norms = NormMeter([]).measure()
    assert (norms.names, norms.present, norms.parameters, norms.layers()) == ((), (), {}, {})
    assert norms.values.shape == (0,)
    assert norms.total.item() == 0.0


def test_no_gradient_at_all() -> None:
    norms = grad_norms(nn.Linear(2, 2))
    assert norms.present == (False, False)
    assert norms.values.tolist() == [0.0, 0.0]
    assert norms.total.item() == 0.0
    assert norms.parameters == norms.layers() == {}


def test_tied_parameter_is_measured_once_under_its_first_name() -> None:
    decoder = nn.Linear(4, 4, bias=False)
    named = [("embed.weight", decoder.weight), ("decoder.weight", decoder.weight)]
    decoder(torch.ones(1, 4)).sum().backward()
    meter = NormMeter(named)
    assert meter.names == ("embed.weight",)
    assert meter.parameters[0] is decoder.weight
    assert meter.measure().total.item() == pytest.approx(4.0)


def test_gradients_that_come_and_go() -> None:
    named = with_grads(*[torch.ones(4) for _ in range(12)])
    meter = NormMeter(named)
    for absent in ([], [0, 3], [3], list(range(12)), [11], []):
        for i, (_, parameter) in enumerate(named):
            parameter.grad = None if i in absent else torch.ones(4)
        norms = meter.measure()
        assert norms.values.tolist() == [0.0 if i in absent else 2.0 for i in range(12)]
        assert norms.present == tuple(i not in absent for i in range(12))
        assert list(norms.layers()) == [f"layer_{i}" for i in range(12) if i not in absent]


@pytest.mark.parametrize("count", [2, 12], ids=["listed", "stacked"])
@pytest.mark.parametrize(
    "change",
    [nn.Module.double, nn.Module.half, lambda m: m.double().float()],
    ids=["double", "half", "there-and-back"],
)
def test_a_model_that_changes_dtype(change: Callable[[nn.Module], nn.Module], count: int) -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(count)])
    meter = NormMeter(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    before = meter.measure()
    change(model)
    after = meter.measure()
    assert after.values.dtype == (
        torch.float64 if model[0].weight.dtype == torch.float64 else torch.float32
    )
    assert after.values.tolist() == pytest.approx(before.values.tolist(), rel=2e-3)


def test_gradient_that_turns_sparse() -> None:
    named = with_grads(*[torch.ones(4, 2) for _ in range(10)])
    meter = NormMeter(named)
    meter.measure()
    for sparse in ([2], list(range(10)), []):
        for i, (_, parameter) in enumerate(named):
            dense = torch.full((4, 2), float(i))
            parameter.grad = dense.to_sparse() if i in sparse else dense
        assert meter.measure().parameters == pytest.approx(reference.parameter_norms(named))


def test_devices_are_brought_together_off_the_host() -> None:
    # The meta device stands for an accelerator: it has everything but values.
    grads = [torch.ones(3), torch.ones(3, device="meta"), None, torch.ones(2, 2)]
    norms = grad_norms(with_grads(*grads))
    assert norms.values.device.type == norms.total.device.type == "meta"
    assert norms.values.shape == (4,)
    assert norms.layer_values()[1].shape == (3,)


@pytest.mark.gpu
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_values_of_two_devices(first: str) -> None:
    second = "cuda" if first == "cpu" else "cpu"
    grads = [torch.randn(40, 3, device=first if i % 3 else second) for i in range(30)]
    grads[4] = None
    named = with_grads(*grads)
    meter = NormMeter(named)
    for _ in range(3):
        norms = meter.measure()
        assert norms.values.device.type == "cuda"
        assert norms.parameters == pytest.approx(reference.parameter_norms(named), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_no_synchronization_on_a_gpu() -> None:
    model = nn.LSTM(8, 8, num_layers=3).cuda()
    meter = NormMeter(model.named_parameters())
    output, _ = model(torch.randn(5, 2, 8, device="cuda"))
    output.sum().backward()
    expected = meter.measure().layer_values()[1].tolist()
    try:
        torch.cuda.set_sync_debug_mode("error")
        norms = meter.measure()
        values = norms.layer_values()[1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert values.tolist() == expected


@pytest.mark.gpu
def test_a_model_that_moves_to_the_gpu() -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(12)])
    meter = NormMeter(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    before = meter.measure()
    model.cuda()
    after = meter.measure()
    assert after.values.device.type == "cuda"
    assert after.parameters == pytest.approx(before.parameters, rel=1e-5)


def test_without_the_multi_tensor_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    named = with_grads(torch.randn(3, 2), torch.randn(5).half(), None, torch.randn(2).double())
    expected = grad_norms(named).values
    monkeypatch.delattr(torch, "_foreach_norm")
    assert torch.allclose(grad_norms(named).values, expected, rtol=1e-6)


def test_a_backend_that_refuses_the_multi_tensor_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("not for this backend")

    monkeypatch.setattr(torch, "_foreach_norm", refuse)
    assert plan_module.norm_each([torch.full((4,), 1.5)], torch.float32).tolist() == [3.0]


def test_what_has_no_norm_raises() -> None:
    named = with_grads(torch.ones(2), torch.ones(2).to(torch.float8_e4m3fn))
    meter = NormMeter(named)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Float8_e4m3fn"):
            meter.measure()
    named[1][1].grad = None
    assert meter.measure().present == (True, False)


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ([("a", 1.0)], TypeError, "parameter 'a' must be a tensor, got 1.0"),
        ([("a", torch.ones(1, requires_grad=True) * 2)], ValueError, "'a' must be a leaf"),
        ([("a", torch.ones(1)), ("a", torch.ones(1))], ValueError, "share the name 'a'"),
    ],
)
def test_bad_arguments(
    named: list[tuple[str, Tensor]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        NormMeter(named)


def test_a_tensor_that_retains_its_gradient() -> None:
    hidden = torch.ones(4, requires_grad=True) * 1.0
    hidden.retain_grad()
    hidden.sum().backward()
    assert grad_norms([("hidden", hidden)]).parameters == {"hidden": 2.0}
