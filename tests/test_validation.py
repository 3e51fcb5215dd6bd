"""A bad argument is refused where it is given, with its name, its value and what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard import GradGuard, GradientMonitor, GuardEngine
from lightning_gradguard._validation import check_choice, check_number, check_type
from lightning_gradguard.diagnose import Thresholds
from lightning_gradguard.incidents import Incidents
from lightning_gradguard.measure.readback import DelayedRead
from lightning_gradguard.measure.updates import UpdateSampler
from lightning_gradguard.record import Recorder
from lightning_gradguard.respond import (
    AdaptiveClip,
    LayerBoost,
    LearningRateBackoff,
    NormClip,
    PercentileClip,
    SkipBadSteps,
    UpdateCap,
    VanishingRegularizer,
    WeightRollback,
    ZScoreClip,
)

SETTINGS = (
    AdaptiveClip,
    Incidents,
    LayerBoost,
    LearningRateBackoff,
    NormClip,
    PercentileClip,
    SkipBadSteps,
    UpdateCap,
    Thresholds,
    WeightRollback,
    ZScoreClip,
)
# A choice of words has no range; see respond/test_clipping_settings.py.
ARGUMENTS = [(cls, f.name, f.type) for cls in SETTINGS for f in fields(cls) if f.name != "scope"]
MODEL = torch.nn.Linear(2, 1)


def engine(**arguments: Any) -> GuardEngine:
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.1)
    return GuardEngine(**{"model": MODEL, "optimizer": optimizer, **arguments})


def ids(value: Any) -> str | None:
    return getattr(value, "__name__", None) or (value if isinstance(value, str) else None)


def refuses(make: Callable[..., Any], name: str, value: Any, error: type[Exception]) -> None:
    """The message reads "<name> must be <allowed>, got <value>"."""
    with pytest.raises(error, match=rf"{name} must be .+, got {re.escape(repr(value))}"):
        make(**{name: value})


@pytest.mark.parametrize(("cls", "name", "kind"), ARGUMENTS, ids=ids)
def test_wrong_types(cls: Any, name: str, kind: str) -> None:
    wrong: list[Any] = ["1", [1], 1j, True if kind != "bool" else 1]
    for value in wrong if "None" in kind else [*wrong, None]:
        refuses(cls, name, value, TypeError)
    if kind == "int":
        refuses(cls, name, 3.0, TypeError)


@pytest.mark.parametrize(
    ("cls", "name"), [(c, n) for c, n, kind in ARGUMENTS if kind != "bool"], ids=ids
)
def test_values_that_no_setting_may_have(cls: Any, name: str) -> None:
    refuses(cls, name, -1, ValueError)
    if not isinstance(getattr(cls(), name), int):
        refuses(cls, name, math.nan, ValueError)
        refuses(cls, name, -math.inf, ValueError)


OUT_OF_RANGE: list[tuple[Any, str, Any]] = [
    (AdaptiveClip, "multiple", 0.0),
    (LearningRateBackoff, "factor", 0.0),
    (LearningRateBackoff, "factor", 1.0),
    (LearningRateBackoff, "min_scale", 0.0),
    (LearningRateBackoff, "min_scale", 1.001),
    (LearningRateBackoff, "recovery_steps", 0),
    (SkipBadSteps, "outlier_factor", 1.0),
    (SkipBadSteps, "max_consecutive", 0),
    (UpdateCap, "max_ratio", 0.0),
    (UpdateCap, "start_ratio", 0.0),
    (UpdateCap, "min_ratio", 0.0),
    (UpdateCap, "window", 1),
    (UpdateCap, "tighten", 1.0),
    (UpdateCap, "loosen", 1.0),
    (WeightRollback, "every_n_steps", 0),
    (WeightRollback, "max_rollbacks", 0),
    (WeightRollback, "max_bytes", 0),
    (LayerBoost, "max_boost", 1.0),
    (LayerBoost, "max_change", math.inf),
    (VanishingRegularizer, "weight", -1.0),
    (VanishingRegularizer, "every_n_steps", 0),
    (Incidents, "max_count", 0),
    (GradGuard, "mode", "guard"),
    (GradGuard, "layer_depth", 0),
    (GradientMonitor, "layer_depth", 0),
    (engine, "mode", "guard"),
    (engine, "planned_steps", 0),
    (engine, "optimizers", 0),
    (engine, "exact_every_n_steps", 0),
    (DelayedRead, "delay", -1),
    (lambda samples: UpdateSampler([], samples), "samples", 0),
    (lambda max_rows: Recorder(max_rows=max_rows), "max_rows", 0),
]


@pytest.mark.parametrize(("make", "name", "value"), OUT_OF_RANGE, ids=ids)
def test_values_out_of_range(make: Any, name: str, value: Any) -> None:
    refuses(make, name, value, ValueError)


WRONG_TYPE: list[tuple[Any, str, Any]] = [
    *((make, name, 1.0) for make in (GradGuard, engine) for name in ("clip", "cap", "skip")),
    *((make, "backoff", True) for make in (GradGuard, engine)),
    *((make, "rollback", True) for make in (GradGuard, engine)),
    *((make, "clip", name) for make in (GradGuard, engine) for name in ("agc", "AdaptiveClip")),
    *((make, "vanishing", LayerBoost()) for make in (GradGuard, engine)),
    *((make, "boost", 2.0) for make in (GradGuard, engine)),
    *((make, "thresholds", {}) for make in (GradGuard, GradientMonitor, engine)),
    *((make, "events", 1) for make in (GradGuard, GradientMonitor)),
    *((make, "layer_depth", "1") for make in (GradGuard, GradientMonitor)),
    (engine, "model", []),
    (engine, "optimizer", 0.1),
    (engine, "recorder", print),
    (DelayedRead, "delay", 1.0),
    (lambda samples: UpdateSampler([], samples), "samples", "64"),
    (lambda max_rows: Recorder(max_rows=max_rows), "max_rows", 1.5),
]


@pytest.mark.parametrize("make", [GradGuard, engine], ids=ids)
@pytest.mark.parametrize(
    ("name", "response"),
    [
        ("clip", NormClip(1.0)),
        ("cap", UpdateCap(0.02)),
        ("skip", SkipBadSteps(max_consecutive=3)),
        ("backoff", LearningRateBackoff(factor=0.1)),
        ("rollback", WeightRollback(max_rollbacks=1)),
        ("vanishing", VanishingRegularizer()),
        ("boost", LayerBoost()),
    ],
)
def test_who_only_observes_asks_for_no_response(make: Any, name: str, response: Any) -> None:
    message = rf"^{name} must be left out with mode='observe', .+, got {re.escape(repr(response))}$"
    with pytest.raises(ValueError, match=message):
        make(mode="observe", **{name: response})
    make(mode="observe", **{name: None})


@pytest.mark.parametrize(("make", "name", "value"), WRONG_TYPE, ids=ids)
def test_arguments_of_the_wrong_type(make: Any, name: str, value: Any) -> None:
    refuses(make, name, value, TypeError)


@pytest.mark.parametrize("cls", SETTINGS, ids=ids)
def test_the_defaults_are_allowed_and_frozen(cls: Any) -> None:
    settings = cls()
    assert cls(**vars(settings)) == settings
    with pytest.raises(AttributeError):
        setattr(settings, fields(cls)[0].name, 1)


@pytest.mark.parametrize("name", [f.name for f in fields(UpdateCap) if "ratio" in f.name])
def test_bounds_of_the_cap_are_in_order(name: str) -> None:
    for cap in (UpdateCap(), UpdateCap(max_ratio=0.002), UpdateCap(start_ratio=0.001)):
        assert 0.0 < cap.least_ratio <= cap.first_ratio <= cap.widest_ratio <= cap.max_ratio
    bounds = {"max_ratio": 0.05, "wide_ratio": 0.04, "start_ratio": 0.02, "min_ratio": 0.01}
    wrong = {"max_ratio": 0.005, "wide_ratio": 0.06, "start_ratio": 0.05, "min_ratio": 0.1}
    with pytest.raises(ValueError, match=r"must be .+, got"):
        UpdateCap(**{**bounds, name: wrong[name]})


def test_an_optimizer_that_cannot_be_guarded() -> None:
    with pytest.raises(ValueError, match=r"optimizer must .*, got LBFGS"):
        engine(optimizer=torch.optim.LBFGS(MODEL.parameters()))


NUMBER = st.floats(-100, 100)


@given(value=st.floats(allow_nan=True), low=NUMBER, high=NUMBER)
def test_check_number_is_the_comparison_it_states(value: float, low: float, high: float) -> None:
    for limits, allowed in (
        ({"at_least": low, "at_most": high}, low <= value <= high),
        ({"above": low, "below": high}, low < value < high),
        ({}, not math.isnan(value)),
    ):
        if allowed:
            check_number("x", value, **limits)
        else:
            with pytest.raises(ValueError, match="x must be a number"):
                check_number("x", value, **limits)


def test_numbers_of_other_libraries() -> None:
    np = pytest.importorskip("numpy")
    check_number("x", np.float64(1.0), above=0.0)
    check_number("x", np.float32(1.0), above=0.0)
    with pytest.raises(TypeError, match="x must be a number"):
        check_number("x", torch.tensor(1.0), above=0.0)


def test_check_choice_and_check_type() -> None:
    check_choice("mode", "a", ("a", "b"))
    with pytest.raises(ValueError, match=r"mode must be one of 'a', 'b', got \['a'\]"):
        check_choice("mode", ["a"], ("a", "b"))
    check_type("x", 1, int, "an integer")
    with pytest.raises(TypeError, match="x must be an integer, got '1'"):
        check_type("x", "1", int, "an integer")
