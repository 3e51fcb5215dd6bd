"""Ways back through time that do not go through one layer's recurrence alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard.diagnose import (
    Finding,
    Observation,
    Pathology,
    Severity,
    VanishingInTimeDetector,
)
from lightning_gradguard.diagnose.time_ways import steps_to_bridge
from lightning_gradguard.measure import TimestepProbe
from lightning_gradguard.measure.model_facts import model_facts
from lightning_gradguard.nn import DilatedRNN, TemporalAttention
from lightning_gradguard.readings import ModelFacts, TimeReading
from tests.diagnose.time_runs import diagnose, reading, run, severities, stuck

ATTENDING = ModelFacts(kinds={"rnn": "rnn", "pool": "attention", "head": "linear"})
PLAIN = ModelFacts(kinds={"rnn": "rnn", "head": "linear"})
EVEN = (1.0 / 120.0,) * 120
LAST = (0.0,) * 119 + (1.0,)


def told(model: ModelFacts, readings: Sequence[TimeReading], n: int = 400) -> list[Finding]:
    """Of a run that learns nothing, with these readings all the time."""
    return diagnose(replace(s, model=model) for s in run(lambda _: readings, stuck(), n))


# ---- attention ----------------------------------------------------------------------------------


def test_what_attention_reaches_directly_needs_no_recurrence() -> None:
    short = reading(-0.44, entry=EVEN)
    assert told(ATTENDING, [short]) == []
    assert severities(told(PLAIN, [short])) == [Severity.WARNING]  # a loss at each timestep


def test_attention_that_reads_only_the_end_gives_no_way_back() -> None:
    for entry in (LAST, (), (*(0.0,) * 100, *(0.05,) * 20)):
        findings = told(ATTENDING, [reading(-0.44, entry=entry)])
        assert severities(findings) == [Severity.WARNING]


def test_an_explosion_is_one_whatever_reads_the_states() -> None:
    findings = told(ATTENDING, [reading(0.12, entry=EVEN)])
    assert {f.pathology for f in findings} == {Pathology.EXPLODING}
    assert severities(findings)[-1] == Severity.WARNING


@pytest.mark.parametrize(
    ("entry", "part", "steps"),
    [
        ((0.2, 0.2, 0.2, 0.4), "l0", 0),
        ((0.0, 0.2, 0.4, 0.4), "l0", 30),
        ((0.0, 0.2, 0.4, 0.4), "l0_reverse", 0),
        ((0.6, 0.4, 0.0, 0.0), "l1_reverse", 60),
        ((0.6e-6, 0.0, 0.4, 0.6), "l0", 0),  # a thousandth in norm
        ((0.5e-6, 0.0, 0.4, 0.6), "l0", 60),
        ((0.0, 0.0, 0.0, 0.0), "l0", 0),  # no gradient at all, and then no rate either
        ((), "l0", 120),
    ],
)
def test_the_first_timestep_that_is_reached_ends_the_way(
    entry: tuple[float, ...], part: str, steps: int
) -> None:
    one = reading(-0.44, entry=entry, part=part)
    assert steps_to_bridge(one, ATTENDING) == steps
    assert steps_to_bridge(one, PLAIN) == 120


class Attending(nn.Module):
    def __init__(self, score: str | None) -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 16, batch_first=True)
        self.pool = TemporalAttention(16, score, batch_first=True) if score else None  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        states = self.rnn(x)[0]
        return states[:, -1] if self.pool is None else self.pool(states)[0]


@pytest.mark.parametrize("score", [None, "additive", "dot", "multihead"])
def test_measured_attention_is_seen_as_such(score: str | None) -> None:
    torch.manual_seed(0)
    model = Attending(score)
    facts = model_facts(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with TimestepProbe(model, ["rnn"]) as probe:
        model(torch.randn(16, 60, 4)).square().sum().backward()
        (one,) = probe.measure()
    assert one.horizon < 20.0
    found = told(facts, [one])
    assert severities(found) == ([] if score else [Severity.WARNING])


# ---- dilated stacks -----------------------------------------------------------------------------

STACK = ModelFacts(kinds={"rnn": "dilated", "rnn.layers.0": "lstm", "rnn.layers.1": "lstm"})


def layers(*rates: float, ways: str = "layers", stack: str = "rnn") -> list[TimeReading]:
    prefix = f"{stack}." if stack else ""
    return [
        reading(rate, module=f"{prefix}{ways}.{number}", timesteps=120 - number)
        for number, rate in enumerate(rates)
    ]


@pytest.mark.parametrize("rates", [(-0.44, -0.22, -0.01), (-0.01, -0.44, -0.44)])
def test_one_layer_with_a_long_way_is_enough_for_a_stack(rates: tuple[float, ...]) -> None:
    assert told(STACK, layers(*rates)) == []
    alone = told(PLAIN, layers(*rates))
    assert {f.severity for f in alone} == {Severity.WARNING}
    assert len(alone) == 2


def test_a_stack_whose_layers_all_lose_it_is_found_once_as_a_whole() -> None:
    findings = told(STACK, layers(-0.66, -0.44))
    (finding,) = findings
    assert (finding.severity, finding.where) == (Severity.WARNING, "rnn")
    assert finding.message.startswith(
        "The gradient vanishes through time in `rnn` (all layers): it halves every 1.6 steps and "
        "reaches 16 of 120 steps, as follows from a mean forget gate of 0.52"
    )
    assert finding.evidence["decay_rate"] == -0.44


def test_each_direction_of_a_stack_is_judged_by_itself() -> None:
    both = [*layers(-0.44, -0.01), *layers(-0.66, -0.44, ways="layers_reverse")]
    (finding,) = told(STACK, both)
    assert "`rnn` (all layers, reverse direction)" in finding.message
    detector = VanishingInTimeDetector()
    for step in run(lambda _: both, stuck(), 200):
        detector.observe(replace(step, model=STACK))
    assert detector.is_open("rnn")
    assert not detector.is_open("rnn.layers_reverse.0")


def test_the_model_itself_can_be_a_stack() -> None:
    facts = ModelFacts(kinds={"": "dilated", "layers.0": "lstm", "layers.1": "lstm"})
    assert told(facts, layers(-0.44, -0.01, stack="")) == []
    (finding,) = told(facts, layers(-0.44, -0.44, stack=""))
    assert finding.where == "model"
    assert "in the model (all layers)" in finding.message


def test_of_a_stack_that_was_read_in_part_nothing_is_said() -> None:
    unknown = reading(float("nan"), module="rnn.layers.2", note="too long")
    assert told(STACK, [*layers(-0.66, -0.44), unknown]) == []


def test_layers_of_something_else_stay_apart() -> None:
    found = told(STACK, [*layers(-0.44, -0.01, stack="other"), *layers(-0.44, -0.01)])
    assert [f.where for f in found] == ["other.layers.0"]


def test_a_layer_of_a_stack_that_explodes_is_found() -> None:
    findings = told(STACK, layers(-0.44, 0.12))
    assert {(f.pathology, f.where) for f in findings} == {(Pathology.EXPLODING, "rnn")}
    assert severities(findings)[-1] == Severity.WARNING


@pytest.mark.parametrize(("depth", "found"), [(1, True), (5, False)])
def test_a_measured_stack_vanishes_only_if_it_is_shallow(depth: int, found: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": DilatedRNN(4, 16, depth, cell="rnn")})
    facts = model_facts(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with TimestepProbe(model) as probe:
        model["rnn"](torch.randn(60, 16, 4))[0][-1].square().sum().backward()
        readings = probe.measure()
    assert any(one.horizon < 20.0 for one in readings)
    steps = [Observation(s, 1.0, 1.0, None, tuple(readings), model=facts) for s in (0, 50, 100)]
    between = [Observation(s, 1.0, 1.0, None, model=facts) for s in range(400)]
    for step in steps:
        between[step.step] = step
    detector = VanishingInTimeDetector()
    findings = [f for step in between for f in detector.observe(step)]
    assert bool(findings) == found
