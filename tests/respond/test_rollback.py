"""When weights are copied and when they are put back, from plain numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.respond import (
    Action,
    ActionKind,
    LearningRateBackoff,
    SkipBadSteps,
    UpdateCap,
    WeightRollback,
)
from lightning_gradguard.respond.ladder import Ladder, LadderSettings
from lightning_gradguard.respond.rollback import RollbackBudget, ask_to_go_back, do_damage

SETTINGS = LadderSettings(
    None,
    UpdateCap(window=4),
    SkipBadSteps(max_consecutive=3),
    LearningRateBackoff(cooldown_steps=4, recovery_steps=5),
    WeightRollback(every_n_steps=10, max_rollbacks=2),
)


def finding(
    pathology: Pathology, severity: Severity = Severity.WARNING, *, local: bool = False
) -> Finding:
    return Finding(pathology, severity, "loss", 0, {}, "words", local=local)


DIVERGING = finding(Pathology.DIVERGING)


def observe(ladder: Ladder, step: int, **what: Any) -> list[Action]:
    values = {
        "total_norm": 1.0,
        "loss": 1.0,
        "skipped": False,
        "large_share": 0.0,
        "findings": [],
        "restorable": 0,
    }
    return ladder.observe(step, **{**values, **what})


def skip(ladder: Ladder, step: int, **what: Any) -> list[Action]:
    return observe(ladder, step, **{"total_norm": math.nan, "skipped": True, **what})


def kinds(actions: list[Action]) -> list[ActionKind]:
    return [action.kind for action in actions]


@pytest.mark.parametrize("name", ["every_n_steps", "max_rollbacks", "max_bytes"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_bad_argument_is_named(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"{name} must be an integer >= 1, got {value}"):
        WeightRollback(**{name: value})


# -- when to go back -------------------------------------------------------------------------------


@pytest.mark.parametrize("pathology", list(Pathology))
@pytest.mark.parametrize("severity", list(Severity))
def test_findings_that_ask_for_earlier_weights(pathology: Pathology, severity: Severity) -> None:
    ladder = Ladder(SETTINGS)
    actions = observe(ladder, 40, findings=[finding(pathology, severity)], restorable=20)
    asks = (pathology, severity) in {
        (Pathology.DIVERGING, Severity.WARNING),
        (Pathology.DIVERGING, Severity.CRITICAL),
        (Pathology.EXPLODING, Severity.CRITICAL),
    }
    assert ladder.puts_back == asks
    assert (ActionKind.ROLL_BACK in kinds(actions)) == asks


def test_going_back_cuts_the_rate_tightens_the_cap_and_says_so() -> None:
    ladder = Ladder(SETTINGS)
    ratio = ladder.plan().max_ratio
    (action,) = observe(ladder, 412, findings=[DIVERGING], restorable=350)
    assert action.message == (
        "Step 412: weights, optimizer and buffers put back to step 350, because the run is "
        "diverging; learning rate cut to 0.5 of its schedule."
    )
    assert action.numbers == {"to_step": 350.0, "rollbacks": 1.0, "lr_scale": 0.5}
    assert ladder.plan().lr_scale == 0.5
    assert ladder.plan().max_ratio == pytest.approx(ratio * SETTINGS.cap.retreat)
    # The cooldown of one cut does not refuse the next.
    observe(ladder, 413, findings=[DIVERGING], restorable=350)
    assert ladder.plan().lr_scale == 0.25
    assert not ladder.should_stop


def test_a_fixed_cap_stays_and_without_backoff_the_rate_stays() -> None:
    ladder = Ladder(LadderSettings(None, UpdateCap(adaptive=False), None, None))
    before = ladder.plan()
    (action,) = observe(ladder, 5, findings=[DIVERGING])
    assert ladder.plan() == before
    assert "learning rate" not in action.message


def test_skips_in_a_row_go_back_twice_and_then_stop() -> None:
    ladder = Ladder(SETTINGS)
    done = [skip(ladder, step, restorable=7) for step in range(20)]
    assert [n for n, a in enumerate(done) if ActionKind.ROLL_BACK in kinds(a)] == [2, 5]
    assert [n for n, a in enumerate(done) if ActionKind.STOP in kinds(a)] == [8]
    assert ladder.should_stop
    stop = next(action for action in done[8] if action.kind is ActionKind.STOP)
    assert "going back 2 times has not helped" in stop.message
    assert "put back to step 7" in stop.message


def test_a_stop_puts_weights_back_once() -> None:
    ladder = Ladder(SETTINGS)
    put_back = []
    for step in range(20):
        skip(ladder, step)
        put_back.append(ladder.puts_back)
    assert [n for n, back in enumerate(put_back) if back] == [2, 5, 8]


def test_weights_that_break_after_the_stop_are_put_back_without_a_word() -> None:
    ladder = Ladder(SETTINGS)
    for step in range(9):
        skip(ladder, step)
    assert ladder.should_stop
    assert kinds(skip(ladder, 9, weights_broken=True)) == [ActionKind.SKIP]
    assert ladder.puts_back


def test_broken_weights_go_back_at_once() -> None:
    ladder = Ladder(SETTINGS)
    actions = skip(ladder, 3, weights_broken=True, restorable=1)
    assert kinds(actions) == [ActionKind.SKIP, ActionKind.ROLL_BACK]
    assert "the weights are broken" in actions[-1].message


def test_broken_weights_and_nothing_to_go_back_to_stop_the_run() -> None:
    ladder = Ladder(SETTINGS)
    actions = skip(ladder, 3, weights_broken=True, restorable=None)
    assert kinds(actions) == [ActionKind.SKIP, ActionKind.STOP]
    assert not ladder.puts_back
    assert ladder.should_stop


@pytest.mark.parametrize("rollback", [None, WeightRollback()])
def test_without_a_copy_or_without_the_rung_all_is_as_before(rollback: Any) -> None:
    ladder = Ladder(LadderSettings(None, None, SETTINGS.skip, SETTINGS.backoff, rollback))
    restorable = 0 if rollback is None else None
    assert kinds(observe(ladder, 0, findings=[DIVERGING], restorable=restorable)) == [
        ActionKind.BACK_OFF
    ]
    done = [kinds(skip(ladder, n, restorable=restorable)) for n in (1, 2, 3)]
    assert done == [[ActionKind.SKIP], [ActionKind.SKIP], [ActionKind.SKIP, ActionKind.STOP]]


def test_after_the_last_rollback_a_divergence_cuts_the_rate() -> None:
    ladder = Ladder(SETTINGS)
    for step in (0, 1):
        observe(ladder, step, findings=[DIVERGING])
    for step in range(2, 8):
        observe(ladder, step)
    assert kinds(observe(ladder, 8, findings=[DIVERGING])) == [ActionKind.BACK_OFF]
    assert not ladder.should_stop


def test_steps_that_were_under_way_are_not_held_against_the_weights() -> None:
    ladder = Ladder(LadderSettings(None, None, SkipBadSteps(max_consecutive=1), None))
    assert ActionKind.ROLL_BACK in kinds(skip(ladder, 10))
    ladder.rollback.resume_at(13)  # the steps 11 and 12 are on their way
    for late in (11, 12):
        assert kinds(skip(ladder, late, weights_broken=True, findings=[DIVERGING])) == [
            ActionKind.SKIP
        ]
        assert not ladder.puts_back
    assert ActionKind.ROLL_BACK in kinds(skip(ladder, 13))


def test_a_stopped_run_that_is_resumed_has_its_rollbacks_again() -> None:
    used, stopped = Ladder(SETTINGS), Ladder(SETTINGS)
    observe(used, 0, findings=[DIVERGING])
    for step in range(9):
        skip(stopped, step)
    assert stopped.should_stop
    for ladder, expected in ((used, 1), (stopped, 0)):
        resumed = Ladder(SETTINGS)
        resumed.load_state_dict(ladder.state_dict())
        assert resumed.rollback.used == expected
        assert not resumed.should_stop


# -- when to copy ----------------------------------------------------------------------------------


def test_copies_are_due_at_the_start_and_then_every_n_steps() -> None:
    ladder = Ladder(SETTINGS)
    newest, due = None, []
    for step in range(35):
        if ladder.copy_due(step, newest):
            newest = step
            due.append(step)
        observe(ladder, step)
    assert due == [0, 10, 20, 30]


@pytest.mark.parametrize(
    "bad", [{"skipped": True}, {"loss": math.inf}, {"total_norm": math.nan}], ids=str
)
def test_no_copy_after_a_bad_step(bad: dict[str, Any]) -> None:
    ladder = Ladder(SETTINGS)
    observe(ladder, 9, **bad)
    assert not ladder.copy_due(10, 0)
    assert not ladder.copy_due(10, None)
    observe(ladder, 10)
    assert ladder.copy_due(11, 0)
    assert ladder.copy_due(11, None)


def test_no_copy_before_a_cut_had_time_to_show() -> None:
    ladder = Ladder(SETTINGS)
    due = []
    observe(ladder, 19, findings=[DIVERGING], restorable=0)
    for step in range(20, 30):
        due.append(ladder.copy_due(step, 0))
        observe(ladder, step)
    assert due == [False] * 4 + [True] * 6


def test_which_open_findings_hinder_a_copy() -> None:
    assert not do_damage([])
    assert not do_damage([finding(Pathology.DIVERGING, Severity.INFO)])
    assert not do_damage([finding(Pathology.EXPLODING, local=True)])
    hindering = {p for p in Pathology if do_damage([finding(p)])}
    assert hindering == {
        Pathology.NON_FINITE,
        Pathology.EXPLODING,
        Pathology.DIVERGING,
        Pathology.LOSS_SPIKE,
    }


def test_the_weights_are_looked_at_first_and_then_rarely() -> None:
    budget = RollbackBudget(WeightRollback())
    assert [n for n in range(20) if budget.looks(good=False)] == [0, 8, 16]
    assert not budget.looks(good=True)
    assert budget.looks(good=False)


# -- it ends ---------------------------------------------------------------------------------------

BAD = st.fixed_dictionaries(
    {
        "total_norm": st.sampled_from([1.0, math.nan, math.inf]),
        "loss": st.sampled_from([None, 1.0, math.nan]),
        "weights_broken": st.booleans(),
        "restorable": st.sampled_from([None, 0, 5]),
        "findings": st.lists(
            st.builds(finding, st.sampled_from(list(Pathology)), st.sampled_from(list(Severity))),
            max_size=2,
        ),
    }
)
RUNS = st.lists(st.tuples(BAD, st.integers(1, 8)), max_size=20)


@given(runs=RUNS)
@settings(max_examples=200)
def test_it_is_bounded_whatever_comes(runs: list[tuple[dict[str, Any], int]]) -> None:
    ladder = Ladder(SETTINGS)
    done: list[Action] = []
    for step, what in enumerate(w for w, times in runs for _ in range(times)):
        actions = observe(ladder, step, skipped=not math.isfinite(what["total_norm"]), **what)
        done += actions
        assert not (ladder.puts_back and what["restorable"] is None)
        assert 0.0 < ladder.plan().lr_scale <= 1.0
    assert kinds(done).count(ActionKind.ROLL_BACK) <= SETTINGS.rollback.max_rollbacks
    assert kinds(done).count(ActionKind.STOP) <= 1
    after = kinds(done)[kinds(done).index(ActionKind.STOP) :] if ladder.should_stop else []
    assert ActionKind.ROLL_BACK not in after
    # From here on everything is bad: it takes each budget of skips once more, and no longer.
    for step in range(1000, 1000 + 3 * 3):
        skip(ladder, step)
    assert ladder.should_stop


@given(pathology=st.sampled_from(list(Pathology)), severity=st.sampled_from(list(Severity)))
def test_what_asks_to_go_back_also_hinders_copies(pathology: Pathology, severity: Severity) -> None:
    found = [finding(pathology, severity)]
    if ask_to_go_back(found):
        assert do_damage(found)
