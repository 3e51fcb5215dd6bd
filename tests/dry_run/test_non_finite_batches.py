"""A batch is to blame only for what it brings about, and nothing is left changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard.dry_run.non_finite import locate_non_finite
from lightning_gradguard.readings import NonFiniteOrigin
from tests.dry_run.models import CharacterModel, state_of, text_batches
from tests.dry_run.sources import B, F, Source, Stack, T, sequences, squares
from tests.models import assert_same_bits


def look(model: nn.Module, batch: Any, loss: Any = squares) -> NonFiniteOrigin | None:
    return locate_non_finite(model, batch, loss=loss)


# -- batches ---------------------------------------------------------------------------------------


@dataclass
class Data:
    inputs: Tensor
    targets: Tensor


def spoiled(*place: int, of: int = 0) -> tuple[Tensor, Tensor]:
    pair = sequences(), torch.zeros(B, T)
    pair[of][place] = math.inf
    return pair


@pytest.mark.parametrize(
    ("make", "take", "path"),
    [
        (lambda x, y: (x, y), lambda b: b, "{}"),
        (lambda x, y: [x, {"pixels": y}], lambda b: (b[0], b[1]["pixels"]), "{}"),
        (Data, lambda b: (b.inputs, b.targets), "{}"),
        (
            lambda x, y: {"deep": (3, Data(x, y))},
            lambda b: vars(b["deep"][1]).values(),
            "deep.1.{}",
        ),
    ],
    ids=["tuple", "list of dict", "dataclass", "nested"],
)
@pytest.mark.parametrize("of", [0, 1])
def test_paths_in_the_batch(make: Any, take: Any, path: str, of: int) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = take(batch)
        return (model(inputs).sum(-1) - targets).square().mean()

    batch = make(*spoiled(2, 3, of=of))
    found = look(Stack(), batch, loss)
    assert found is not None
    assert found.place == "batch"
    names = {"0": "inputs", "1": "targets"} if "Data" in str(batch) else {"0": "0", "1": "1"}
    expected = path.format(names[str(of)])
    assert found.module == ("1.pixels" if type(batch) is list and of else expected)
    assert found.sample == 2
    assert found.timestep == (3 if of == 0 else None)


def test_a_value_that_the_model_fills_in_is_not_to_blame() -> None:
    def fills_in(model: nn.Module, batch: Tensor) -> Tensor:
        return squares(model, batch.nan_to_num())

    model, batch = Stack(), sequences()
    batch[0, 0, 0] = math.nan
    assert look(model, batch, fills_in) is None
    model.last.forth = (1, 2, 3)
    assert look(model, batch, fills_in) == NonFiniteOrigin("forward", "last", 2, 1)


def test_minus_infinity_in_a_mask_is_not_to_blame() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(F, 1, 8, 0.0, batch_first=True)
            self.last = Source()

        def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
            result: Tensor = self.last(self.layer(inputs, src_mask=mask))
            return result

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        output: Tensor = model(*batch)
        return output.sum()

    mask = nn.Transformer.generate_square_subsequent_mask(T)
    model = Attention()
    assert look(model, (sequences(), mask), loss) is None
    model.last.back = (1, 2, 3)
    assert look(model, (sequences(), mask), loss) == NonFiniteOrigin("backward", "last", 2, 1)
    model.last.forth = (1, 2, 3)
    assert look(model, (sequences(), mask), loss) == NonFiniteOrigin("forward", "last", 2, 1)


def test_a_state_that_is_kept_from_batch_to_batch_cannot_be_told() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(F, F, batch_first=True)
            self.state = torch.full((1, B, F), math.nan)

        def forward(self, inputs: Tensor) -> Tensor:
            output, state = self.rnn(inputs, self.state)
            self.state = state.detach()
            result: Tensor = output
            return result

    assert look(Stateful(), sequences()) is None


# -- no trace --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Encountered `nan` values in tensor:UserWarning")
@pytest.mark.parametrize("fault", ["", "weights", "forward", "loss", "backward", "error"])
def test_everything_is_as_it_was_found(fault: str) -> None:
    class Faulty(CharacterModel):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if fault == "error":
                raise RuntimeError(fault)
            if fault == "backward":
                loss = loss + (self.head.weight * 0).sum().sqrt()
            return loss * (math.inf if fault == "loss" else 1.0)

    model, batch = Faulty(), text_batches(1)[0]
    model.loss(batch).backward()
    if fault == "weights":
        model.head.bias.data[3] = math.nan
    if fault == "forward":
        model.norm.bias.data[3] = 3e38
        model.head.weight.data[:, 3] = 3e38
    model.head.eval()
    letters, grads = batch.clone(), [parameter.grad for parameter in model.parameters()]
    before = state_of(model)
    if fault == "error":
        with pytest.raises(RuntimeError, match="error"):
            locate_non_finite(model, batch)
    else:
        found = locate_non_finite(model, batch)
        assert (found.place if found else "") == fault
    assert_same_bits(state_of(model), before)
    assert_same_bits(batch, letters)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("blame", [True, False])
def test_a_batch_that_is_tried_with_other_values_comes_back(blame: bool) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs = batch["deep"][1].inputs
        return squares(model, inputs if blame else inputs.nan_to_num()) + (0 if blame else math.nan)

    inputs = sequences()
    inputs[1, 2, 3], inputs[0, 0, 0] = math.nan, -math.inf
    batch = {"deep": (3, Data(inputs, inputs.sum(-1)))}
    before = {name: value.clone() for name, value in vars(batch["deep"][1]).items()}
    found = look(Stack(), batch, loss)
    assert found is not None
    assert found.place == ("batch" if blame else "loss")
    assert batch["deep"][1].inputs is inputs
    assert_same_bits(vars(batch["deep"][1]), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"module": 3}, TypeError, "module must be an nn.Module"),
        ({"loss": 3}, TypeError, "loss must be a function"),
        ({"loss": None}, ValueError, "loss must be given for Stack"),
        ({"batch_idx": -1}, ValueError, "batch_idx must be an integer >= 0"),
        ({"module": nn.LazyLinear(3)}, ValueError, "whole parameters with a shape"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    defaults = {"module": Stack(), "batch": sequences(), "loss": squares}
    with pytest.raises(error, match=message):
        locate_non_finite(**{**defaults, **arguments})
