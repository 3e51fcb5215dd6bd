"""The first place at which a step is not finite is found, wherever it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_gradguard.dry_run.non_finite import locate_non_finite
from lightning_gradguard.readings import NonFiniteOrigin
from tests.dry_run.sources import B, F, Source, Stack, T, sequences, squares

TIMESTEPS, SAMPLES = st.integers(0, T - 1), st.integers(0, B - 1)
LAYOUTS = pytest.mark.parametrize("batch_first", [True, False])
few = settings(max_examples=15, deadline=None)


def place_of(timestep: int, sample: int, feature: int, *, batch_first: bool) -> tuple[int, ...]:
    return (sample, timestep, feature) if batch_first else (timestep, sample, feature)


def look(model: nn.Module, batch: Any, loss: Any = squares) -> NonFiniteOrigin | None:
    return locate_non_finite(model, batch, loss=loss)


# -- one place after the other ---------------------------------------------------------------------


@LAYOUTS
@few
@given(
    path=st.sampled_from(Stack.PATHS),
    timestep=TIMESTEPS,
    sample=SAMPLES,
    feature=st.integers(0, F - 1),
)
def test_forward(path: str, timestep: int, sample: int, feature: int, batch_first: bool) -> None:
    model = Stack(batch_first=batch_first)
    source: Any = model.get_submodule(path)
    source.forth = place_of(timestep, sample, feature, batch_first=batch_first)
    found = look(model, sequences(batch_first=batch_first))
    assert found == NonFiniteOrigin("forward", path, timestep, sample)


@LAYOUTS
@few
@given(path=st.sampled_from(Stack.PATHS[1:]), timestep=TIMESTEPS, sample=SAMPLES)
def test_backward(path: str, timestep: int, sample: int, batch_first: bool) -> None:
    model = Stack(batch_first=batch_first)
    source: Any = model.get_submodule(path)
    source.back = place_of(timestep, sample, 0, batch_first=batch_first)
    found = look(model, sequences(batch_first=batch_first))
    assert found == NonFiniteOrigin("backward", path, timestep, sample)


@few
@given(
    later=st.sampled_from(Stack.PATHS[1:]),
    earlier=st.sampled_from(Stack.PATHS[1:]),
    back=st.booleans(),
)
def test_of_two_places_the_one_that_is_reached_first(later: str, earlier: str, back: bool) -> None:
    model = Stack()
    for path in (later, earlier):
        source: Any = model.get_submodule(path)
        setattr(source, "back" if back else "forth", (0, 0, 0))
    order = sorted((later, earlier), key=Stack.PATHS.index)
    found = look(model, sequences())
    assert found is not None
    assert found.module == order[-1 if back else 0]


@LAYOUTS
@few
@given(timestep=TIMESTEPS, sample=SAMPLES, value=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_batch(timestep: int, sample: int, value: float, batch_first: bool) -> None:
    batch = sequences(batch_first=batch_first)
    batch[place_of(timestep, sample, 2, batch_first=batch_first)] = value
    found = look(Stack(batch_first=batch_first), batch)
    assert found == NonFiniteOrigin("batch", "", timestep, sample)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("path", ["rnn", "block.1.0.linear"])
def test_weights(path: str, value: float) -> None:
    model = Stack()
    next(model.get_submodule(path).parameters()).data.flatten()[-1] = value
    assert look(model, sequences()) == NonFiniteOrigin("weights", path)


def test_loss() -> None:
    def log_of_negative(model: nn.Module, batch: Tensor) -> Tensor:
        return torch.log(-squares(model, batch))

    assert look(Stack(), sequences(), log_of_negative) == NonFiniteOrigin("loss")


def test_backward_of_the_loss() -> None:
    """The root of zero has an infinite slope: 0 times that is NaN."""

    def root(model: nn.Module, batch: Tensor) -> Tensor:
        output = model(batch)
        return ((output - output.detach()) * 1.0).square().sum().sqrt()

    assert look(Stack(), sequences(), root) == NonFiniteOrigin("backward", "", T - 1, 0)


@pytest.mark.parametrize("loss", [squares, lambda model, batch: model(batch).abs().sum()])
def test_nothing_where_all_is_finite(loss: Any) -> None:
    assert look(Stack(), sequences(), loss) is None


# -- between modules, and in the deepest one -------------------------------------------------------


class Between(nn.Module):
    """Its own code makes the NaN, between its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(F, F), nn.Linear(F, F)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.before(inputs).clone()
        hidden[1, 2] = torch.log(-hidden[1, 2].square())
        result: Tensor = self.after(hidden)
        return result


def test_a_block_is_named_for_its_own_code() -> None:
    model = nn.Sequential(nn.Linear(F, F), Between(), nn.ReLU())
    assert look(model, sequences()) == NonFiniteOrigin("forward", "1", 2, 1)


