"""Remedies: each a sentence and a line of code that runs on the very model it is given for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_gradguard import GradGuard
from lightning_gradguard.diagnose import Finding, Pathology, Remedy, Severity
from lightning_gradguard.diagnose.idle_reasons import Reason
from lightning_gradguard.diagnose.remedies import remedies_for, with_remedies, without_remedy
from lightning_gradguard.diagnose.remedies.choice import _reason
from lightning_gradguard.measure.model_facts import model_facts
from lightning_gradguard.readings import ModelFacts

WIDTH, CLASSES = 8, 3


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(WIDTH, WIDTH, num_layers=2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.rnn(inputs[None])[0][-1])


class Named(nn.Module):
    """Activations as attributes, one of them the model's output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.act = nn.Tanh()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.out = nn.Sigmoid()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.head(self.act(self.encoder(inputs))))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 6), nn.ReLU()
        )
        self.head = nn.Linear(6, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.net(inputs.reshape(-1, 1, 4, 2).repeat(1, 1, 1, 2).tile(2)[..., :5]))


def deep(activation: type[nn.Module], layers: int = 9) -> nn.Module:
    net = [part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH), activation())]
    return nn.Sequential(*net, nn.Linear(WIDTH, CLASSES))


# Model, place of a layer, place of an activation.
MODELS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "deep sigmoid": (lambda: deep(nn.Sigmoid), "2", "3"),
    "deep relu": (lambda: deep(nn.ReLU), "2", "3"),
    "normalized": (
        lambda: nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)
        ),
        "0",
        "2",
    ),
    "named": (Named, "encoder", "act"),
    "images": (Images, "net.0", "net.1"),
    "sequences": (Sequences, "head", "rnn"),
    "linear": (lambda: nn.Linear(WIDTH, CLASSES), "", ""),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
}
EVIDENCE: list[tuple[Pathology, Mapping[str, float]]] = [
    *((pathology, {"z": 9.0}) for pathology in Pathology),
    (Pathology.NON_FINITE, {"batch": 1.0}),
    (Pathology.NON_FINITE, {"loss_is_finite": 0.0}),
    *((Pathology.LAYER_NOT_TRAINING, {reason.value: 1.0, "modules": 1.0}) for reason in Reason),
    (Pathology.LAYER_NOT_TRAINING, {"no_optimizer": 1.0, "modules": 4.0}),
    (Pathology.UPDATE_OUT_OF_RANGE, {"update_ratio": 1.0, "median": 0.01}),
    (Pathology.UPDATE_OUT_OF_RANGE, {"update_ratio": 1e-6, "median": 0.01}),
    (Pathology.UPDATE_OUT_OF_RANGE, {"update_ratio": 1e-9, "latest": 300.0}),
]
FACTS = ModelFacts(
    optimizer="SGD",
    lr=0.1,
    momentum=0.9,
    kinds={"0": "linear", "1": "sigmoid", "2": "linear", "3": "relu", "4": "linear"},
)


def finding(
    pathology: Pathology,
    where: str = "model",
    evidence: Mapping[str, float] | None = None,
    severity: Severity = Severity.WARNING,
    remedies: tuple[Remedy, ...] = (),
) -> Finding:
    message = f"Something is wrong in `{where}` at step 12."
    return Finding(pathology, severity, where, 12, evidence or {}, message, remedies)


def place_for(pathology: Pathology, layer: str, activation: str) -> str:
    if pathology in (Pathology.DEAD_UNITS, Pathology.SATURATED, Pathology.VANISHING_IN_TIME):
        return activation or "model"
    of_loss = (
        Pathology.LOSS_SPIKE,
        Pathology.DIVERGING,
        Pathology.OSCILLATING,
        Pathology.STAGNATING,
    )
    return "loss" if pathology in of_loss else layer or "model"


@cache
def trainer_with(*arguments: str) -> Trainer:
    settings = {name: value for name, _, value in (a.partition("=") for a in arguments)}
    return Trainer(accelerator="cpu", logger=False, callbacks=[GradGuard()], **settings)


