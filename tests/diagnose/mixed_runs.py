"""Runs that have everything at once: losses, norms, looks at the layers, readings through time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from lightning_gradguard.diagnose import (
    Detector,
    Finding,
    Observation,
    default_detectors,
    layer_detectors,
    time_detectors,
)
from lightning_gradguard.readings import (
    ActivationReading,
    Inspection,
    ModelFacts,
    NonFiniteOrigin,
    ParameterReading,
    TimeReading,
)
from tests.diagnose.layer_runs import is_inspected, layer, learning, relu, tanh
from tests.diagnose.time_runs import CAUSES, reading
from tests.diagnose.traces import (
    FLAT,
    HEALTHY,
    SWINGING,
    Trace,
    explosion,
    lasting_spike,
    slow_divergence,
)

Run = list[Observation]
NAN = math.nan
KINDS: list[Callable[[], Detector]] = [
    type(d) for d in (*default_detectors(), *layer_detectors(), *time_detectors())
]

# One of everything that can be odd about a layer.
ODDITIES: list[dict[str, Any]] = [
    {},
    {},
    {"in_optimizer": False, "update_ratio": NAN},
    {"grad_norm": NAN, "update_ratio": 0.0, "zero_share": NAN, "tiny_share": NAN},
    {"grad_norm": NAN, "used": False, "used_without_grad": True},
    {"grad_norm": NAN, "used": None},
    {"requires_grad": False, "grad_norm": NAN, "update_ratio": NAN},
    {"update_ratio": 0.0},
    {"update_ratio": 0.0, "lr": 0.0},
    {"grad_norm": 0.0, "zero_share": 1.0, "dead_rows": 1.0, "update_ratio": 0.0},
    {"grad_norm": 1e-6},
    {"update_ratio": 1e-7},
    {"update_ratio": 5.0},
    {"zero_share": 0.3, "tiny_share": 0.5},
    {"dead_rows": 0.8},
]


def odd_look(rng: random.Random, turned: bool = False) -> Inspection:
    """Layers with one oddity each, and some activations."""
    mood = rng.choice([{}, {}, {"update_ratio": 0.4}, {"update_ratio": 1e-8}])
    layers = [layer(f"net.{i}", **{**mood, **rng.choice(ODDITIES)}) for i in range(6)]
    activations = []
    if rng.random() < 0.7:
        activations = [relu(rng.choice([0.0, 0.3, 0.8, 0.99]), f"act.{i}") for i in range(2)]
        activations += [tanh(rng.choice([0.0, 0.3, 0.6, 0.99]), f"gate.{i}") for i in range(2)]
    slope, error = rng.choice([(NAN, NAN), (-0.1, 0.05), (-2.0, 0.2), (-2.0, 1.5)])
    return Inspection(
        0,
        tuple(reading for one in (layers[::-1] if turned else layers) for reading in one),
        tuple(activations[::-1] if turned else activations),
        depth_slope=slope,
        depth_error=error,
        depth_layers=6,
    )


def parts(rng: random.Random, modules: int) -> list[TimeReading]:
    """Readings of some modules, each vanishing, exploding or healthy."""
    return [
        reading(
            rng.choice([-0.9, -0.44, -0.02, 0.0, 0.02, 0.12]) * rng.uniform(0.9, 1.1),
            module=f"encoder.{i}" if i % 2 else f"rnn{i}",
            part=rng.choice(["l0", "l1", "l0_reverse"]),
            kind=rng.choice(list(CAUSES)),
            decay_error=rng.choice([0.005, 0.02, math.nan]),
            timesteps=rng.choice([5, 60, 120, 784]),
        )
        for i in range(modules)
    ]


def eventful_trace(seed: int, n: int = 700) -> Trace:
    """A run with a good part and then one of everything that can go wrong."""
    rng = random.Random(seed)
    makes = [*HEALTHY.values(), *FLAT.values(), *SWINGING.values()]
    healthy = rng.choice(makes)(rng, n)[: rng.randrange(n)]
    bad = rng.choice([explosion, lasting_spike, slow_divergence])(rng, rng.randrange(2, 200))
    holes = [(math.nan, 1.0), (1.0, math.inf), (0.0, 0.0)]
    trace = healthy + bad[:400]
    for _ in range(3):
        trace[rng.randrange(len(trace))] = rng.choice(holes)
    return trace


def _plain_trace(rng: random.Random, n: int) -> Trace:
    """A loss that falls or does not, and then stands at another level."""
    change, later = rng.randrange(n), rng.choice([2.3, 5.0, 0.5])
    before = rng.choice([learning, lambda _: 2.3])
    return [
        ((before(s) if s < change else later) + rng.gauss(0, 0.03), math.exp(rng.gauss(0, 0.2)))
        for s in range(n)
    ]


def mixed(seed: int) -> Run:
    """A run in which anything may be odd, from the start or from some step on."""
    rng = random.Random(seed)
    trace = rng.choice([eventful_trace(seed), _plain_trace(rng, 500)])
    change, turns = rng.randrange(len(trace)), {rng.randrange(len(trace)) for _ in range(2)}
    looks, readings = [odd_look(rng), odd_look(rng)], [parts(rng, 4), parts(rng, 4)]
    every, model = rng.choice([10, 50]), rng.choice(MODELS)
    model = replace(model, planned_steps=rng.choice([None, len(trace)]))
    origins = [None, NonFiniteOrigin("batch", "0", sample=3), NonFiniteOrigin("forward", "rnn0", 5)]
    norms = {f"net.{i}.weight": rng.choice([1.0, 30.0, NAN]) for i in range(6)}
    steps = []
    for step, (loss, norm) in enumerate(trace):
        seen = looks[step >= change]
        finite = math.isfinite(loss) and math.isfinite(norm)
        steps.append(
            Observation(
                step,
                loss,
                norm,
                norms=norms if not math.isfinite(norm) else None,
                time=tuple(readings[step >= change]) if step % 10 == 0 else (),
                inspection=replace(seen, step=step) if is_inspected(step, every) else None,
                lr=1e-3,
                new_phase=step in turns,
                origin=None if finite else rng.choice(origins),
                model=model,
            )
        )
    return steps


# As of a small model, in which `act.*` is nearly everything that a finding can be about.
_KINDS = {
    **{f"net.{i}": "linear" for i in range(6)},
    **{f"act.{i}": "relu" for i in range(2)},
    **{f"gate.{i}": "tanh" for i in range(2)},
    **{f"rnn{i}": kind for i, kind in ((0, "lstm"), (2, "gru"))},
    "encoder.1": "rnn",
    "encoder.3": "lstm",
}
MODELS = [
    ModelFacts(),
    ModelFacts("AdamW", 1e-3, 0.9, 0.01, _KINDS, dict.fromkeys(_KINDS, True), "16-mixed", True),
    ModelFacts("SGD", 0.1, 0.9, 0.0, _KINDS, dict.fromkeys(_KINDS, True), "32-true"),
    ModelFacts("Adam", 1e-2, 0.9, 0.0, {**_KINDS, "norm": "batch_norm"}, precision="16-true"),
    ModelFacts("RMSprop", math.nan, kinds=dict(reversed(_KINDS.items())), precision="bf16-true"),
]


def diagnose(steps: Iterable[Observation], *detectors: Detector) -> list[Finding]:
    return [f for step in steps for d in detectors for f in d.observe(step)]


def scaled(steps: Run, c: float, *, layers: bool = True) -> Run:
    """What the same run looks like with `c` times the loss, under an optimizer as Adam is."""
    return [
        replace(
            step,
            loss=None if step.loss is None else c * step.loss,
            total_norm=c * step.total_norm,
            norms=step.norms and {name: c * norm for name, norm in step.norms.items()},
            inspection=step.inspection and _with_gradients(step.inspection, c if layers else 1.0),
        )
        for step in steps
    ]


def _with_gradients(inspection: Inspection, c: float) -> Inspection:
    readings = (replace(r, grad_norm=c * r.grad_norm) for r in inspection.parameters)
    return replace(inspection, parameters=tuple(readings))


def renamed(steps: Run, name: Callable[[str], str]) -> Iterator[Observation]:
    """The same run with other names for the modules."""
    for step in steps:
        look = step.inspection
        yield replace(
            step,
            norms=step.norms and {name(k): norm for k, norm in step.norms.items()},
            time=tuple(replace(r, module=name(r.module)) for r in step.time),
            inspection=look
            and replace(
                look,
                parameters=tuple(replace(r, name=name(r.name)) for r in look.parameters),
                activations=tuple(replace(r, module=name(r.module)) for r in look.activations),
            ),
            origin=step.origin and replace(step.origin, module=name(step.origin.module)),
        )


# ---- whatever a detector might be given ---------------------------------------------------------

NUMBERS = st.floats() | st.floats(0, 1) | st.sampled_from([0.0, 1.0, 1e-8, NAN])
PARAMETERS = st.builds(
    ParameterReading,
    name=st.sampled_from(["weight", "a.weight", "a.bias", "a.b.weight", "class.0.w", "c.weight"]),
    elements=st.integers(0, 10_000),
    dims=st.integers(0, 4),
    requires_grad=st.booleans(),
    in_optimizer=st.booleans(),
    used=st.sampled_from([True, False, None]),
    used_without_grad=st.booleans(),
    grad_norm=NUMBERS,
    weight_norm=NUMBERS,
    update_ratio=NUMBERS,
    lr=NUMBERS,
    zero_share=NUMBERS,
    tiny_share=NUMBERS,
    dead_rows=NUMBERS,
)
ACTIVATIONS = st.builds(
    ActivationReading,
    module=st.sampled_from(["", "act", "a.b"]),
    kind=st.sampled_from(["relu", "tanh"]),
    units=st.integers(0, 100),
    examples=st.integers(0, 1000),
    dead=NUMBERS,
    inactive=NUMBERS,
    saturated=NUMBERS,
)
INSPECTIONS = st.builds(
    Inspection,
    step=st.just(0),
    parameters=st.lists(PARAMETERS, max_size=5, unique_by=lambda r: r.name).map(tuple),
    activations=st.lists(ACTIVATIONS, max_size=2, unique_by=lambda r: r.module).map(tuple),
    depth_slope=NUMBERS,
    depth_error=NUMBERS,
    depth_layers=st.integers(0, 50),
)
READINGS = st.builds(
    TimeReading,
    module=st.sampled_from(["", "rnn", "layers.0", "class"]),
    part=st.sampled_from(["", "l0", "l3_reverse"]),
    source=st.sampled_from(["exact", "input", "output"]),
    kind=st.sampled_from(list(CAUSES)),
    timesteps=st.integers(0, 100_000),
    decay_rate=st.floats() | st.floats(-5, 5),
    decay_error=st.floats(),
    recency=st.floats(),
    causes=st.dictionaries(st.sampled_from(["forget_gate", "spectral_radius"]), st.floats()),
)
LOSSES = st.none() | st.floats() | st.sampled_from([0.0, 1.0])
NORMS = st.floats(min_value=0.0) | st.just(NAN) | st.sampled_from([0.0, 1.0])
OBSERVATIONS = st.builds(
    Observation,
    step=st.just(0),
    loss=LOSSES,
    total_norm=NORMS,
    norms=st.none() | st.dictionaries(st.sampled_from(["weight", "a.weight"]), NORMS),
    time=st.lists(READINGS, max_size=2).map(tuple),
    inspection=st.none() | INSPECTIONS,
    lr=NUMBERS,
    new_phase=st.booleans(),
    origin=st.none()
    | st.builds(
        NonFiniteOrigin,
        place=st.sampled_from(["batch", "weights", "forward", "loss", "backward"]),
        module=st.sampled_from(["", "a", "0"]),
        timestep=st.none() | st.integers(0, 9),
        sample=st.none() | st.integers(0, 9),
    ),
    model=st.builds(
        ModelFacts,
        precision=st.sampled_from(["", "16-true"]),
        planned_steps=st.none() | st.integers(0, 500),
    ),
)


@st.composite
def anything(draw: st.DrawFn) -> Run:
    """A few observations, each of which is there for a while."""
    steps: Run = []
    step = 0
    entries = st.tuples(OBSERVATIONS, st.integers(1, 20), st.integers(0, 40))
    for observation, times, gap in draw(st.lists(entries, max_size=8)):
        for _ in range(times):
            step += gap
            look = observation.inspection
            steps.append(
                replace(observation, step=step, inspection=look and replace(look, step=step))
            )
    return steps