def test_code_around_the_modules_has_no_path() -> None:
    def loss(model: Any, batch: Tensor) -> Tensor:
        hidden = model[0](batch)
        return model[1](torch.where(batch > 2.0, torch.sqrt(-batch), hidden)).sum()

    batch = sequences().clamp(max=1.0)
    batch[3, 4, 0] = 3.0
    found = look(nn.Sequential(nn.Linear(F, F), nn.Linear(F, F)), batch, loss)
    assert found == NonFiniteOrigin("forward", "", 4, 3)


def test_a_gradient_that_is_lost_in_the_first_block_and_reaches_no_input() -> None:
    """The input of the model needs no gradient, so only the weights show it."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(F, F)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.linear(inputs)
            return torch.where(hidden > 0, hidden, (hidden * 0).sqrt())

    model = nn.Sequential(Masked(), nn.Linear(F, F))
    assert look(model, sequences()) == NonFiniteOrigin("backward", "0")


def test_a_value_that_the_loss_leaves_out_is_found_by_its_gradient() -> None:
    """log(x) where x > 0 else 0: the loss is finite, and 0 times infinity is NaN."""

    class Log(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return torch.log(values)

    def loss(model: Any, batch: Tensor) -> Tensor:
        hidden = model[0](batch)
        hidden = hidden * (hidden > 0)
        return torch.where(hidden > 0, model[1](hidden), 0.0).sum()

    found = look(nn.Sequential(nn.Linear(F, F), Log()), sequences(), loss)
    assert found is not None
    assert (found.place, found.module) == ("backward", "1")


# -- time ------------------------------------------------------------------------------------------


def steep(kind: type[nn.RNN], **settings: Any) -> Any:
    """Its state stays 0, and its gradient grows a million times with each step back in time."""
    rnn = kind(F, F, bias=False, **settings)
    for name, weight in rnn.named_parameters():
        weight.data = torch.eye(F) * (1e6 if "hh" in name else 1.0)
    return rnn


@LAYOUTS
def test_a_gradient_that_overflows_through_time(batch_first: bool) -> None:
    def loss(model: Any, batch: Tensor) -> Tensor:
        output = model(batch)[0]
        return output[:, -1].sum() if batch_first else output[-1].sum()

    batch = torch.zeros(B, 12, F) if batch_first else torch.zeros(12, B, F)
    found = look(steep(nn.RNN, batch_first=batch_first), batch, loss)
    # 1e36 fits into float32, 1e42 does not: 7 steps before the last.
    assert found == NonFiniteOrigin("backward", "", 12 - 1 - 7, 0)


def test_of_two_directions_no_timestep_is_told() -> None:
    model = nn.Sequential(nn.Identity(), steep(nn.RNN, bidirectional=True))
    batch = torch.zeros(12, B, F)
    found = look(model, batch, lambda model, x: model(x)[0].sum())
    assert found == NonFiniteOrigin("backward", "1")


def test_packed_sequences() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source = Source()
            self.rnn = nn.LSTM(F, F, batch_first=True)

        def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            inputs, lengths = batch
            packed = pack_padded_sequence(
                self.source(inputs), lengths, batch_first=True, enforce_sorted=False
            )
            output = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]
            return output.sum()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        output: Tensor = model(batch)
        return output

    batch = (sequences(), torch.tensor([3, 7, 5, 2]))
    model = Packed()
    model.source.forth = (2, 4, 0)
    assert look(model, batch, loss) == NonFiniteOrigin("forward", "source", 4, 2)
    model.source.forth = (2, 5, 0)  # padding, which is left out
    assert look(model, batch, loss) is None
    model.source.forth = None
    model.rnn.register_forward_pre_hook(lambda rnn, args: (_spoiled(args[0]),))
    found = look(model, batch, loss)
    assert found == NonFiniteOrigin("forward", "", 1, 0)


def _spoiled(packed: Any) -> Any:
    """NaN at the second timestep of all sequences, of which the first is the shortest but one."""
    data = packed.data.clone()
    data[int(packed.batch_sizes[0]) : int(packed.batch_sizes[:2].sum())] = math.nan
    return packed._replace(data=data)


def test_cells_count_their_calls() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(F, F)
            self.head = nn.Linear(F, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            state = inputs.new_zeros(B, F)
            for step in range(T):
                state = self.cell(inputs[:, step], state)
            return self.head(state)

    model, batch = Loop(), sequences()
    batch[1, 3] = 1e20  # squared, it is too large for float32
    model.cell.register_forward_hook(lambda cell, args, output: output + 0 * args[0].square())
    assert look(model, batch) == NonFiniteOrigin("forward", "cell", 3, 1)


def test_convolutions_have_time_last_and_images_have_none() -> None:
    conv = nn.Sequential(nn.Conv1d(F, F, 1))
    batch = sequences().transpose(1, 2).clone()
    conv.append(nn.Identity())
    conv[0].register_forward_hook(lambda *call: call[2].index_fill(2, torch.tensor(5), math.inf))
    assert look(conv, batch) == NonFiniteOrigin("forward", "0", 5, 0)
    images = torch.ones(B, 3, 6, 6)
    images[2, 1, 0, 0] = math.nan
    found = look(nn.Sequential(nn.Conv2d(3, 3, 1)), images)
    assert found == NonFiniteOrigin("batch", "", None, 2)
