"""Callbacks that do one thing: alone, together, and as arguments of GradGuard."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

import lightning_gradguard as library
from lightning_gradguard import (
    AdaptiveGradientClipping,
    GradGuard,
    GradientAlert,
    GradientMonitor,
    LearningRateBackoff,
    SkipBadSteps,
    UpdateCap,
    WeightRollback,
    respond,
)
from lightning_gradguard.callbacks.single import SingleResponse
from tests.models import (
    Regression,
    adamw,
    assert_same_bits,
    loader,
    make_batches,
    plain_loop,
    quiet_trainer,
)

BATCHES = make_batches(30, poisoned=[12])


def fit(tmp_path: Path, *callbacks: Callback) -> Regression:
    model = Regression(adamw)
    quiet_trainer(tmp_path, *callbacks).fit(model, loader(BATCHES))
    return model


def weights(model: Regression) -> Any:
    return model.state_dict()


MAKERS = [
    lambda: AdaptiveGradientClipping(respond.NormClip(0.01)),
    lambda: UpdateCap(max_ratio=1e-3),
    SkipBadSteps,
    LearningRateBackoff,
    WeightRollback,
]
EQUALS: list[dict[str, Any]] = [
    {"clip": respond.NormClip(0.01)},
    {"cap": respond.UpdateCap(max_ratio=1e-3)},
    {"skip": respond.SkipBadSteps()},
    {"backoff": respond.LearningRateBackoff()},
    {"rollback": respond.WeightRollback()},
]
NOTHING: dict[str, Any] = dict.fromkeys(("clip", "cap", "skip", "backoff", "rollback"))


@pytest.mark.parametrize(
    ("make", "asked"), list(zip(MAKERS, EQUALS, strict=True)), ids=[next(iter(e)) for e in EQUALS]
)
def test_alone_it_is_a_guard_with_that_response_only(
    tmp_path: Path, make: Any, asked: dict[str, Any]
) -> None:
    alone = fit(tmp_path / "alone", make())
    guard = fit(tmp_path / "guard", GradGuard(**{**NOTHING, **asked}))
    assert_same_bits(weights(alone), weights(guard))


def test_together_they_are_the_guard_in_any_order(tmp_path: Path) -> None:
    skips = [
        lambda: SkipBadSteps(outlier_factor=100.0),
        lambda: AdaptiveGradientClipping(respond.NormClip(0.05)),
        lambda: UpdateCap(max_ratio=0.01),
    ]
    expected = fit(
        tmp_path,
        GradGuard(
            skip=respond.SkipBadSteps(outlier_factor=100.0),
            clip=respond.NormClip(0.05),
            cap=respond.UpdateCap(max_ratio=0.01),
            backoff=None,
            rollback=None,
        ),
    )
    for number, order in enumerate(itertools.permutations(skips)):
        callbacks = [make() for make in order]
        model = fit(tmp_path / str(number), *callbacks)
        assert_same_bits(weights(model), weights(expected))
        engines = {id(engine) for callback in callbacks for engine in callback.engines}
        assert len(engines) == 1  # gradients are measured once
        assert all(callback.counts["skipped_steps"] == 1 for callback in callbacks)


@pytest.mark.parametrize("first", [True, False])
def test_beside_a_monitor_it_still_responds(tmp_path: Path, first: bool) -> None:
    monitor, skip = GradientMonitor(layer_depth=1), SkipBadSteps()
    fit(tmp_path, *((skip, monitor) if first else (monitor, skip)))
    assert monitor.counts["skipped_steps"] == 1
    assert monitor.engines == skip.engines


@pytest.mark.parametrize("first", [True, False])
def test_it_takes_the_place_of_a_default_of_the_guard(tmp_path: Path, first: bool) -> None:
    guard, cap = GradGuard(), UpdateCap(max_ratio=1e-3)
    model = fit(tmp_path / "both", *((cap, guard) if first else (guard, cap)))
    expected = fit(tmp_path / "one", GradGuard(cap=respond.UpdateCap(max_ratio=1e-3)))
    assert_same_bits(weights(model), weights(expected))


def test_an_observing_guard_beside_it_turns_nothing_off(tmp_path: Path) -> None:
    guard = GradGuard("observe")
    fit(tmp_path, guard, SkipBadSteps())
    assert guard.counts["skipped_steps"] == 1


def test_an_alert_alone_changes_no_bit(tmp_path: Path) -> None:
    told: list[str] = []
    model = Regression(adamw)
    batches = make_batches(30)
    quiet_trainer(tmp_path, GradientAlert(send=lambda a: told.append(a.title))).fit(
        model, loader(batches)
    )
    plain = Regression(adamw)
    plain_loop(plain, batches)
    assert_same_bits(weights(model), weights(plain))


def test_an_alert_beside_a_guard_tells_what_it_is_told_to(tmp_path: Path) -> None:
    told: list[str] = []
    fit(tmp_path, GradGuard(), GradientAlert(send=lambda alert: told.append(alert.title)))
    assert told == ["GradGuard: NaN or Inf in training"]


@pytest.mark.parametrize(
    ("callbacks", "kind"),
    [
        ([UpdateCap(max_ratio=0.1), GradGuard(cap=respond.UpdateCap(max_ratio=0.2))], "cap"),
        ([GradGuard(skip=None), SkipBadSteps()], "skip"),
        ([SkipBadSteps(), GradGuard(skip=respond.SkipBadSteps(max_consecutive=3))], "skip"),
    ],
)
def test_a_contradiction_is_one_sentence_before_training(
    tmp_path: Path, callbacks: list[Any], kind: str
) -> None:
    with pytest.raises(ValueError, match=f"{kind} must be set by one callback on a Trainer, got"):
        fit(tmp_path, *callbacks)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("clip", lambda: AdaptiveGradientClipping(respond.PercentileClip(20))),
        ("cap", lambda: UpdateCap(max_ratio=0.2)),
        ("skip", lambda: SkipBadSteps(max_consecutive=7)),
        ("backoff", lambda: LearningRateBackoff(factor=0.3)),
        ("rollback", lambda: WeightRollback(max_rollbacks=1)),
        ("alert", lambda: GradientAlert(every_seconds=1.0)),
    ],
)
def test_the_guard_takes_a_callback_for_its_settings(name: str, make: Any) -> None:
    callback = make()
    assert getattr(GradGuard(**{name: callback}), name) == callback.settings
    assert not isinstance(getattr(GradGuard(**{name: callback.settings}), name), SingleResponse)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "observe", "clip": respond.NormClip(1.0)}, "clip must be left out with mode="),
        ({"mode": "observe", "rollback": WeightRollback(10)}, "rollback must be left out"),
        ({"cap": SkipBadSteps()}, "cap must be a UpdateCap or None, got SkipBadSteps"),
        ({"rollback": 3}, "rollback must be a WeightRollback or None, got 3"),
        ({"clip": "norm"}, "clip must be"),
    ],
)
def test_bad_arguments_of_the_guard(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        GradGuard(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UpdateCap(max_ratio=-1), "max_ratio must be a number > 0, got -1"),
        (lambda: SkipBadSteps(max_consecutive=0), "max_consecutive must be an integer >= 1"),
        (lambda: LearningRateBackoff(factor=1.5), "factor must be a number > 0 and < 1"),
        (lambda: WeightRollback(max_rollbacks=-1), "max_rollbacks must be an integer >= 1"),
        (lambda: AdaptiveGradientClipping("agc"), "clip must be"),
        (lambda: AdaptiveGradientClipping(None), "strategy must be a clipping strategy, got None"),
        (lambda: GradientAlert(min_severity="loud"), "min_severity must be one of"),
    ],
)
def test_bad_arguments_of_single_callbacks(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_each_public_callback_has_the_arguments_of_its_settings() -> None:
    import inspect

    for name in ("UpdateCap", "SkipBadSteps", "LearningRateBackoff", "WeightRollback"):
        ours = inspect.signature(getattr(library, name)).parameters
        theirs = inspect.signature(getattr(respond, name)).parameters
        assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in theirs.items()}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_run_of_single_callbacks_resumes_exactly(tmp_path: Path, order: tuple[int, ...]) -> None:
    def callbacks() -> list[Any]:
        return [UpdateCap(max_ratio=0.01), SkipBadSteps(), LearningRateBackoff()]

    def train(name: str, epochs: int, made: list[Any], **arguments: Any) -> tuple[Any, Regression]:
        model = Regression(adamw)
        trainer = quiet_trainer(tmp_path / name, *made, max_epochs=epochs)
        trainer.fit(model, loader(BATCHES), **arguments)
        return trainer, model

    _, whole = train("whole", 2, callbacks())
    half, _ = train("half", 1, callbacks())
    half.save_checkpoint(tmp_path / "half.ckpt")
    again = callbacks()
    listed = [again[number] for number in order]
    _, resumed = train("rest", 2, listed, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_same_bits(weights(resumed), weights(whole))
    assert again[0].counts["skipped_steps"] == 2