def a_trainer(callbacks: Any = None, **settings: str) -> Trainer:
    """A real one, but the same for the same arguments, as there are hundreds of lines."""
    assert callbacks is None or isinstance(callbacks[0], GradGuard)
    return trainer_with(*(f"{name}={value}" for name, value in settings.items()))


def take_a_step(scope: dict[str, Any]) -> None:
    """Forward, backward and update with whatever the line has left in the scope."""
    scope["optimizer"].zero_grad()
    outputs = scope["model"](scope["inputs"])
    loss = nn.functional.cross_entropy(outputs, torch.zeros(len(outputs), dtype=torch.long))
    loss.backward()
    scope["optimizer"].step()
    assert torch.isfinite(loss)


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU.*")
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_every_line_runs_and_training_goes_on(name: str, optimizer: str) -> None:
    make, layer, activation = MODELS[name]
    for pathology, evidence in EVIDENCE:
        where = place_for(pathology, layer, activation)
        model = make()
        facts = model_facts(model, OPTIMIZERS[optimizer](model.parameters()))
        for number in range(len(remedies_for(finding(pathology, where, evidence), facts))):
            model = make()
            given = list(model.parameters())
            if evidence.get(Reason.NO_OPTIMIZER.value):
                mine = dict(model.named_parameters(prefix="")).items()
                given = [p for n, p in mine if layer and not n.startswith(f"{layer}.")]
                given = given or [nn.Parameter(torch.zeros(1))]
            remedy = remedies_for(finding(pathology, where, evidence), facts)[number]
            scope = {
                "torch": torch,
                "model": model,
                "optimizer": OPTIMIZERS[optimizer](given),
                "inputs": torch.randn(5, WIDTH),
                "batch": (torch.randn(5, WIDTH), torch.zeros(5)),
                "probability": torch.rand(5),
                "Trainer": a_trainer,
                "GradGuard": GradGuard,
            }
            if "enable_grad" in remedy.code and name == "images":
                continue  # its layer is not called with the inputs of the model
            if "requires_grad_(False)" in remedy.code and name == "linear":
                continue  # its layer is all that it has
            try:
                exec(compile(remedy.code, "remedy", "exec"), scope)
                take_a_step(scope)
            finally:
                torch.autograd.set_detect_anomaly(False)


@pytest.mark.parametrize("facts", [FACTS, ModelFacts()], ids=["known", "unknown"])
@pytest.mark.parametrize(("pathology", "evidence"), EVIDENCE)
@pytest.mark.parametrize("where", ["model", "loss", "3", "encoder.0"])
def test_sentences_read_well(
    pathology: Pathology, evidence: Mapping[str, float], where: str, facts: ModelFacts
) -> None:
    for severity in Severity:
        plain = finding(pathology, where, evidence, severity)
        told = with_remedies(plain, facts)
        assert 1 <= len(told.remedies) <= 3
        assert len(set(told.remedies)) == len(told.remedies)
        for remedy in told.remedies:
            assert re.fullmatch(r"[A-Z][^.]*\.", remedy.sentence), remedy.sentence
            compile(remedy.code, "remedy", "exec")
            assert "\n" not in remedy.code
            assert len(remedy.code) < 400
        assert not re.search(r"[.!?]\s", told.message), told.message
        assert told.message.endswith(told.remedies[0].sentence[1:])
        ask = "if it does harm, " if severity < Severity.WARNING else "to mend it, "
        assert f"; {ask}" in told.message
        assert without_remedy(told) == plain.message


def test_the_line_names_the_optimizer_that_is_there() -> None:
    def line(**facts: Any) -> str:
        return remedies_for(finding(Pathology.DIVERGING, "loss"), ModelFacts(**facts))[0].code

    assert line(optimizer="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4) == (
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, "
        "weight_decay=0.0001)"
    )
    # facts call Adam's first beta its momentum, but its constructor has no such argument
    assert line(optimizer="AdamW", lr=1e-3, momentum=0.9, weight_decay=0.01) == (
        "optimizer = torch.optim.AdamW(model.parameters(), lr=0.0001)"
    )
    in_place = 'for group in optimizer.param_groups: group["lr"] *= 0.1'
    for unknown in ({}, {"optimizer": "Lion", "lr": 1e-3}, {"optimizer": "SGD", "lr": 0.0}):
        assert line(**unknown) == in_place


