"""What users type is checked where they type it."""

from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from lightning_gradguard import GradGuard, GuardEngine
from lightning_gradguard.respond import (
    AGC,
    AdaptiveClip,
    NormClip,
    PercentileClip,
    ValueClip,
    ZScoreClip,
)

WITH_SCOPE = (AdaptiveClip, NormClip, PercentileClip, ZScoreClip, AGC)
STRATEGIES: list[Any] = [*(cls() for cls in WITH_SCOPE), ValueClip(0.5)]


@pytest.mark.parametrize("cls", WITH_SCOPE)
@pytest.mark.parametrize("scope", ["module", "", None, 1])
def test_an_unknown_scope_is_refused_with_what_is_allowed(cls: Any, scope: Any) -> None:
    allowed = "'unit', 'global'" if cls is AGC else "'global'"
    message = f"scope must be one of {allowed}, 'group', 'layer', got {scope!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        cls(scope=scope)


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (AdaptiveClip, "multiple", 0.0),
        (NormClip, "max_norm", 0.0),
        (NormClip, "max_norm", math.nan),
        (ValueClip, "max_value", 0.0),
        (ValueClip, "max_value", -1.0),
        (AGC, "clip_factor", 0.0),
        (AGC, "eps", 0.0),
        (PercentileClip, "percentile", 0.0),
        (PercentileClip, "percentile", 100.1),
        (PercentileClip, "window", 0),
        (ZScoreClip, "z", 0.0),
        (ZScoreClip, "alpha", 0.0),
        (ZScoreClip, "alpha", 1.0),
        (ZScoreClip, "warmup_steps", 1),
    ],
)
def test_values_out_of_range(cls: Any, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {re.escape(repr(value))}"):
        cls(**{name: value})
    with pytest.raises(TypeError, match=rf"{name} must be .*, got '1'"):
        cls(**{name: "1"})


@pytest.mark.parametrize("exclude", ["head.*", [1], None, 1])
def test_exclude_is_a_sequence_of_patterns(exclude: Any) -> None:
    with pytest.raises(TypeError, match=r"exclude must be a tuple of names or patterns, got"):
        AGC(exclude=exclude)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
def test_settings_are_values(strategy: Any) -> None:
    assert type(strategy)(**vars(strategy)) == strategy
    assert hash(strategy) == hash(type(strategy)(**vars(strategy)))
    with pytest.raises(FrozenInstanceError):
        setattr(strategy, next(iter(vars(strategy))), 1)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
def test_guards_take_every_strategy(strategy: Any) -> None:
    model = torch.nn.Linear(2, 1)
    engine = GuardEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), clip=strategy)
    engine.close()
    assert GradGuard(clip=strategy).clip is strategy


@pytest.mark.parametrize("clip", [1.0, "norm", NormClip, {"max_norm": 1.0}])
def test_anything_else_is_refused_with_the_names_of_all(clip: Any) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = "AdaptiveClip, NormClip, ValueClip, AGC, PercentileClip, ZScoreClip or None"
    message = re.escape(f"clip must be an {names}, got {clip!r}")
    with pytest.raises(TypeError, match=message):
        GradGuard(clip=clip)
    with pytest.raises(TypeError, match=message):
        GuardEngine(model, optimizer, clip=clip)
