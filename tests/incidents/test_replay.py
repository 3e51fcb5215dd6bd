"""Done again, a step shows what it showed in the run, and says where it first went wrong."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_gradguard.incidents import (
    IncidentError,
    Incidents,
    IncidentWriter,
    Moment,
    RandomState,
    Replay,
    replay,
)
from lightning_gradguard.readings import NonFiniteOrigin
from tests.models import assert_same_bits

B, T, F = 4, 9, 3


class Log(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return torch.log(values)


class Root(nn.Module):
    """The length of each vector, whose gradient at length 0 is NaN."""

    def forward(self, values: Tensor) -> Tensor:
        return values.square().sum(-1, keepdim=True).sqrt()


class Tagger(LightningModule):
    """Where it goes wrong is up to the batch."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.rnn = nn.GRU(F, 8, batch_first=True)
            self.drop = nn.Dropout(0.3)
            self.body = nn.ModuleDict({"log": Log(), "root": Root()})
            self.head = nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.drop(self.rnn(batch["inputs"])[0])
        logs = self.body["log"](hidden.exp() - batch["shift"])
        self.log("batch_idx", float(batch_idx))
        return self.head(logs).square().mean() + self.body["root"](logs * batch["scale"]).mean()


def batch_with(entry: str = "", value: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    batch = {
        "inputs": torch.randn(B, T, F, generator=generator),
        "shift": torch.zeros(B, T, 1),
        "scale": torch.ones(B, T, 1),
    }
    if entry:
        batch[entry][2, 7] = value
    return batch


def kept(folder: Path, model: nn.Module, batch: Any, **arguments: Any) -> Path:
    """An incident of a step that is about to be taken."""
    reason = arguments.pop("reason", "non_finite")
    writer = IncidentWriter(folder, arguments.pop("settings", None))
    moment = Moment(batch, 5, RandomState.now(torch.device("cpu")))
    return writer.begin(412, model, moment, **arguments).commit(reason)


CASES: list[tuple[str, float, NonFiniteOrigin, str, str]] = [
    (
        "inputs",
        math.nan,
        NonFiniteOrigin("batch", "inputs", 7, 2),
        "inputs",
        "First not finite: `inputs` of the batch, at timestep 7 of sample 2.",
    ),
    (
        "shift",
        1e9,
        NonFiniteOrigin("forward", "body.log", 7, 2),
        "output",
        "in `body.log`, its output, at timestep 7 of sample 2, although its input is finite.",
    ),
    (
        "scale",
        0.0,
        NonFiniteOrigin("backward", "body.root", 7, 2),
        "gradient of the input",
        "in `body.root`, the gradient of the input, at timestep 7 of sample 2, on the way back",
    ),
]


@pytest.mark.parametrize(("entry", "value", "origin", "tensor", "sentence"), CASES)
def test_module_timestep_sample_and_tensor_are_named(
    tmp_path: Path, entry: str, value: float, origin: NonFiniteOrigin, tensor: str, sentence: str
) -> None:
    path = kept(tmp_path, Tagger(), batch_with(entry, value))
    result = replay(path, Tagger(seed=2))
    assert result.origin == origin
    assert result.origin.tensor == tensor
    assert math.isfinite(result.loss) == (origin.place == "backward")
    assert not math.isfinite(result.total_norm)
    assert sentence in str(result)
    assert str(result).startswith("Incident at step 412 (non_finite), written ")


def test_what_a_recurrent_module_makes_is_found_at_its_timestep(tmp_path: Path) -> None:
    encoder = nn.ModuleDict({"rnn": nn.RNN(F, 8, nonlinearity="relu", batch_first=True)})
    with torch.no_grad():
        encoder["rnn"].weight_ih_l0.fill_(1e30)
    inputs = torch.ones(B, T, F)
    inputs[0, 7] = 1e12  # a finite number, as are the weights; their product is not
    path = kept(tmp_path, encoder, inputs)
    result = replay(path, encoder, loss=lambda model, x: model["rnn"](1e-3 * x)[0].sum())
    assert result.origin == NonFiniteOrigin("forward", "rnn", 7, 0)
    assert "in `rnn`, its output, at timestep 7 of sample 0, although its input" in str(result)


def test_the_parameter_that_is_nan_is_named(tmp_path: Path) -> None:
    model = Tagger()
    with torch.no_grad():
        model.rnn.weight_hh_l0[3, 1] = math.nan
    result = replay(kept(tmp_path, model, batch_with()), Tagger())
    assert result.origin == NonFiniteOrigin("weights", "rnn")
    assert "the weights, in the parameter `rnn.weight_hh_l0`, before the step" in str(result)


class Half(nn.Module):
    """Its weight's gradient is NaN where its input's is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        return values + self.weight.square().sqrt()


def test_the_gradient_of_a_parameter_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(F, F), Half())
    path = kept(tmp_path, model, torch.ones(B, F))
    result = replay(path, model, loss=lambda model, x: model(x).sum())
    assert result.origin == NonFiniteOrigin("backward", "1")
    assert "in `1`, the gradient of `weight`, on the way back" in str(result)


def reference(model: Tagger, batch: Any) -> tuple[float, dict[str, float]]:
    """Loss and gradient norms, the obvious way, of the random numbers that come next."""
    model.train()
    model.log = lambda *_: None  # type: ignore[method-assign,assignment]
    loss = model.training_step(batch, 5)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    named = zip(dict(model.named_parameters()), grads, strict=True)
    return loss.item(), {name: grad.norm().item() for name, grad in named}


def test_of_a_divergence_the_numbers_are_those_of_the_run(tmp_path: Path) -> None:
    """With its dropout masks, which another seed would not have."""
    batch = batch_with()
    path = kept(tmp_path, Tagger(), batch, reason="diverging")
    loss, norms = reference(Tagger(), batch)
    torch.manual_seed(99)
    other_loss, _ = reference(Tagger(), batch)
    result = replay(path, Tagger(seed=2))
    assert result.origin is None
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert abs(other_loss / loss - 1) > 1e-3
    assert result.total_norm == pytest.approx(math.hypot(*norms.values()), rel=1e-5)
    assert [name for name, _ in result.layers] == ["rnn", "head"]
    head = math.hypot(norms["head.weight"], norms["head.bias"])
    assert dict(result.layers)["head"] == pytest.approx(head, rel=1e-5)
    assert "Everything is finite this time. The loss is" in str(result)


def test_module_and_random_numbers_are_left_as_they_were(tmp_path: Path) -> None:
    path = kept(tmp_path, Tagger(), batch_with("shift", 1e9))
    model = Tagger(seed=2).eval()
    model.head.weight.requires_grad_(False)
    model.rnn.weight_ih_l0.grad = torch.ones_like(model.rnn.weight_ih_l0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = dict(vars(model))
    randomness = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    replay(path, model)
    assert_same_bits(dict(model.state_dict()), before)
    assert_same_bits(
        [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()],
        list(randomness),
    )
    assert vars(model) == attributes
    assert not any(part.training for part in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert model.rnn.weight_ih_l0.grad.eq(1).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- weights --------------------------------------------------------------------------------------


def test_the_modules_own_weights_are_told_from_those_of_the_run(tmp_path: Path) -> None:
    model = Tagger()
    path = kept(tmp_path, model, batch_with(), settings=Incidents(weights=False))
    (note,) = replay(path, Tagger()).notes
    assert note.endswith("the module's own are the same.")
    other = Tagger()
    with torch.no_grad():
        other.head.bias.add_(1)
    (note,) = replay(path, other).notes
    assert "are others (1 of 6 tensors, first `head.bias`)" in note


def test_own_weights_on_request(tmp_path: Path) -> None:
    model = Tagger()
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    path = kept(tmp_path, model, batch_with())
    assert replay(path, Tagger()).origin is not None
    assert replay(path, Tagger(), own_weights=True).origin is None


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = kept(tmp_path, nn.Linear(3, 1), batch_with())
    with pytest.raises(IncidentError, match=r"another model than Tagger, which has no `bias`, `w"):
        replay(path, Tagger())
    with pytest.raises(IncidentError, match=r"do not fit Linear: .*size mismatch for"):
        replay(path, nn.Linear(4, 1), loss=lambda model, batch: model(batch).sum())


@pytest.mark.parametrize("finite", [True, False])
def test_weights_of_later_are_told(tmp_path: Path, finite: bool) -> None:
    model = Tagger()
    if not finite:
        with torch.no_grad():
            model.head.weight.fill_(math.nan)
    path = kept(tmp_path, model, batch_with("shift", 1e9), weights_step=415)
    result = replay(path, Tagger())
    assert result.origin == NonFiniteOrigin("forward", "body.log", 7, 2)
    (note,) = result.notes
    assert note.startswith("The weights of the incident are those of 3 steps later")
    assert note.endswith(("quite those of the step.", "the module's own were used.")[not finite])


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_precision_of_the_weights_is_that_of_the_run(tmp_path: Path, precision: str) -> None:
    model, batch = nn.Linear(F, 1).half(), torch.full((B, F), 3e4).half()
    if precision == "bf16-true":
        model, batch = model.bfloat16(), batch.bfloat16()
    path = kept(tmp_path, model, batch, facts={"precision": precision})
    # Beyond float16's largest number only.
    result = replay(path, nn.Linear(F, 1), loss=lambda model, x: 4 * model(x).abs().sum() + x.sum())
    assert (result.origin is not None) == (precision == "16-true")


def test_autocast_is_that_of_the_run(tmp_path: Path) -> None:
    model, batch = nn.Linear(F, 1, bias=False), torch.full((B, F), 6e4)
    nn.init.ones_(model.weight)
    for precision, place in (("16-mixed", "forward"), ("bf16-mixed", None), ("32-true", None)):
        path = kept(tmp_path, model, batch, facts={"precision": precision})
        origin = replay(path, model, loss=lambda model, x: model(x).float().sum()).origin
        assert (origin and origin.place) == place


# -- what a training step asks for ----------------------------------------------------------------


def test_a_training_step_finds_the_numbers_of_its_trainer(tmp_path: Path) -> None:
    class Curious(Tagger):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert (self.current_epoch, self.global_step, batch_idx) == (3, 412, 5)
            assert self.trainer.training
            assert not self.trainer.sanity_checking
            self.logger.experiment.add_scalar("x", 1.0)
            return super().training_step(batch, batch_idx)

    path = kept(tmp_path, Curious(), batch_with(), facts={"epoch": 3, "global_step": 412})
    result = replay(path, Curious())
    assert result.error == ""
    assert math.isfinite(result.loss)


def test_parts_in_eval_mode_stay_so(tmp_path: Path) -> None:
    model = Tagger()
    model.train()
    model.drop.eval()
    path = kept(tmp_path, model, batch_with(), reason="diverging")
    first, second = (replay(path, Tagger()).loss for _ in range(2))
    loss, _ = reference(Tagger(), batch_with())
    assert first == second
    assert abs(first - loss) > 1e-4  # with dropout


def test_what_raises_again_is_the_result(tmp_path: Path) -> None:
    batch = batch_with()
    batch["inputs"] = torch.ones(B, T, F + 1)
    path = kept(tmp_path, Tagger(), batch, reason="exception")
    result = replay(path, Tagger())
    assert result.origin is None
    assert result.error.startswith("RuntimeError: ")
    assert "in `rnn`)" in result.error
    assert f"The step raises {result.error}" in str(result)


def test_no_loss_is_said_at_once(tmp_path: Path) -> None:
    class Manual(Tagger):
        automatic_optimization = False  # type: ignore[assignment]

    path = kept(tmp_path, Manual(), batch_with())
    with pytest.raises(ValueError, match="loss must be given for Manual"):
        replay(path, Manual())
    assert replay(path, Manual(), loss=lambda model, b: model.training_step(b, 0)).origin is None


def test_wrong_arguments(tmp_path: Path) -> None:
    wrong: Any = "module"
    with pytest.raises(TypeError, match=r"module must be an nn\.Module"):
        replay(tmp_path, wrong)
    with pytest.raises(TypeError, match="loss must be a function"):
        replay(tmp_path, Tagger(), loss=wrong)
    with pytest.raises(TypeError, match="own_weights must be"):
        replay(tmp_path, Tagger(), own_weights=wrong)


def test_as_plain_values(tmp_path: Path) -> None:
    result: Replay = replay(kept(tmp_path, Tagger(), batch_with("inputs", math.nan)), Tagger())
    values = result.to_dict()
    assert values["loss"] == "nan"
    assert values["origin"] == {
        "place": "batch",
        "module": "inputs",
        "timestep": 7,
        "sample": 2,
        "tensor": "inputs",
    }


@pytest.mark.gpu
def test_on_a_gpu_the_dropout_masks_are_those_of_the_run(tmp_path: Path) -> None:
    cuda = torch.device("cuda", torch.cuda.current_device())
    model = Tagger().to(cuda)
    batch = {name: value.to(cuda) for name, value in batch_with().items()}
    moment = Moment(batch, 5, RandomState.now(cuda))
    writer = IncidentWriter(tmp_path)
    path = writer.begin(1, model, moment, facts={"device": "cuda"}).commit("diverging")
    loss, _ = reference(model, batch)
    assert replay(path, Tagger(), device="cuda").loss == pytest.approx(loss, rel=1e-5)
    (note,) = replay(path, Tagger()).notes
    assert "The run was on cuda and this on cpu" in note
