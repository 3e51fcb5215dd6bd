"""``python -m benchmarks detection``, on programs that take no time."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.detection import command, jobs
from benchmarks.detection.jobs import FIRST_SEED
from benchmarks.detection.programs import ALL
from benchmarks.detection.records import Program, Setup
from benchmarks.detection.sensitivity import affordable
from benchmarks.detection.split import side
from benchmarks.workers import Crash, in_processes


def _build(sign: float, seed: int) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 1)
    inputs = torch.randn(16, 3, generator=generator)
    targets = inputs.sum(1, keepdim=True)

    def loss(batch) -> torch.Tensor:
        return sign * (model(batch[0]) - batch[1]).square().mean()

    return Setup(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        batch=lambda step: (inputs, targets),
        loss=loss,
        score=lambda: abs(float(loss((inputs, targets)).detach())),
    )


HEALTHY = Program("line", "wrong_sign", False, 60, 0.1, False, lambda seed: _build(1.0, seed))
FAILING = replace(
    HEALTHY,
    name="line_up",
    faulty=True,
    causes=("diverging", "exploding"),
    build=lambda seed: _build(-1.0, seed),
)
HELD_OUT = replace(FAILING, name="line_up/held_out", family="negated_loss")


def _raises(error: BaseException):
    def build(seed: int) -> Setup:
        raise error

    return build


@pytest.fixture
def programs(monkeypatch):
    def use(*programs: Program) -> None:
        monkeypatch.setattr(jobs, "ALL", programs)

    use(HEALTHY, FAILING, HELD_OUT)
    return use


@pytest.fixture
def folders(tmp_path) -> list[str]:
    folders = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "output")]
    return ["detection", "--jobs", "0", "--seeds", "2", *folders]


def _read(tmp_path, name: str = "detection_cpu.json"):
    return json.loads((tmp_path / "output" / name).read_text())


def test_tables_json_and_plots(programs, folders, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")

    assert main([*folders, "--no-sweep"]) == 0

    result = _read(tmp_path)
    assert list(result["sides"]) == ["development", "held_out"]
    runs = result["sides"]["development"]["runs"]
    assert (runs["failing"], runs["healthy"], runs["ambiguous"]) == (2, 2, 0)
    for scores in result["sides"].values():
        assert {"GradGuard", "AutoTrainer", "NaN only", "coin at the base rate"} <= set(
            scores["detectors"]
        )
    assert [row["program"] for row in result["runs"]] == [
        "line",
        "line",
        "line_up",
        "line_up",
        "line_up/held_out",
        "line_up/held_out",
    ]
    assert all(
        len(row["peers"]) == len(result["columns"]["peers in the order of"])
        for row in result["runs"]
    )
    assert result["machine"]["torch_threads"] == 1
    assert result["crashes"] == []
    assert result["replay_differs"] == []
    for name in ("detection_cpu.png", "detection_confusion_cpu.png"):
        assert (tmp_path / "output" / name).read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for words in ("development: 2 programs", "held-out: 1 programs", "macro-F1", "went wrong"):
        assert words in shown


def test_a_part_of_the_programs_does_not_take_the_place_of_all(programs, folders, tmp_path) -> None:
    assert main([*folders, "--no-sweep", "--programs", "line_up*", "--split", "held-out"]) == 0

    result = _read(tmp_path, "detection_cpu_part.json")
    assert list(result["sides"]) == ["held_out"]
    assert result["settings"]["split"] == "held-out"


def test_the_sweep_varies_thresholds_on_development_programs(
    programs, folders, tmp_path, monkeypatch, capsys
) -> None:
    few = list(command.sweep.__globals__["variations"](command.sweep.__globals__["Thresholds"]()))
    monkeypatch.setitem(command.sweep.__globals__, "variations", lambda defaults: few[:3])

    assert main(folders) == 0

    swept = _read(tmp_path)["sweep"]
    assert swept["runs"] == 4
    assert [row["name"] for row in swept["changes"]] == [v.name for v in few[:3]]
    assert swept["left_out"] == 0
    assert swept["crashes"] == []
    assert "Thresholds halved and doubled, 4 development runs" in capsys.readouterr().out


def test_the_sweep_takes_as_many_runs_as_there_is_time_for(programs, folders, tmp_path) -> None:
    assert main([*folders, "--no-sweep"]) == 0
    files = sorted((tmp_path / "cache").iterdir())
    assert len(affordable(files, least=1, rounds=100, seconds=0.0)) == 1
    assert len(affordable(files, least=3, rounds=100, seconds=0.0)) == 3
    assert affordable(files, least=1, rounds=1, seconds=600.0) == files


def test_a_crash_loses_no_other_run_and_is_told(programs, folders, tmp_path, capsys) -> None:
    broken = replace(HEALTHY, name="broken", build=_raises(RuntimeError("no such device")))
    programs(broken, HEALTHY, FAILING)

    assert main([*folders, "--no-sweep"]) == 1

    result = _read(tmp_path)
    assert result["sides"]["development"]["runs"]["failing"] == 2
    assert [(c["program"], c["seed"]) for c in result["crashes"]] == [
        ("broken", FIRST_SEED),
        ("broken", FIRST_SEED + 1),
    ]
    assert "RuntimeError: no such device" in capsys.readouterr().out


def test_an_interrupt_keeps_what_is_done(programs, folders, tmp_path) -> None:
    last = replace(HEALTHY, name="stopped", steps=50, build=_raises(KeyboardInterrupt()))
    programs(last, HEALTHY, FAILING)

    assert main(folders) == command.INTERRUPTED

    result = _read(tmp_path)
    assert len(result["runs"]) == 4
    assert "sweep" not in result


def test_rescoring_trains_nothing_and_sees_only_development_programs(
    programs, folders, tmp_path, capsys
) -> None:
    assert main([*folders, "--no-sweep"]) == 0
    before = (tmp_path / "output" / "detection_cpu.json").read_bytes()
    capsys.readouterr()
    programs(
        *(
            replace(program, build=_raises(AssertionError("trained")))
            for program in (HEALTHY, FAILING, HELD_OUT)
        )
    )

    assert main([*folders, "--rescore"]) == 0

    shown = capsys.readouterr().out
    assert "development: 2 programs" in shown
    assert "held-out" not in shown
    assert main([*folders, "--rescore", "--split", "held-out"]) == 0
    assert "held-out: 1 programs" in capsys.readouterr().out
    assert (tmp_path / "output" / "detection_cpu.json").read_bytes() == before


def test_rescoring_goes_by_the_programs_as_they_are_now(programs, folders, capsys) -> None:
    assert main([*folders, "--no-sweep"]) == 0
    capsys.readouterr()
    programs(replace(HEALTHY, target=-1.0), replace(FAILING, causes=("saturated",)))

    assert main([*folders, "--rescore"]) == 0

    shown = capsys.readouterr().out
    assert "2 failing and 0 healthy runs, 2 ambiguous" in shown
    assert "line_up (seeds 2, 3); right is saturated, from step 0 of 60" in shown


def test_kept_runs_are_not_trained_again(programs, folders, tmp_path) -> None:
    assert main([*folders, "--no-sweep"]) == 0
    first = _read(tmp_path)["runs"]
    programs(*(replace(p, build=_raises(AssertionError())) for p in (HEALTHY, FAILING, HELD_OUT)))

    assert main([*folders, "--no-sweep"]) == 0

    assert _read(tmp_path)["runs"] == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rescore"], "--rescore needs"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--jobs", "-1"], "--jobs must be at least 0"),
        (["--programs", "nothing"], "no run"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(programs, arguments, message) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["detection", *arguments])


def test_the_quick_programs_exist_and_are_of_both_kinds_on_both_sides() -> None:
    chosen = [program for program in ALL if program.name in command.QUICK]
    assert len(chosen) == len(command.QUICK)
    assert {(side(program), program.faulty) for program in chosen} == {
        (name, faulty) for name in ("development", "held_out") for faulty in (True, False)
    }


def test_the_longest_programs_begin_first(programs, tmp_path) -> None:
    short, long = replace(HEALTHY, steps=10), replace(FAILING, steps=90)
    assert [job.steps for job in jobs.jobs_of([short, long], 2, tmp_path)] == [90, 90, 10, 10]


@pytest.mark.slow
def test_a_process_that_dies_takes_only_its_own_job_along() -> None:
    # raise_signal is a function that new processes can import, and one signal does no harm
    orders = [signal.SIGCONT, signal.SIGKILL, signal.SIGCONT, -1, signal.SIGCONT]

    results = list(in_processes(signal.raise_signal, orders, 2))

    assert sorted(job for job, _ in results) == sorted(orders)
    reasons = {job: r.reason for job, r in results if isinstance(r, Crash)}
    assert set(reasons) == {signal.SIGKILL, -1}
    assert "exit code -9" in reasons[signal.SIGKILL]
    assert "Traceback" in reasons[-1]
    assert sum(result is None for _, result in results) == 3
