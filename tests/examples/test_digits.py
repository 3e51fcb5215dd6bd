"""The demonstration, at a size that takes seconds: what it prints, writes and compares."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest

from tests.examples.loading import EXAMPLES, load, pixels


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # where its own processes find it
    return load("digits", "rich", "sklearn")


@pytest.fixture
def words(digits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that prints, at a width at which no line of a table is cut."""
    module = importlib.import_module("digits_words")
    monkeypatch.setattr(module.console, "width", 100)
    return module


@pytest.mark.slow
def test_the_whole_story(
    digits: ModuleType, words: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--steps", "6", "--rates", "0.1", "100", "--output", str(tmp_path / "out")]

    assert digits.main(arguments) == 0

    printed = capsys.readouterr()
    assert "Test accuracy by learning rate" in printed.out
    assert "The two runs at learning rate" in printed.out
    assert "What the guard did" in printed.out
    assert "their first losses are equal to the last bit" in printed.out
    assert "equal to the last bit to those of the run in the sweep" in printed.out
    assert "NOT equal" not in printed.out
    assert "Warning" not in printed.out + printed.err
    with (tmp_path / "out" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["learning_rate"], row["guarded"]) for row in rows] == [
        ("0.1", "False"),
        ("0.1", "True"),
        ("100.0", "False"),
        ("100.0", "True"),
    ]
    assert all(0.0 <= float(row["test_accuracy"]) <= 1.0 for row in rows)
    assert pixels(tmp_path / "out" / "digits.png").std() > 0.05  # a blank page has no spread
    for name in ("without_guard", "with_guard"):
        assert (tmp_path / "out" / name / "metrics.csv").stat().st_size > 0


def test_without_a_sweep_only_two_runs_are_made(
    digits: ModuleType, words: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"

    for _ in range(2):  # the second time over what the first one left
        assert digits.main(["--steps", "3", "--no-sweep", "--output", str(folder)]) == 0

    printed = capsys.readouterr()
    assert "Test accuracy by learning rate" not in printed.out
    assert "Warning" not in printed.out + printed.err
    assert sorted(path.name for path in folder.iterdir()) == [
        "digits.png",
        "with_guard",
        "without_guard",
    ]


def test_both_runs_see_the_same_weights_and_batches(digits: ModuleType, tmp_path: Path) -> None:
    with digits.quiet():
        bare = digits.train(0.1, 4, 0, None, tmp_path)
        watched = digits.train(0.1, 4, 0, digits.GradientMonitor(), tmp_path)
        guarded = digits.train(0.1, 4, 0, digits.GradGuard(), tmp_path)
        other = digits.train(0.1, 4, 1, digits.GradientMonitor(), tmp_path)

    assert watched.fingerprint == bare.fingerprint
    assert watched.accuracy == bare.accuracy
    assert guarded.history[0].loss == watched.history[0].loss
    assert other.history[0].loss != watched.history[0].loss
    assert other.fingerprint != watched.fingerprint


def run_at(digits: ModuleType, rate: float, accuracy: float, *, guarded: bool = False) -> object:
    return digits.Run(
        rate=rate, guarded=guarded, accuracy=accuracy, finite=True, seconds=1.0, fingerprint=""
    )


def test_the_guarded_runs_have_no_say_in_the_learning_rate(digits: ModuleType) -> None:
    bare = [run_at(digits, rate, acc) for rate, acc in ((0.1, 0.9), (1.0, 0.15), (10.0, 0.1))]
    good = [run_at(digits, rate, 0.9, guarded=True) for rate in (0.1, 1.0, 10.0)]
    bad = [run_at(digits, rate, 0.1, guarded=True) for rate in (0.1, 1.0, 10.0)]

    assert digits.choose_rate(bare + good)[0] == 1.0
    assert digits.choose_rate(bare + bad)[0] == 1.0


def test_weights_that_are_not_numbers_count_as_failed(digits: ModuleType) -> None:
    lucky = dataclasses.replace(run_at(digits, 0.3, 0.9), finite=False)

    assert digits.choose_rate([lucky, run_at(digits, 1.0, 0.9)])[0] == 0.3


def test_where_nothing_failed_the_largest_rate_is_shown_and_said_so(digits: ModuleType) -> None:
    rate, why = digits.choose_rate([run_at(digits, 0.1, 0.9), run_at(digits, 1.0, 0.8)])

    assert rate == 1.0
    assert "largest" in why


def test_a_run_that_ends_in_nan_is_drawn_and_told(
    digits: ModuleType, words: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with digits.quiet():
        runs = [
            digits.train(1e38, 8, 0, watcher, tmp_path)
            for watcher in (digits.GradientMonitor(), digits.GradGuard())
        ]
    assert not runs[0].finite
    assert not math.isfinite(runs[0].history[-1].total_norm)

    digits.save_figure(runs, runs, tmp_path / "nan.png")
    words.print_sweep(runs, 1e38)
    words.print_runs(runs)
    words.print_story(runs)

    assert "NaN" in capsys.readouterr().out
    assert pixels(tmp_path / "nan.png").std() > 0.05


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--rates", "-1"], ["--rates", "nan"]])
def test_bad_arguments_are_refused(
    digits: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        digits.main(arguments)

    assert stopped.value.code == 2
    assert "must be" in capsys.readouterr().err
