"""Truncated backpropagation under the guard: what is cut, carried over, said and drawn."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.readings import TimeReading
from lightning_gradguard.tasks import CharacterCorpus
from tests.examples.loading import load, pixels

READING = TimeReading(
    "rnn", "l0", "exact", "gru", 4, 32, decay_rate=-1.0, profile=(0.4, 0.3, 0.2, 0.1)
)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load("truncated_bptt")


@pytest.fixture(scope="module")
def figure(example: ModuleType) -> ModuleType:
    return importlib.import_module("truncated_bptt_figure")


# -- the whole program -----------------------------------------------------------------------------


def test_a_quick_run_ends_at_the_edges_and_tells(
    example: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    assert example.main(["--steps", "7", "--chunks", "4", "9"]) == 0

    printed = capsys.readouterr()
    assert [path.name for path in tmp_path.iterdir()] == ["truncated_bptt.png"]
    assert pixels(tmp_path / "truncated_bptt.png").std() > 0.05  # a blank page has no spread
    for chunk in (4, 9):
        assert f"chunks of {chunk}: 7 steps" in printed.out
        assert f"no gradient goes back more than {chunk - 1} steps" in printed.out
    assert "Warning" not in printed.out + printed.err


@pytest.mark.slow
def test_the_edge_of_a_chunk_is_not_taken_for_a_vanishing_gradient(example: ModuleType) -> None:
    with example.quiet():
        run = example.train(chunk=5, steps=120, seed=0)

    assert {reading.timesteps for reading in run.readings} == {5}
    assert run.vanishing == []
    assert run.losses[-1] < run.losses[0] - 0.5


# -- the model -------------------------------------------------------------------------------------


def test_chunks_of_any_length_read_the_same_text(example: ModuleType) -> None:
    task = CharacterCorpus(length=24, stateful=True, batch_size=3, train_size=30)
    inputs, _ = next(iter(task.train_dataloader()))
    model = example.Reader(task, 24)
    whole, _ = model.rnn(inputs)

    state, parts = None, []
    for chunk in example.bptt_chunks(inputs, 7):
        outputs, state = model.rnn(chunk, example.detach_state(state))
        parts.append(outputs)

    torch.testing.assert_close(torch.cat(parts, 1), whole)


# -- what it says and draws ------------------------------------------------------------------------


def finding(**values: object) -> Finding:
    known = {
        "pathology": Pathology.VANISHING_IN_TIME,
        "severity": Severity.INFO,
        "where": "rnn",
        "step": 20,
        "evidence": {"horizon": 12.6, "timesteps": 30.0},
        "message": "It vanishes.",
        "since": 3,
    }
    return Finding(**{**known, **values})


def test_what_the_guard_said_is_told_with_its_weight(example: ModuleType) -> None:
    run = example.Run(30, [1.0], [READING], [finding(pathology=Pathology.STAGNATING)])
    assert example.said_of(run) == "the guard does not take that for vanishing"

    found = replace(run, findings=[finding(), finding(until=90)])

    assert example.said_of(found) == (
        "info from step 3 to 90: within a chunk it reached 13 of 30 steps"
    )


def test_curves_begin_at_the_end_of_the_chunk(figure: ModuleType) -> None:
    louder = replace(READING, profile=tuple(7 * norm for norm in READING.profile))

    assert figure.reach([READING, louder]) == pytest.approx([1.0, 2.0, 3.0, 4.0])
    assert figure.passed_on(READING) == pytest.approx([math.exp(-lag) for lag in range(4)])


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "steps"), [([], 200), (["--quick"], 40), (["--quick", "--steps", "7"], 7)]
)
def test_the_number_of_steps(example: ModuleType, arguments: list[str], steps: int) -> None:
    assert example.parse(arguments).steps == steps


@pytest.mark.parametrize("arguments", [["--steps", "1"], ["--chunks", "1"]])
def test_bad_arguments_are_refused(
    example: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments)

    assert stopped.value.code == 2
    assert "must be at least 2" in capsys.readouterr().err
