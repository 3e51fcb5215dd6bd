"""Tensors whose changes compound over time may move less far than the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.respond import UpdateCap
from lightning_gradguard.respond.allowances import cap_allowances
from tests.respond.optimizers import ALL, Bounded, relative_changes, weights

CAP = 0.01
LESS = 0.1
SLACK = 1.5  # the norms of the weights are up to 16 steps old, forecasts come from samples


@pytest.mark.parametrize(
    ("module", "held"),
    [
        (nn.RNN(2, 3, nonlinearity="relu"), ["weight_hh_l0"]),
        (
            nn.RNN(2, 3, 2, nonlinearity="relu", bidirectional=True),
            [f"weight_hh_l{layer}{way}" for layer in (0, 1) for way in ("", "_reverse")],
        ),
        (nn.RNNCell(2, 3, nonlinearity="relu"), ["weight_hh"]),
        (
            nn.utils.parametrizations.weight_norm(
                nn.RNNCell(2, 3, nonlinearity="relu"), "weight_hh"
            ),
            [f"parametrizations.weight_hh.original{n}" for n in (0, 1)],
        ),
        (nn.RNN(2, 3), []),
        (nn.RNNCell(2, 3), []),
        (nn.LSTM(2, 3), []),
        (nn.GRU(2, 3), []),
        (nn.Linear(2, 3), []),
    ],
    ids=str,
)
def test_recurrent_weights_of_relu_rnns_are_found(module: nn.Module, held: list[str]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), module)
    names, parameters = zip(*model.named_parameters(), strict=True)
    allowances = cap_allowances(model, parameters, UpdateCap(relu_recurrence=LESS))
    expected = [LESS if name.removeprefix("1.") in held else 1.0 for name in names]
    assert allowances == (expected if held else [])
    assert cap_allowances(model, parameters, UpdateCap(relu_recurrence=1.0)) == []


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("name", [n for n in ALL if "decay" not in n])  # which is not bounded
def test_a_tensor_moves_by_its_share_of_the_cap(name: str, on_device: bool) -> None:
    """A tensor with less allowed is held to that, and the others are held as before."""
    parameters, count = weights(), 2 if name == "muon" else 3
    run = Bounded(ALL[name](parameters), CAP, on_device, [LESS, *[1.0] * (count - 1)])
    free = Bounded(ALL[name](weights()), CAP, on_device)
    for bounded in (run, free):
        for group in bounded.optimizer.param_groups:
            group["lr"] *= 30.0
    changes, unheld = [], []
    for _ in range(30):
        for p in (*run.parameters, *free.parameters):
            p.grad = torch.ones_like(p)
        changes.append(run.step())
        unheld.append(free.step())
    assert max(moved[0] for moved in changes) <= SLACK * LESS * CAP
    assert max(moved[0] for moved in unheld) > 2 * LESS * CAP
    assert max(max(moved[1:]) for moved in changes) <= SLACK * CAP
    assert max(max(moved[1:]) for moved in changes) > 2 * LESS * CAP


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_engine_holds_them(kind: type[torch.optim.Optimizer], fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.RNN(3, 8, nonlinearity="relu", batch_first=True)
    guard = GuardEngine(
        model,
        kind(model.parameters(), lr=10.0, fused=fused),
        cap=UpdateCap(CAP, adaptive=False, relu_recurrence=LESS),
        clip=None,
        skip=None,
    )
    for _ in range(20):
        before = [p.detach().clone() for p in model.parameters()]
        guard._optimizer.zero_grad()
        loss = model(torch.randn(4, 12, 3))[0].square().mean()
        loss.backward()
        guard.before_step(loss)
        guard._optimizer.step()
        inputs, recurrent, *_ = relative_changes(before, list(model.parameters()))
        assert recurrent <= SLACK * LESS * CAP
        assert inputs <= SLACK * CAP
    assert guard.active
    guard.close()


def test_an_irnn_lives_through_a_rate_that_kills_it() -> None:
    """The first steps of Adam at 0.01 multiply what passes through 64 timesteps by thousands."""
    losses = {}
    for factor in (0.05, 1.0):
        torch.manual_seed(0)
        rnn, head = nn.RNN(1, 32, nonlinearity="relu", batch_first=True), nn.Linear(32, 1)
        nn.init.eye_(rnn.weight_hh_l0)
        model = nn.ModuleList([rnn, head])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
        guard = GuardEngine(model, optimizer, cap=UpdateCap(relu_recurrence=factor))
        generator = torch.Generator().manual_seed(1)
        course = []
        for _ in range(60):
            x = torch.rand(32, 64, 1, generator=generator)
            loss = (head(rnn(x)[0][:, -1]) - x[:, :8].mean(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            guard.before_step(loss)
            optimizer.step()
            course.append(loss.item())
        guard.close()
        losses[factor] = max(course[1:])
    assert losses[0.05] < 0.1 * losses[1.0]


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan")])
def test_a_factor_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"relu_recurrence must be a number > 0 and <= 1"):
        UpdateCap(relu_recurrence=value)
