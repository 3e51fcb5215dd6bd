"""What a preflight says of models of which the answer is known."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard.diagnose import Thresholds
from lightning_gradguard.dry_run import Preflight, preflight
from lightning_gradguard.dry_run.words import time_notes
from lightning_gradguard.measure.timesteps import TimestepProbe
from lightning_gradguard.readings import TimeReading
from tests.dry_run.models import CharacterModel, text_batches
from tests.models import assert_same_bits, loader

RATE = 0.8


def linear_rnn(gain: float, **settings: Any) -> nn.RNN:
    """ReLU units that never leave the linear range, and recurrent weights a·Q."""
    rnn = nn.RNN(4, 16, nonlinearity="relu", **settings)
    with torch.no_grad():
        rnn.weight_ih_l0.uniform_(0.01, 0.02)
        rnn.weight_hh_l0.copy_(gain * torch.eye(16).roll(1, 0))
        rnn.bias_ih_l0.zero_()
        rnn.bias_hh_l0.zero_()
    return rnn


def last_step(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)[0][-1].square().sum()


def quiet(*arguments: Any, **settings: Any) -> Preflight:
    return preflight(*arguments, verbose=False, **settings)


@pytest.mark.parametrize("gain", [0.5, 0.8, 1.2])
def test_rate_of_a_linear_network_is_the_log_of_its_gain(gain: float) -> None:
    result = quiet(linear_rnn(gain), torch.rand(30, 6, 4), loss=last_step)
    (reading,) = result.time
    assert (reading.source, reading.part, reading.timesteps) == ("exact", "l0", 30)
    assert reading.decay_rate == pytest.approx(math.log(gain), rel=1e-4)


def test_it_is_what_the_probe_measures_in_training() -> None:
    torch.manual_seed(0)
    model, batch = nn.GRU(5, 12, num_layers=2, bidirectional=True), torch.randn(20, 4, 5)
    with TimestepProbe(model) as probe:
        last_step(model, batch).backward()
        expected = probe.measure()
    result = quiet(model, batch, loss=last_step)
    assert_same_bits([r.to_dict() for r in result.time], [r.to_dict() for r in expected])
    assert [r.part for r in result.time] == ["l0", "l0_reverse", "l1", "l1_reverse"]


def test_a_symptom_is_said_in_words_and_not_called_a_fault() -> None:
    result = quiet(linear_rnn(RATE), torch.rand(200, 6, 4), loss=last_step)
    horizon = math.log(1e3) / -math.log(RATE)
    (note,) = result.notes
    assert note.startswith(f"The gradient reaches {horizon:.0f} of 200 steps in `RNN/l0`. ")
    assert "symptom, not yet a fault" in note


def test_growth_is_said_in_words() -> None:
    (note,) = quiet(linear_rnn(1.2), torch.rand(100, 6, 4), loss=last_step).notes
    assert note.startswith("The gradient grows by 8 orders of magnitude over 100 steps in `RNN/l0`")


def test_nothing_is_said_of_a_network_that_keeps_its_gradient() -> None:
    result = quiet(linear_rnn(1.0), torch.rand(100, 6, 4), loss=last_step)
    assert result.notes == ()
    assert "Nothing stands out." in str(result)


@pytest.mark.parametrize(
    ("rate", "error", "word"),
    [
        (-0.3, 0.01, "reaches"),
        (-0.3, 0.2, None),
        (0.1, 0.01, "grows"),
        (0.1, 0.05, None),
        (-0.3, math.nan, "reaches"),
    ],
)
def test_what_is_within_the_error_is_not_said(rate: float, error: float, word: Any) -> None:
    reading = TimeReading("rnn", "", "exact", timesteps=100, decay_rate=rate, decay_error=error)
    notes = time_notes([reading], Thresholds())
    assert [note.split()[2] for note in notes] == ([word] if word else [])


def test_short_sequences_are_no_symptom() -> None:
    assert quiet(linear_rnn(0.01), torch.rand(7, 6, 4), loss=last_step).notes == ()


def test_interval_comes_from_the_spread_of_the_batches() -> None:
    batches = [torch.randn(30, 4, 5) for _ in range(5)]
    model = nn.LSTM(5, 8)
    rates = [quiet(model, batch, loss=last_step).time[0].decay_rate for batch in batches]

    result = quiet(model, loader(batches), loss=last_step, max_batches=4)

    (reading,) = result.time
    spread = torch.tensor(rates[:4], dtype=torch.float64).std().item()
    assert reading.decay_rate == pytest.approx(sum(rates[:4]) / 4, rel=1e-6)
    assert reading.decay_error == pytest.approx(3.1824 * spread / 2, rel=2e-3)
    assert reading.sequences == 16
    assert len(result.loss) == 4


def test_losses_are_those_of_train_mode_without_a_step() -> None:
    model, batches = nn.Linear(3, 1), [torch.randn(4, 3) for _ in range(3)]
    expected = [model(batch).square().mean().item() for batch in batches]
    result = quiet(model, loader(batches), loss=lambda model, x: model(x).square().mean())
    assert result.loss == pytest.approx(expected)


def test_train_mode_is_on_inside_and_frozen_parts_stay_in_eval_mode() -> None:
    modes: list[list[bool]] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        modes.append([module.training for module in model.modules()])
        return model(batch).sum()

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].eval()
    quiet(model, torch.randn(4, 2), loss=loss)
    quiet(model.eval(), torch.randn(4, 2), loss=loss)
    assert modes == [[True, True, False], [True, True, True]]
    assert not any(module.training for module in model.modules())


def chain(depth: int, gain: float) -> nn.Sequential:
    layers = [nn.Linear(8, 8) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain)
    return nn.Sequential(*layers)


def test_depth_slope_of_a_linear_chain_is_the_log_of_its_gain() -> None:
    """The gradient gains a factor with each layer back, and the activations lose it."""
    model = chain(10, 0.5)
    for layer in model:
        nn.init.zeros_(layer.bias)
    result = quiet(model, torch.randn(16, 8), loss=lambda model, x: model(x).sum())
    assert result.depth.layers == 10
    assert result.depth.slope == pytest.approx(0.0, abs=0.3)

    class Residue(nn.Module):
        """Takes the gradient down by a constant, and leaves the activations."""

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.detach() + 0.1 * (inputs - inputs.detach())

    parts = [part for layer in chain(10, 1.0) for part in (layer, Residue())]
    result = quiet(nn.Sequential(*parts), torch.randn(16, 8), loss=lambda m, x: m(x).sum())
    assert result.depth.slope == pytest.approx(math.log(0.1), abs=0.1)
    (note,) = result.notes
    assert note.startswith("Relative to the weights, the gradient shrinks by 9 orders of magnitude")


def test_layers_of_the_model_itself_are_one() -> None:
    """As the layers of any other recurrent module are: one module, one layer."""
    assert quiet(nn.LSTM(5, 8, 2), torch.randn(9, 2, 5), loss=last_step).depth.layers == 1


def test_a_transformer_has_no_recurrence_to_show() -> None:
    model = nn.TransformerEncoderLayer(16, 2, dim_feedforward=16, batch_first=True)
    result = quiet(model, torch.randn(4, 10, 16), loss=lambda model, x: model(x).square().mean())
    assert result.time == ()
    assert "no recurrence was measured" in str(result)
    assert result.depth.layers == 4


def test_a_module_watched_on_its_output_is_shown_when_asked_for() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU())
    result = quiet(
        model, torch.randn(2, 3, 20), loss=lambda m, x: m(x).square().mean(), modules={"0": 2}
    )
    (reading,) = result.time
    assert (reading.source, reading.timesteps) == ("output", 20)
    assert math.isnan(reading.decay_rate)


def test_several_modules_share_one_sentence() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = linear_rnn(0.5), linear_rnn(0.3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.one(inputs)[0][-1] + self.other(inputs)[0][-1]

    result = quiet(Two(), torch.rand(50, 4, 4), loss=lambda m, x: m(x).square().sum())
    (note,) = result.notes
    assert "10 of 50 steps in `one/l0` and 6 of 50 steps in `other/l0`. " in note


def test_parameters_that_the_loss_does_not_reach_are_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "spare": nn.Linear(2, 1)})
    result = quiet(model, torch.randn(3, 2), loss=lambda model, x: model["used"](x).sum())
    assert "The loss gives no gradient to `spare.weight`, `spare.bias`: " in " ".join(result.notes)


def test_a_loss_that_is_not_finite_is_named_with_its_batch() -> None:
    batches = [torch.ones(2, 2), torch.full((2, 2), math.nan)]
    result = quiet(nn.Linear(2, 1), loader(batches), loss=lambda model, x: model(x).sum())
    assert result.notes[0].startswith("The loss of batch 1 is nan: ")


def test_a_real_character_model_as_data_and_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    result = preflight(CharacterModel(), loader(text_batches(3)))

    assert [reading.name for reading in result.time] == ["rnn/l0"]
    assert result.time[0].decay_rate + result.time[0].decay_error < 0
    assert result.depth.layers == 3
    printed = capsys.readouterr().out
    assert printed == f"{result}\n"
    assert "rnn/l0  40  " in printed
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["time"][0]["decay_rate"] == result.time[0].decay_rate
    assert plain["depth"]["slope"] == result.depth.slope
    assert plain["loss"] == list(result.loss)
    assert plain["notes"] == list(result.notes)


def test_nothing_is_printed_if_not_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    quiet(nn.Linear(2, 1), torch.randn(3, 2), loss=lambda model, x: model(x).sum())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_does_not_depend_on_whether_gradients_are_on(context: Any) -> None:
    model, batch = linear_rnn(RATE), torch.rand(30, 6, 4)
    with context():
        result = quiet(model, batch, loss=last_step)
        assert not torch.is_grad_enabled()
    assert result.time[0].decay_rate == pytest.approx(math.log(RATE), rel=1e-4)


@pytest.mark.gpu
def test_a_model_on_a_gpu_reads_as_on_the_cpu() -> None:
    model, batch = nn.LSTM(5, 16), torch.randn(40, 8, 5)
    expected = quiet(model, batch, loss=last_step)
    found = quiet(model.cuda(), batch.cuda(), loss=last_step)
    assert found.time[0].source == "exact"
    assert found.time[0].decay_rate == pytest.approx(expected.time[0].decay_rate, rel=1e-3)
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