def test_a_layer_gets_a_rate_of_its_own_and_no_parameter_is_lost() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 2)})
    facts = model_facts(model, torch.optim.SGD(model.parameters(), lr=0.1))
    evidence = {"update_ratio": 1.0, "median": 0.01}
    remedy = remedies_for(finding(Pathology.UPDATE_OUT_OF_RANGE, "a", evidence), facts)[0]
    scope: dict[str, Any] = {"torch": torch, "model": model}
    exec(remedy.code, scope)
    groups = scope["optimizer"].param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    expected = {0.01: list(model["a"].parameters()), 0.1: list(model["ab"].parameters())}
    assert rates == {id(p): pytest.approx(lr) for lr, ps in expected.items() for p in ps}


def test_what_is_there_already_is_not_proposed() -> None:
    def words(kinds: dict[str, str], pathology: Pathology, where: str) -> str:
        facts = ModelFacts(optimizer="SGD", lr=0.1, kinds=kinds)
        return " ".join(r.sentence for r in remedies_for(finding(pathology, where), facts))

    sigmoid = {"0": "linear", "1": "sigmoid", "2": "linear"}
    relu = {"0": "linear", "1": "relu", "2": "linear"}
    normed = {"0": "linear", "1": "batch_norm", "2": "sigmoid", "3": "linear"}
    recurrent = {"rnn": "lstm", "fc": "linear", "act": "tanh", "head": "linear"}
    depth = Pathology.VANISHING_IN_DEPTH
    assert "by ReLU" in words(sigmoid, depth, "0")
    assert "by ReLU" not in words(relu, depth, "0")
    assert "normalization" in words(relu, depth, "0")
    assert "normalization" not in words(normed, depth, "0")
    # batch normalization takes the time axis for the features
    assert "normalization" not in words(recurrent, depth, "fc")
    assert "leaky ReLU" in words(relu, Pathology.DEAD_UNITS, "1")
    assert "leaky ReLU" in words(relu, Pathology.DEAD_UNITS, "0")
    assert "leaky ReLU" not in words(sigmoid, Pathology.DEAD_UNITS, "1")
    assert "Standardize the inputs" in words(sigmoid, Pathology.SATURATED, "1")
    second = {**sigmoid, "3": "tanh", "4": "linear"}
    assert "Standardize the inputs" not in words(second, Pathology.SATURATED, "3")
    assert "orthogonal" in words(recurrent, Pathology.EXPLODING, "fc")
    assert "orthogonal" not in words(relu, Pathology.EXPLODING, "0")


def test_precision_decides_what_mends_an_underflow() -> None:
    def lines(precision: str) -> list[str]:
        facts = ModelFacts(precision=precision)
        return [r.code for r in remedies_for(finding(Pathology.UNDERFLOW), facts)]

    assert "bf16-mixed" in lines("16-true")[0]
    assert "16-mixed" in lines("16-true")[1]
    assert "32-true" in lines("bf16-true")[0]
    assert not any('"16-mixed"' in line for line in lines("16-mixed"))
    assert not any("Trainer" in line for line in lines("32-true"))


def test_an_output_activation_stays() -> None:
    model = Named()
    facts = model_facts(model, torch.optim.SGD(model.parameters(), lr=0.1))
    best = remedies_for(finding(Pathology.VANISHING_IN_DEPTH, "encoder"), facts)[0]
    exec(best.code, {"torch": torch, "model": model})
    assert isinstance(model.act, nn.ReLU)
    assert isinstance(model.out, nn.Sigmoid)


@pytest.mark.parametrize("layers", [2, 9], ids=["listed", "by class"])
def test_normalization_reaches_each_hidden_layer_and_no_other(layers: int) -> None:
    model = deep(nn.ReLU, layers)
    facts = model_facts(model, torch.optim.SGD(model.parameters(), lr=0.1))
    remedies = remedies_for(finding(Pathology.VANISHING_IN_DEPTH, "0"), facts)
    (remedy,) = [r for r in remedies if "batch normalization" in r.sentence]
    exec(remedy.code, {"torch": torch, "model": model})
    assert isinstance(model, nn.Sequential)
    assert [type(model[2 * n]).__name__ for n in range(layers + 1)] == [
        *["Sequential"] * layers,
        "Linear",
    ]


