"""Where the loss comes from, and one clear sentence where it does not come."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradguard.dry_run import preflight
from tests.models import loader


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.calls: list[tuple[Any, ...]] = CALLS

    def loss(self, batch: Tensor) -> Tensor:
        return self.layer(batch).square().mean()


CALLS: list[tuple[Any, ...]] = []


def doubled(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Any:
        return function(*arguments)

    return wrapper


class WithoutIndex(Model):
    def training_step(self, batch: Tensor) -> Tensor:
        return self.loss(batch)


class WithIndex(Model):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch) * (1 + batch_idx)


class WithAnyName(Model):
    def training_step(self, x: Tensor, i: int, more: int = 0) -> Tensor:
        return self.loss(x) * (1 + i)


class WithAll(Model):
    def training_step(self, *arguments: Any) -> Tensor:
        batch, index = arguments
        return self.loss(batch) * (1 + index)


class Wrapped(Model):
    @doubled
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch) * (1 + batch_idx)


class AsDict(Model):
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        return {"loss": self.loss(batch) * (1 + batch_idx), "logits": 0}


@pytest.mark.parametrize("kind", [WithIndex, WithAnyName, WithAll, Wrapped, AsDict])
def test_a_step_that_takes_the_index_gets_it(kind: type[Model]) -> None:
    model = kind()
    batch = torch.ones(3, 2)
    loss = model.loss(batch).item()
    result = preflight(model, loader([batch, batch]), verbose=False)
    assert result.loss == pytest.approx((loss, 2 * loss))


def test_a_step_that_takes_the_batch_alone_gets_that() -> None:
    model = WithoutIndex()
    assert preflight(model, torch.ones(3, 2), verbose=False).loss == pytest.approx(
        (model.loss(torch.ones(3, 2)).item(),)
    )


def test_a_given_loss_goes_before_the_training_step() -> None:
    result = preflight(
        WithIndex(), torch.ones(3, 2), loss=lambda m, x: 0 * m.loss(x) + 7, verbose=False
    )
    assert result.loss == (7.0,)


def test_logging_without_a_trainer_gives_no_warning() -> None:
    class Logging(WithIndex):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            self.log_dict({"twice": 2 * loss})
            return loss

    model = Logging()
    preflight(model, torch.ones(3, 2), verbose=False)
    with pytest.warns(UserWarning, match=r"self\.log"):  # as it would without
        model.training_step(torch.ones(3, 2), 0)


class Manual(WithIndex):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_manual_optimization_needs_a_loss() -> None:
    model = Manual()
    with pytest.raises(ValueError, match="loss must be given for Manual, whose automatic_optimiz"):
        preflight(model, torch.ones(3, 2))
    result = preflight(model, torch.ones(3, 2), loss=lambda m, x: m.loss(x), verbose=False)
    assert len(result.loss) == 1


@pytest.mark.parametrize("model", [nn.Linear(2, 1), Model()], ids=["module", "lightning"])
def test_without_training_step_and_loss_it_says_so(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"which has no training_step\(batch\) of its own"):
        preflight(model, torch.ones(3, 2))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (None, "got None for batch 0"),
        ({"value": 1}, "got {'value': 1} for batch 0"),
        (0.5, r"got 0\.5 for batch 0"),
        (torch.ones(3, requires_grad=True), r"got shape \(3,\) for batch 0"),
        (torch.ones(()), "depends on a trainable parameter, got one without a gradient"),
    ],
    ids=["none", "dict", "number", "vector", "constant"],
)
def test_what_is_no_loss_is_named(output: Any, words: str) -> None:
    class Wrong(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return output

    with pytest.raises(ValueError, match=f"^training_step must return .*{words}"):
        preflight(Wrong(), torch.ones(3, 2))
    with pytest.raises(ValueError, match=f"^loss must return .*{words}"):
        preflight(nn.Linear(2, 1), torch.ones(3, 2), loss=lambda model, batch: output)


def total(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).sum()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"module": 3}, TypeError, "module must be an nn.Module, got 3"),
        ({"loss": "mse"}, TypeError, "loss must be a function of a module and a batch, or None"),
        ({"max_batches": 0}, ValueError, "max_batches must be an integer >= 1, got 0"),
        ({"max_batches": 1.5}, TypeError, "max_batches must be an integer >= 1, got 1.5"),
        ({"modules": ["rn"]}, ValueError, "which matches none; nearest: 'Linear'"),
        ({"module": nn.LazyLinear(1)}, ValueError, "got 'weight', which gets one from the first"),
        ({"module": nn.ReLU()}, ValueError, "module must have a trainable parameter, got ReLU"),
        ({"batch": DataLoader([])}, ValueError, "a DataLoader with at least one batch, got none"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_bad_argument_is_named(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    valid = {"module": nn.Linear(2, 1), "batch": torch.ones(3, 2), "loss": total}
    with pytest.raises(error, match=words):
        preflight(**{**valid, **arguments})
