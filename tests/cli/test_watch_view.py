"""The screen of ``gradguard watch``, drawn from runs in memory."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.cli.progress import Seen, SpeedMeter
from lightning_gradguard.cli.watch_lines import NewLines
from lightning_gradguard.cli.watch_view import shares, view
from lightning_gradguard.record.run_history import OptimizerHistory, RunHistory, RunInfo
from tests.record.runs import made_up_run

pytest.importorskip("rich")

UPDATED = datetime(2026, 1, 2, 3, 14, 5, tzinfo=timezone.utc)


def seen(run: RunHistory | None = None, *, later: float = 12.0, **info: object) -> Seen:
    run = run or made_up_run()
    run = replace(run, info=replace(run.info, **{"status": "running", **info}))
    return Seen(run, UPDATED + timedelta(seconds=later), speed=15.0)


def lines_of(what: Seen, width: int = 80, height: int = 24) -> list[str]:
    return view(what, width=width, height=height).plain.split("\n")


def two_optimizers() -> RunHistory:
    critic, generator = made_up_run(label="critic"), made_up_run(label="generator", seed=1)
    return replace(critic, optimizers=critic.optimizers + generator.optimizers)


@settings(deadline=None, max_examples=30)
@given(st.integers(20, 200), st.integers(5, 80), st.sampled_from([1, 2]))
def test_fits_the_terminal_whatever_its_size(width, height, optimizers):
    what = seen(made_up_run(60) if optimizers == 1 else two_optimizers(), planned_steps=1000)

    lines = lines_of(what, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_tells_all_that_matters_on_a_small_terminal():
    text = "\n".join(lines_of(seen(planned_steps=1000)))

    for said in (
        "lightning_logs/version_0",
        "● running",
        "project.models.Encoder, 123,456 parameters",
        "updated 12 s ago",
        "step 400 of 1,000",
        "40%  15 steps/s, 40 s left",
        "steps 0 to 399",
        "backing off ×0.25 · clip threshold 10 · 1 skipped, 5 capped",
        "findings  1 open, 1 healed",
        "vanishing_in_time in encoder.rnn  since step 90",
        "it halves every",
        "step 201: Learning rate cut to a quarter.\n step 200: Step dropped",
        "encoder.rnn/l0  200  -0.430 ± 0.020        1.6  16 of 200",
    ):
        assert said in text


def test_a_run_that_is_silent_says_for_how_long_in_another_color():
    calm, silent = (view(seen(later=s), width=80) for s in (12.0, 754.0))

    assert "updated 12 min 34 s ago" in silent.plain
    assert any(span.style == "bold yellow" for span in silent.spans[:8])
    assert not any(span.style == "bold yellow" for span in calm.spans[:8])


@pytest.mark.parametrize(
    ("modes", "protecting"),
    [(["protect"], True), (["observe"], False), (["observe", "protect"], True)],
)
def test_a_guard_that_only_watches_is_not_said_to_be_ok(modes, protecting):
    what = seen(optimizers=tuple({"label": "", "mode": mode} for mode in modes))

    assert what.protecting is protecting
    assert ("watching" in "\n".join(lines_of(what))) is not protecting


def test_the_error_of_a_failed_run_is_shown():
    lines = lines_of(seen(status="failed", error="RuntimeError: out of memory"))

    assert "✗ failed" in lines[0]
    assert lines[3] == " RuntimeError: out of memory"


def test_each_optimizer_has_its_charts_and_what_does_not_fit_is_counted():
    both = "\n".join(lines_of(seen(two_optimizers())))
    assert "critic: steps 0 to 399" in both
    assert "generator: steps 0 to 399" in both
    assert "[critic] vanishing_in_time" in both

    low = "\n".join(lines_of(seen(two_optimizers()), height=18))
    assert "generator: steps" not in low
    assert "and 1 more optimizer\n" in low


def test_clipped_and_skipped_steps_stand_out():
    drawn = view(seen(), width=80)
    marked = {span.style for span in drawn.spans if drawn.plain[span.start : span.end] in "█▇▆▅"}

    assert "red" in marked
    assert "█ skipped" in drawn.plain
    assert "█ clipped" not in drawn.plain


def test_a_norm_that_is_not_finite_is_a_cross():
    run = made_up_run(50)
    run.optimizers[0].steps["total_norm"][:] = np.where(np.arange(50) == 7, np.nan, 1.0)

    norm = next(
        line for line in lines_of(seen(run), 100) if "grad norm" not in line and "×" in line
    )
    assert norm.index("×") == 12 + 7


def test_a_run_without_a_step_is_shown_too():
    empty = RunHistory(RunInfo(name="logs/version_0"), (OptimizerHistory(),))

    text = "\n".join(lines_of(seen(empty)))
    assert "no step yet" in text
    assert "step 0" in text
    assert lines_of(Seen(RunHistory(), UPDATED))  # without an optimizer, time and speed


def test_a_name_with_markup_stays_text():
    lines = lines_of(seen(name="[bold]run[/bold]"))

    assert lines[0].startswith(" [bold]run[/bold]")


@given(st.lists(st.integers(1, 50), max_size=5), st.integers(-5, 100))
def test_sections_share_the_room(wanted, room):
    given_lines = shares(wanted, room)

    assert sum(given_lines) + len(given_lines) <= max(room, 0)
    for lines, want in zip(given_lines, wanted, strict=False):
        assert min(want, 3) <= lines <= want


def test_speed_is_that_of_the_last_minute():
    meter = SpeedMeter()
    slow = [meter.of(float(t), 2 * t) for t in range(100)]
    fast = [meter.of(100.0 + t, 200 + 10 * t) for t in range(100)]

    assert slow[-1] == pytest.approx(2.0)
    assert fast[-1] == pytest.approx(10.0)
    assert meter.of(199.0, 1190) == fast[-1]  # nothing new was heard


def test_lines_are_told_once():
    told = NewLines()
    first = list(told.of(seen(planned_steps=1000)))

    assert first[0].startswith("step 400 of 1000, loss 0.")
    assert first[0].endswith("guard backing off ×0.25")
    assert "warning: vanishing_in_time in encoder.rnn at step 120: The gradient" in first[1]
    assert first[2] == "critical: exploding in model healed at step 205"
    assert first[3] == "skip at step 200: Step dropped: its gradient is far out."
    assert list(told.of(seen(planned_steps=1000))) == []
    ended = list(told.of(seen(status="failed", error="ValueError: no", planned_steps=1000)))
    assert ended == ["failed after 400 steps: ValueError: no"]