def test_skip_connections_add_the_input() -> None:
    model = deep(nn.ReLU, 5)
    facts = model_facts(model, torch.optim.SGD(model.parameters(), lr=0.1))
    remedies = remedies_for(finding(Pathology.VANISHING_IN_DEPTH, "0"), facts)
    (remedy,) = [r for r in remedies if "skip" in r.sentence]
    inputs = torch.randn(4, WIDTH)
    layer = model.get_submodule("0")
    before = layer(inputs)
    exec(remedy.code, {"torch": torch, "model": model})
    torch.testing.assert_close(layer(inputs), before + inputs)
    assert model(inputs).shape == (4, CLASSES)


def test_forgotten_parameters_reach_the_optimizer_once() -> None:
    model = deep(nn.ReLU, 2)
    facts = ModelFacts()
    for modules, where in ((1.0, "2"), (3.0, "2")):
        others = [p for n, p in model.named_parameters() if not n.startswith("2.")]
        optimizer = torch.optim.SGD(others, lr=0.1)
        evidence = {Reason.NO_OPTIMIZER.value: 1.0, "modules": modules}
        give, freeze = remedies_for(finding(Pathology.LAYER_NOT_TRAINING, where, evidence), facts)
        exec(freeze.code, {"model": model, "optimizer": optimizer})
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
        assert frozen == ["2.weight", "2.bias"]
        exec(give.code, {"model": model, "optimizer": optimizer})
        given = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(given) == sorted(id(p) for p in model.parameters())


def test_remedies_of_a_reading_through_time_are_kept() -> None:
    brought = (Remedy("Do as the reading says.", "pass"),)
    through_time = finding(
        Pathology.EXPLODING, "rnn", {"decay_rate": 0.2, "timesteps": 50.0}, remedies=brought
    )
    assert remedies_for(through_time, FACTS) == brought
    other = finding(Pathology.EXPLODING, "rnn", {"z": 9.0}, remedies=brought)
    assert remedies_for(other, FACTS) != brought


def test_a_run_far_above_the_usual_rate_is_not_told_to_go_faster() -> None:
    def best(optimizer: str, lr: float) -> str:
        facts = ModelFacts(optimizer=optimizer, lr=lr)
        slow = finding(Pathology.UPDATE_OUT_OF_RANGE, "model", {"latest": 100.0})
        ways = {
            remedies_for(found, facts)[0].sentence
            for found in (finding(Pathology.STAGNATING, "loss"), slow)
        }
        (way,) = ways
        return way

    assert best("AdamW", 1e-5).startswith("Raise")
    assert best("AdamW", 0.3).startswith("Lower")
    assert best("SGD", 0.3).startswith("Use AdamW")
    assert best("SGD", 30.0).startswith("Lower")


@pytest.mark.parametrize("reason", list(Reason))
def test_the_detector_names_the_reason_in_the_evidence(reason: Reason) -> None:
    evidence = {other.value: float(other is reason) for other in Reason}
    assert _reason(finding(Pathology.LAYER_NOT_TRAINING, "2", evidence)) is reason
    assert _reason(finding(Pathology.LAYER_NOT_TRAINING, "2")) is None


def test_each_reason_not_to_train_has_its_own_remedy() -> None:
    def line(reason: Reason) -> str:
        evidence = {reason.value: 1.0, "modules": 1.0}
        found = finding(Pathology.LAYER_NOT_TRAINING, "2", evidence)
        return remedies_for(found, FACTS)[0].code

    assert "add_param_group" in line(Reason.NO_OPTIMIZER)
    assert "enable_grad" in line(Reason.NO_GRAD)
    assert "enable_grad" in line(Reason.CUT_OFF)
    assert 'group["lr"] = group["lr"] or 0.1' in line(Reason.LR_ZERO)
    assert "LeakyReLU" in line(Reason.ZERO_GRADIENT)
    assert "requires_grad_(True)" in line(Reason.FROZEN)
    assert "32-true" in line(Reason.UNCHANGED)
