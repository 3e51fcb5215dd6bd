"""What the recurrent modules cost: that the benchmark measures what it says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.modules import contenders, measuring, passes, results
from benchmarks.modules.contenders import BASELINES, CONTENDERS, Loop
from benchmarks.modules.measuring import Setting, measure
from benchmarks.modules.passes import Passes
from benchmarks.overhead.timing import Schedule
from benchmarks.timesteps.models import FUSED, Shape
from lightning_gradguard import nn as recurrent

TINY = Shape(timesteps=12, sequences=4, input_size=3, hidden_size=8)
SIZES = [str(size) for size in TINY]
FAST = Setting(TINY, torch.float32, Schedule(warm_steps=1, rounds=2, steps=1))


def row_of(name: str, ratio: float, **more) -> dict:
    time = {"median": ratio, "quartiles": [ratio, ratio], "step_ms": 1.0}
    row = {"name": name, "beside": "lstm", "way": "", "target": "cell", "why_not": "", "time": time}
    return {**row, "memory": 1.0, "bytes": 1, **more}


# -- the whole program -----------------------------------------------------------------------------


@pytest.mark.slow
def test_tables_json_and_plot(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["modules", "--quick", "--kinds", "gru", "--shape", *SIZES]

    assert main([*arguments, "--output", str(tmp_path)]) == 0

    result = json.loads((tmp_path / "modules_cpu_quick.json").read_text())
    assert result["machine"]["torch_threads"] == 1
    (case,) = result["cases"]
    assert {name: case[name] for name in TINY._fields} == TINY._asdict()
    assert {row["beside"] for row in case["rows"]} == {"gru", "gru, 4 layers"}
    aims = [contender for contender in CONTENDERS if contender.target and "gru" in contender.beside]
    assert {verdict["name"] for verdict in case["targets"]} == {aim.name for aim in aims}
    assert (tmp_path / "modules_cpu_quick.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out

    results.print_tables(result)  # what was read back shows the same tables

    assert capsys.readouterr().out.strip() in shown
    assert f"of {len(aims)} aims are met" in shown


def test_cuda_without_a_device_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda"):
        main(["modules", "--device", "cuda"])


def test_sizes_too_small_to_mean_anything_are_refused() -> None:
    with pytest.raises(SystemExit, match="--shape"):
        main(["modules", "--shape", "1", "4", "3", "8"])


# -- what is compared ------------------------------------------------------------------------------


def test_every_module_of_the_package_takes_part() -> None:
    offered = {
        kind
        for kind in vars(recurrent).values()
        if isinstance(kind, type) and issubclass(kind, nn.Module)
    } - {recurrent.RecurrentStack}  # what they are made of
    made = {
        type(part)
        for contender in CONTENDERS
        if contender.package is None
        for part in contender.make(TINY).modules()
    }

    assert offered <= made


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_each_contender_has_the_sizes_of_what_it_is_beside(contender) -> None:
    if not contender.installed:
        pytest.skip(f"{contender.package} is not installed")
    x = torch.randn(TINY.timesteps, TINY.sequences, TINY.input_size)
    module, fused = contender.make(TINY), BASELINES[contender.beside](TINY)

    output, baseline = module(x)[0], fused(x)[0]

    pooled = contender.name.startswith("TemporalAttention")
    assert output.shape == (baseline[0] if pooled else baseline).shape
    layers = getattr(module, "num_layers", 1)
    assert layers == fused.num_layers


@pytest.mark.parametrize("kind", FUSED)
def test_cells_in_a_loop_are_the_fused_module(kind) -> None:
    fused, loop = FUSED[kind](3, 8), Loop(kind, TINY)
    weights = fused.state_dict().items()
    loop.cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in weights})
    x = torch.randn(12, 4, 3)

    torch.testing.assert_close(loop(x)[0], fused(x)[0])


# -- how it is measured ----------------------------------------------------------------------------


def test_a_pass_leaves_the_gradients_of_one_pass() -> None:
    task = Passes("lstm", BASELINES["lstm"], TINY, "cpu", torch.float32)
    task.step()
    once = [parameter.grad.clone() for parameter in (task.inputs, *task.model.parameters())]

    task.step()

    for parameter, grad in zip((task.inputs, *task.model.parameters()), once, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
        assert grad.norm() > 0


def test_what_is_not_installed_has_a_row_that_says_so(monkeypatch, capsys) -> None:
    absent = replace(CONTENDERS[-1], name="Absent", package="no_such_package")
    monkeypatch.setattr(measuring, "CONTENDERS", (CONTENDERS[0], absent))

    rows = measure(FAST, ["lstm", "rnn"], "cpu", lambda line: None)

    by_name = {row["name"]: row for row in rows}
    assert by_name["Absent"]["why_not"] == "not installed"
    assert "time" not in by_name["Absent"]
    assert by_name["nn.LSTM again"]["time"]["turns"] == 2
    results._print_case({**FAST.to_dict(), "rows": rows}, "cpu")
    assert "not installed" in capsys.readouterr().out


def test_ratios_are_those_of_time_and_memory(monkeypatch) -> None:
    def threefold(shape):
        return contenders._of(recurrent.LSTM, num_layers=3)(shape)

    shape = Shape(timesteps=60, sequences=16, input_size=64, hidden_size=64)
    monkeypatch.setattr(
        measuring, "CONTENDERS", (contenders.Contender("threefold", "lstm", threefold),)
    )
    setting = Setting(shape, torch.float32, Schedule(warm_steps=3, rounds=9, steps=2))

    (row,) = measure(setting, ["lstm"], "cpu", lambda line: None)

    # Far apart, because others may be at work on this machine.
    assert 2.0 < row["time"]["median"] < 4.5
    assert 2.0 < row["memory"] < 4.0


def test_a_module_of_our_own_that_fails_is_no_result(monkeypatch) -> None:
    def broken(shape):
        raise RuntimeError("broken")

    monkeypatch.setattr(
        measuring, "CONTENDERS", (contenders.Contender("broken", "lstm", broken, "cell"),)
    )

    with pytest.raises(RuntimeError, match="broken"):
        measure(FAST, ["lstm"], "cpu", lambda line: None)


# The compiler looks at .grad of whatever tensor it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("kind", [recurrent.LayerNormLSTM, recurrent.SkipGRU])
def test_a_compiled_cell_computes_the_same(kind) -> None:
    shape = Shape(timesteps=4, sequences=2, input_size=3, hidden_size=8)
    alone = Passes("", contenders._of(kind), shape, "cpu", torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        compiler = torch.compile
        patch.setattr(
            torch, "compile", lambda step, **options: compiler(step, backend="eager", **options)
        )
        compiled = Passes("", contenders._of(kind), shape, "cpu", torch.float32, passes.compiled)

    assert compiled.apart(alone) < 1e-6


def test_what_has_no_cell_cannot_have_it_compiled() -> None:
    with pytest.raises(TypeError, match="has no cell"):
        passes.compiled(nn.LSTM(3, 8), torch.randn(4, 2, 3))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # of the compiler and of graphs, about themselves
def test_graphs_compute_the_same() -> None:
    make = contenders._of(recurrent.LayerNormGRU)
    alone = Passes("", make, TINY, "cuda", torch.float32)
    for way in passes.WAYS.values():
        assert Passes("", make, TINY, "cuda", torch.float32, way).apart(alone) < 1e-5


# -- what it says ----------------------------------------------------------------------------------


def test_an_aim_is_met_by_the_best_way_to_run() -> None:
    rows = [
        row_of("A", 9.0),
        row_of("A", 2.5, way="graphed"),
        row_of("B", 4.0),
        row_of("C", 0.5, target=None),
        {"name": "D", "way": "graphed", "target": "cell", "why_not": "RuntimeError: no"},
    ]

    found = results.verdicts(rows, "cuda")

    assert [(v["name"], v["way"], v["limit"], v["met"]) for v in found] == [
        ("A", "graphed", 3.0, True),
        ("B", "as it is", 3.0, False),
    ]
    assert not any(verdict["met"] for verdict in results.verdicts(rows, "cpu"))
    assert results.verdicts([row_of("E", 1.0, target="dilated")], "cpu")[0]["met"]
    assert not results.verdicts([row_of("E", 1.01, target="dilated")], "cpu")[0]["met"]


def test_what_fails_is_said_below_the_table(capsys) -> None:
    failed = {
        "name": "D", "beside": "lstm", "way": "graphed", "target": "cell", "why_not": "Error: no",
    }  # fmt: skip

    results._print_case({**FAST.to_dict(), "rows": [row_of("A", 9.0), failed]}, "cuda")

    shown = capsys.readouterr().out
    assert "fails, see below" in shown
    assert "D, graphed: Error: no" in shown
    assert "0 of 1 aims are met" in shown
