"""Models of every kind can be looked at again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gradguard.dry_run.non_finite import locate_non_finite
from lightning_gradguard.readings import NonFiniteOrigin
from tests.dry_run.sources import B, F, Source, Stack, sequences, squares


def look(model: nn.Module, batch: Any, loss: Any = squares) -> NonFiniteOrigin | None:
    return locate_non_finite(model, batch, loss=loss)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["forth", "back"])
def test_checkpoints(reentrant: bool, way: str) -> None:
    def loss(model: Any, batch: Tensor) -> Tensor:
        hidden: Any = checkpoint(model.block, model.first(batch), use_reentrant=reentrant)
        return model.last(hidden).square().mean()

    model = Stack()
    setattr(model.block[1][0], way, (2, 3, 0))
    place: Any = {"forth": "forward", "back": "backward"}[way]
    expected = NonFiniteOrigin(place, "block.1.0", 3, 2)
    assert look(model, sequences(), loss) == expected


def test_a_module_that_is_called_several_times() -> None:
    def loss(model: Any, batch: Tensor) -> Tensor:
        hidden = model.first(model.first(batch) * 1e25)
        return model.last(hidden * 1e25).sum()

    model = Stack()
    found = look(model, sequences(), loss)
    assert found is not None
    assert (found.place, found.module) == ("forward", "")  # the product is the loss function's own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = Stack().to(dtype)
    model.last.forth = (1, 2, 3)
    found = look(model, sequences().to(dtype), lambda m, x: m(x).float().sum())
    assert found == NonFiniteOrigin("forward", "last", 2, 1)


def test_autocast_overflows_where_float32_does_not() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return model(batch).float().sum()

    model = nn.Sequential(nn.Linear(F, F), nn.Linear(F, F))
    model[0].weight.data.fill_(1e4)
    batch = torch.ones(B, F)
    batch[2] = 10.0
    model[0].bias.data.zero_()
    assert look(model, batch / 100, loss) is None
    assert look(model, batch / 10 + 1, loss) == NonFiniteOrigin("forward", "0", None, 2)


class NegativeLog(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return torch.log(-values.abs())


# The compiler asks intermediate tensors for their gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules_run_as_they_are_written(whole: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(F, F), NegativeLog())
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model[1].compile(backend="eager")
    model(sequences())
    assert look(model, sequences()) == NonFiniteOrigin("forward", "1", 0, 0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_torchscript_counts_for_what_calls_it() -> None:
    model = nn.Sequential(nn.Linear(F, F), nn.Sequential(torch.jit.script(NegativeLog())))
    assert look(model, sequences()) == NonFiniteOrigin("forward", "1", 0, 0)


def test_in_place_modules_and_residuals() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.source = nn.ReLU(inplace=True), Source()

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs + self.source(self.act(inputs * 1.0))

    model = nn.Sequential(nn.Linear(F, F), Residual(), Residual(), nn.ReLU(inplace=True))
    model[1].source.back = (0, 1, 2)
    assert look(model, sequences()) == NonFiniteOrigin("backward", "1.source", 1, 0)


def test_dropout_is_drawn_again() -> None:
    class Rare(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values / (torch.rand(()) > 0.5)

    model = nn.Sequential(nn.Linear(F, F), Rare())
    for seed in range(8):
        torch.manual_seed(seed)
        drawn = bool(torch.rand(()) > 0.5)
        torch.manual_seed(seed)
        found = look(model, torch.ones(B, F))
        assert found == (None if drawn else NonFiniteOrigin("forward", "1", None, 0))
