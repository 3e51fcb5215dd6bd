"""When a run changes course."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from lightning_gradguard import GuardEngine
from lightning_gradguard.course import Course
from tests.guard.loops import MAKERS, Loop
from tests.models import make_batches


def two_layers() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


ALL = (True,) * 4


def rates(values: list[float]) -> list[bool]:
    _, optimizer = two_layers()
    course, changed = Course(optimizer), []
    for value in values:
        optimizer.param_groups[0]["lr"] = value
        changed.append(course.changed(ALL))
    return changed


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ([0.1, 0.1, 0.1], [False, False, False]),
        ([0.1, 0.01, 0.01], [False, True, False]),  # a decay by steps
        ([1e-4, 0.1], [False, True]),  # a warm restart
        ([0.0, 0.1], [False, False]),  # the first step of a warm-up
        ([math.nan, 0.1], [False, False]),
        ([0.1 * 0.5 * (1 + math.cos(t / 30)) for t in range(60)], [False] * 60),
    ],
)
def test_only_a_jump_of_the_learning_rate_counts(values: list[float], changed: list[bool]) -> None:
    assert rates(values) == changed


def test_unfreezing_and_a_new_group_change_the_course() -> None:
    model, optimizer = two_layers()
    model[0].requires_grad_(False)
    course = Course(optimizer)
    assert not course.changed((False, False, True, True))
    assert not course.changed((False, False, True, False))  # a gradient that is missing once
    model[0].requires_grad_(True)
    assert course.changed(ALL)
    assert not course.changed(ALL)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert course.changed((*ALL, True))


def test_experts_that_take_turns_do_not() -> None:
    _, optimizer = two_layers()
    course = Course(optimizer)
    turns = [(True, True, False, False), (False, False, True, True)] * 5
    assert not any(course.changed(present) for present in turns)


def test_a_run_resumed_at_another_rate_has_changed_course() -> None:
    _, optimizer = two_layers()
    course = Course(optimizer)
    course.changed(ALL)
    state = json.loads(json.dumps(course.state_dict()))
    same, other = Course(optimizer), Course(optimizer)
    same.load_state_dict(state)
    assert not same.changed(ALL)
    optimizer.param_groups[0]["lr"] = 0.01
    other.load_state_dict(state)
    assert other.changed(ALL)


@pytest.mark.parametrize("name", MAKERS)
def test_the_detectors_hear_of_it(name: str) -> None:
    loop = Loop(MAKERS[name], mode="observe")
    heard: list[int] = []
    diagnosis = loop.guard._pipeline._diagnosis
    observe = diagnosis.observe

    def listen(observation: object) -> object:
        if observation.new_phase:  # type: ignore[attr-defined]
            heard.append(observation.step)  # type: ignore[attr-defined]
        return observe(observation)  # type: ignore[arg-type]

    diagnosis.observe = listen  # type: ignore[assignment, method-assign]
    for step, batch in enumerate(make_batches(12)):
        if step == 6:
            loop.optimizer.param_groups[0]["lr"] *= 0.1
        loop.step(batch)
    loop.guard.close()
    assert heard == [6]
    assert isinstance(loop.guard, GuardEngine)
