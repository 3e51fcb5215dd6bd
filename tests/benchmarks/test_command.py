"""The command line, from options to the files that it leaves."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.overhead import contenders
from benchmarks.overhead.memory import peak_memory
from benchmarks.overhead.workloads import counting_workload


@pytest.mark.slow
def test_table_json_and_plot(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    names = ["gradient_clip_val", "GradGuard"]
    arguments = ["overhead", "--quick", "--workloads", "tiny1000", "--contenders", *names]

    assert main([*arguments, "--parts", "time", "--output", str(tmp_path)]) == 0

    result = json.loads((tmp_path / "overhead_cpu_adamw_quick.json").read_text())
    assert list(result["time"]["tiny1000"]) == names
    assert result["machine"]["torch_threads"] == 1
    assert result["workloads"]["tiny1000"]["tensors"] == 1000
    assert (tmp_path / "overhead_cpu_adamw_quick.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "GradGuard" in shown
    assert "tiny1000" in shown


def test_an_absent_package_is_said_and_is_no_error(tmp_path, capsys, monkeypatch) -> None:
    absent = contenders.Contender("Absent", lambda module, directory: {}, package="no_such_package")
    monkeypatch.setitem(contenders.CONTENDERS, "Absent", absent)
    arguments = ["overhead", "--quick", "--workloads", "tiny1000", "--contenders", "Absent"]

    assert main([*arguments, "--parts", "memory", "--output", str(tmp_path)]) == 0

    assert "Absent: not installed" in capsys.readouterr().out
    result = json.loads((tmp_path / "overhead_cpu_adamw_quick.json").read_text())
    assert result["not_installed"] == ["Absent"]
    assert list(result["memory"]["tiny1000"]) == ["bare"]


def test_cuda_without_a_device_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda"):
        main(["overhead", "--device", "cuda"])


def test_peak_memory_holds_weights_gradients_and_optimizer_state(tmp_path) -> None:
    workload = counting_workload(200)
    weights = 4 * workload.describe()["parameters"]

    sgd, adamw = (
        peak_memory(
            workload,
            contenders.CONTENDERS["bare"],
            optimizer=optimizer,
            device="cpu",
            directory=tmp_path,
            steps=3,
        )
        for optimizer in ("sgd", "adamw")
    )

    assert sgd > 3 * weights  # weights, gradients, momentum
    assert adamw - sgd == pytest.approx(weights, rel=0.1)  # a second moment, and step counts
