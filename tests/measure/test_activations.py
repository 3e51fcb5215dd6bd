"""Dead and saturated units against counts in float64 and against what is known of a model."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from lightning_gradguard.measure._activation_kinds import activation_kind
from lightning_gradguard.measure.activations import ActivationWatch
from lightning_gradguard.readings import ActivationReading

KINDS: list[nn.Module] = [
    nn.ReLU(), nn.ReLU6(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(),
    nn.ELU(), nn.ELU(0.5), nn.ELU(2.0), nn.CELU(2.0), nn.CELU(), nn.SELU(),
    nn.Softplus(), nn.Softplus(2.0), nn.Tanh(), nn.Hardtanh(-2, 1),
    nn.Sigmoid(), nn.Hardsigmoid(), nn.Softsign(),
]  # fmt: skip


def watched(model: nn.Module) -> ActivationWatch:
    watch = ActivationWatch(model)
    watch.watching = True
    return watch


def read(watch: ActivationWatch) -> tuple[ActivationReading, ...]:
    snapshot = watch.look()
    return snapshot.decode(snapshot.values.tolist())


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("module", KINDS, ids=repr)
def test_flat_is_where_the_slope_is_below_a_twentieth_of_its_maximum(module: nn.Module) -> None:
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(module(x).sum(), x)
    flat = slope.abs() < 0.05 * slope.abs().max()
    # ...on its tails: GELU and its like are flat at their minimum too, on the way.
    sides = {"left": flat.cumprod(0).bool(), "right": flat.flip(0).cumprod(0).flip(0).bool()}
    kind = activation_kind(module)
    assert kind is not None
    value = (x if kind.of_input else module(x)).detach()
    found = [f(module, value) for f in (kind.inactive, kind.saturated) if f is not None]
    expected = sides["left"] | sides["right"]
    wrong = torch.stack(found).any(0) != expected
    # Thresholds are rounded, and at a kink the slope is that of one side.
    at_edges = torch.zeros_like(wrong)
    for edge in (expected[1:] != expected[:-1]).nonzero().flatten().tolist():
        at_edges |= (x.detach() - x.detach()[edge]).abs() < 0.02
    assert not (wrong & ~at_edges).any()
    assert torch.stack(found).any()


@given(
    shape=st.sampled_from([(7, 5), (3, 4, 5), (5,), (2, 3, 4, 5)]), looks=st.integers(1, 6),
    dead=st.integers(0, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_shares_are_those_of_all_outputs_of_the_last_four_looks(
    shape: tuple[int, ...], looks: int, dead: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.ReLU(), nn.Tanh())
    watch = watched(model)
    inputs = [3 * torch.randn(*shape, generator=generator) for _ in range(looks)]
    for x in inputs:
        x[..., :dead] = -x[..., :dead].abs()
        model(x)
        relu, tanh = read(watch)
    last = torch.cat([x.reshape(-1, 5) for x in inputs[-4:]]).double()
    active = last > 0
    assert relu.units == 5
    assert relu.examples == len(last)
    assert relu.dead == pytest.approx((~active).all(0).double().mean().item())
    assert relu.inactive == pytest.approx(1 - active.double().mean().item())
    high = last.relu().tanh() > 0.975
    assert tanh.saturated == pytest.approx((high.double().mean(0) >= 0.95).double().mean().item())
    assert math.isnan(tanh.dead)
    assert math.isnan(tanh.inactive)
    assert math.isnan(relu.saturated)


def test_calls_of_one_look_add_up() -> None:
    model = nn.Sequential(nn.ReLU())
    watch = watched(model)
    for row in torch.eye(4):  # each call wakes another unit
        model(row.view(1, 4))
    (reading,) = read(watch)
    assert (reading.units, reading.examples, reading.dead) == (4, 4, 0.0)
    assert reading.inactive == pytest.approx(0.75)
    watch.discard()
    assert read(watch) == ()  # what is not called is not reported


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()  # registered before any layer: its producer tells the channels
        self.conv = nn.Conv1d(3, 6, 3)
        self.norm = nn.BatchNorm2d(3)
        self.after = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 7)
        self.last = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(self.norm(x))
        y = self.act(self.conv(y.flatten(2)))
        return self.last(self.head(y[..., :8]))


def test_units_are_channels_behind_a_convolution_and_else_the_last_dimension() -> None:
    model = Convolutions()
    watch = watched(model)
    model(torch.randn(2, 3, 4, 5)).sum().backward()
    assert {r.module: (r.kind, r.units) for r in read(watch)} == {
        "act": ("relu", 6), "after": ("relu", 3), "last": ("gelu", 7),
    }  # fmt: skip


class Shared(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6, bias), nn.Linear(6, 6, bias)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_an_activation_of_several_layers_is_counted_for_each(bias: bool, half: bool) -> None:
    model = Shared(bias)
    with torch.no_grad():
        model.second.weight.fill_(-1.0)  # of what a ReLU lets through nothing is left
        if bias:
            model.second.bias.fill_(-1.0)
    watch = watched(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        model(torch.randn(64, 4)).sum().backward()
    readings = {reading.module: reading.dead for reading in read(watch)}
    assert readings["second"] == 1.0
    assert readings["first"] < 1.0


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_outputs_of_recurrent_modules(nonlinearity: Any, packed: bool) -> None:
    rnn = nn.RNN(3, 5, nonlinearity=nonlinearity)
    x: Any = 50 * torch.randn(6, 4, 3)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([6, 4, 2, 1]))
    watch = watched(rnn)
    output = rnn(x)[0]
    (reading,) = read(watch)
    flat = (output.data if packed else output).reshape(-1, 5).double()
    assert (reading.module, reading.kind, reading.units) == ("RNN", nonlinearity, 5)
    assert reading.examples == len(flat)
    if nonlinearity == "tanh":
        often = (flat.abs() > 0.975).double().mean(0) >= 0.95
        assert reading.saturated == pytest.approx(often.double().mean().item())
    else:
        assert reading.inactive == pytest.approx((flat <= 0).double().mean().item())


def test_steps_of_a_cell_add_up() -> None:
    cell = nn.RNNCell(3, 5)
    watch = watched(cell)
    state = torch.zeros(2, 5)
    for _ in range(7):
        state = cell(torch.randn(2, 3), state)
    (reading,) = read(watch)
    assert reading.examples == 14


@pytest.mark.parametrize("way", ["evaluation", "no_grad", "asleep"])
def test_only_training_is_counted(way: str) -> None:
    model = nn.Sequential(nn.ReLU())
    watch = watched(model)
    watch.watching = way != "asleep"
    model.train(way != "evaluation")
    with torch.set_grad_enabled(way != "no_grad"):
        model(torch.randn(3, 2))
    assert read(watch) == ()
    assert hooks_of(model) == (way != "asleep")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_counted_and_stay_as_they_are(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    twin, x = copy.deepcopy(model), torch.randn(8, 4, requires_grad=True)
    watch = watched(model)
    for one in (model, twin):
        checkpoint(one, x, use_reentrant=reentrant).sum().backward()
    (reading,) = read(watch)
    expected = (twin[:2](x) <= 0).double().mean().item()
    assert reading.inactive == pytest.approx(expected)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sigmoid(), nn.Tanh())
    watch = watched(model)
    model(torch.tensor([[-9.0, 9.0]], dtype=dtype).expand(8, 2))
    relu, sigmoid, tanh = read(watch)
    assert (relu.dead, relu.inactive) == (0.5, 0.5)
    assert (sigmoid.saturated, tanh.saturated) == (0.5, 0.0)


def test_of_many_outputs_a_part_is_counted() -> None:
    model = nn.Sequential(nn.ReLU())
    watch = watched(model)
    model(torch.randn(2, 2**15, 32))
    (reading,) = read(watch)
    assert reading.units == 32
    assert 2**12 <= reading.examples <= 2**14
    assert reading.inactive == pytest.approx(0.5, abs=0.01)


def test_what_is_not_finite_is_not_inactive() -> None:
    model = nn.Sequential(nn.ReLU())
    watch = watched(model)
    model(torch.full((4, 2), math.nan))
    (reading,) = read(watch)
    assert (reading.dead, reading.inactive) == (0.0, 0.0)


def test_odd_outputs_are_left_out() -> None:
    model = nn.Sequential(nn.ReLU())
    watch = watched(model)
    for odd in (torch.zeros(0, 3), torch.tensor(1.0), torch.ones(3, dtype=torch.int64)):
        model(odd)
    assert read(watch) == ()


def test_an_error_in_a_hook_is_told_and_the_forward_pass_goes_on() -> None:
    errors: list[Exception] = []
    model = nn.Sequential(nn.Hardtanh())
    watch = ActivationWatch(model, on_error=errors.append)
    watch.watching = True
    model[0].forward = torch.nn.functional.hardtanh
    del model[0].min_val
    assert model(torch.ones(2, 2)).shape == (2, 2)
    assert len(errors) == 1
    watched(model)  # whose error is nobody's to be told
    with pytest.raises(AttributeError):
        model(torch.ones(2, 2))


def test_a_resumed_watch_counts_on() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.ReLU(), nn.Tanh())
    inputs = [torch.randn(2, 9, generator=generator) for _ in range(6)]
    whole = watched(model)
    seen = []
    for x in inputs:
        model(x)
        seen.append(read(whole))
    whole.close()
    assert hooks_of(model) == 0
    part = watched(model)
    for number, x in enumerate(inputs):
        if number == 3:
            state = part.state_dict()
            part.close()
            part = watched(model)
            part.load_state_dict(pickle.loads(pickle.dumps(state)))
            assert part.state_dict() == state
        model(x)
        assert repr(read(part)) == repr(seen[number])


def test_copies_and_pickles_of_a_watched_model_are_without_hooks() -> None:
    model = nn.Sequential(nn.ReLU())
    watched(model)
    assert hooks_of(copy.deepcopy(model)) == 0
    pickle.loads(pickle.dumps(model))(torch.ones(1))


def test_inside_an_encoder_layer_there_is_no_hook() -> None:
    """It would turn off the fast path in evaluation, whose numbers differ."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU(), batch_first=True)
    watched(nn.Sequential(layer, nn.ReLU()))
    assert hooks_of(layer) == 0


def test_an_overwritten_input_is_not_taken_for_one() -> None:
    assert read_once(nn.Sequential(nn.SiLU(inplace=True))) == ()
    (reading,) = read_once(nn.Sequential(nn.ReLU(inplace=True)))
    assert reading.inactive == 0.5


def read_once(model: nn.Module) -> tuple[ActivationReading, ...]:
    watch = watched(model)
    model(torch.tensor([[-9.0, 9.0]]))
    return read(watch)
