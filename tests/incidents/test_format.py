"""A batch comes back as it was, from files that need no pickle, and what does not is said."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.incidents import (
    IncidentError,
    Incidents,
    IncidentWriter,
    Moment,
    RandomState,
    list_incidents,
    read_incident,
)
from lightning_gradguard.incidents.files import bytes_of, write_tensors
from lightning_gradguard.incidents.randomness import random_numbers_from
from lightning_gradguard.incidents.rebuild import decode
from lightning_gradguard.incidents.structure import encode
from lightning_gradguard.record import StepRecord
from tests.incidents.structures import BATCHES, Pair, Sample, assert_same

CPU = torch.device("cpu")


def moment(batch: Any = None) -> Moment:
    batch = torch.ones(2, 3) if batch is None else batch
    return Moment(batch, 4, RandomState.now(CPU))


def written(folder: Path, step: int = 7, batch: Any = None, **arguments: Any) -> Path:
    """An incident of a small model."""
    writer = arguments.pop("writer", None) or IncidentWriter(
        folder, arguments.pop("settings", None)
    )
    draft = writer.begin(step, arguments.pop("model", nn.Linear(3, 1)), moment(batch), **arguments)
    return draft.commit("non_finite")


def through_files(folder: Path, batch: Any) -> Any:
    encoded = encode(batch)
    assert encoded.problems == []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tensors.pt"
    path.unlink(missing_ok=True)
    told = write_tensors(path, encoded.tensors)
    assert told["bytes"] == path.stat().st_size <= bytes_of(encoded.tensors)
    structure = json.loads(json.dumps(encoded.structure, allow_nan=False))
    return decode(structure, torch.load(path, weights_only=True))


@given(batch=BATCHES)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_batch_comes_back_as_it_was(tmp_path: Path, batch: Any) -> None:
    assert_same(through_files(tmp_path, batch), batch)


def test_what_occurs_twice_is_one_object(tmp_path: Path) -> None:
    tensor, array = torch.ones(3), np.ones(2)
    one, other, first, second = through_files(tmp_path, [tensor, tensor, array, array])
    assert one is other
    assert first is second


def test_of_a_view_only_what_is_seen_is_kept(tmp_path: Path) -> None:
    encoded = encode(torch.zeros(100_000, 3)[5:7])
    write_tensors(tmp_path / "tensors.pt", encoded.tensors)
    assert (tmp_path / "tensors.pt").stat().st_size < 10_000


class Opaque:
    def __repr__(self) -> str:
        return "an opaque thing"


def test_what_cannot_be_represented_makes_it_unreplayable_and_says_so(tmp_path: Path) -> None:
    incident = read_incident(written(tmp_path, batch={"x": torch.ones(1), "graph": [Opaque()]}))
    assert "batch.graph.0 is a" in incident.manifest["why_not"]
    assert "without pickle" in incident.manifest["why_not"]
    kept = incident.manifest["batch"]["items"][1][1]["items"][0]
    assert (kept["kind"], kept["repr"]) == ("object", "an opaque thing")
    with pytest.raises(IncidentError, match=r"cannot be replayed, because batch\.graph\.0"):
        incident.batch()
    with pytest.raises(IncidentError, match="what it looked like: an opaque thing"):
        decode(incident.manifest["batch"], {"batch.0": torch.ones(1)})


def test_classes_that_no_other_process_finds_are_refused() -> None:
    class Local(Pair):
        pass

    assert "no other process can import" in encode(Local(1, 2)).problems[0]
    holds_itself: list[Any] = []
    holds_itself.append(holds_itself)
    assert "holds itself" in encode(holds_itself).problems[0]
    assert "numpy:ndarray of dtype object" in encode(np.array([None])).problems[0]


@pytest.mark.parametrize("path", ["no.such.module:Pair", "tests.incidents.structures:Nothing"])
def test_a_class_that_is_gone_is_named(path: str) -> None:
    structure = {**encode(Pair(1, 2)).structure, "class": path}
    with pytest.raises(IncidentError, match=f"{path}, which the batch needs, cannot be imported"):
        decode(structure, {})


def test_a_manifest_calls_nothing_but_what_it_may() -> None:
    for value in (Pair(1, 2), Sample(1)):
        structure = {**encode(value).structure, "class": "os:system"}
        with pytest.raises(IncidentError, match="os:system, which the batch needs, is no longer"):
            decode(structure, {})


def test_what_an_incident_holds(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2).eval())
    model[0].bias.requires_grad_(False)
    finding = Finding(Pathology.NON_FINITE, Severity.CRITICAL, "0", 7, {"x": 1.0}, "A NaN.")
    rows = [StepRecord(n, None, float("inf"), 1.0, 1.0, 1.0, 0, False, 1.0) for n in range(9)]
    writer = IncidentWriter(tmp_path, Incidents(history_rows=3))
    draft = writer.begin(7, model, moment(), label="optimizer1", facts={"epoch": 2})
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("it broke")
    path = draft.commit("non_finite", finding=finding, exception=raised.value, history=rows)
    assert path == tmp_path / "7-optimizer1"
    incident = read_incident(path)
    manifest = incident.manifest
    assert (manifest["reason"], manifest["facts"]["epoch"]) == ("non_finite", 2)
    assert manifest["finding"]["message"] == "A NaN."
    assert "raise RuntimeError" in manifest["exception"]["traceback"]
    assert [(row["step"], row["total_norm"]) for row in incident.history()] == [
        (6, "inf"),
        (7, "inf"),
        (8, "inf"),
    ]
    assert manifest["module"]["evaluating"] == ["1"]
    assert manifest["module"]["frozen"] == ["0.bias"]
    assert manifest["versions"]["torch"] == torch.__version__
    assert_same(incident.weights(), dict(model.state_dict()))
    assert f"Incident at step 7 (non_finite), written {manifest['written']}" in str(incident)
    assert {p.suffix for p in path.iterdir()} <= {".json", ".jsonl", ".pt"}


DRAWS: tuple[Callable[[], Any], ...] = (
    random.random,
    lambda: random.gauss(0, 1),
    lambda: random.seed(3),
    np.random.normal,
    np.random.rand,
    lambda: np.random.seed(3),
    lambda: torch.rand(()),
    lambda: None,
)


def test_a_normal_number_in_store_is_seen_after_seeding_anew() -> None:
    """The generator is where it was before; what was drawn from it in advance is not."""
    with random_numbers_from(RandomState.now(CPU), CPU):
        for in_store in (False, True):
            np.random.seed(0)
            np.random.normal(size=1 if in_store else 2)
            state = RandomState.now(CPU)
            expected = np.random.normal(size=2).tolist()
            state.set(CPU)
            assert np.random.normal(size=2).tolist() == expected


@given(draws=st.lists(st.sampled_from(DRAWS), max_size=6))
def test_random_numbers_are_those_that_came_next(draws: list[Callable[[], Any]]) -> None:
    """Whatever was drawn before: states are read anew only if they have changed."""

    def drawn() -> list[Any]:
        normal = [random.gauss(0, 1), *np.random.normal(size=3).tolist()]
        return [torch.rand(2).tolist(), random.random(), *normal]

    for draw in draws:
        draw()
        state = RandomState.now(CPU)
        expected = drawn()
        state.set(CPU)
        assert drawn() == expected
        state.set(CPU)


def test_random_numbers_are_kept(tmp_path: Path) -> None:
    draft = IncidentWriter(tmp_path).begin(3, nn.Linear(1, 1), moment())
    expected = [torch.rand(2).tolist(), random.random(), np.random.rand()]
    read_incident(draft.commit("exception")).random_state().set(CPU)
    assert [torch.rand(2).tolist(), random.random(), np.random.rand()] == expected


def test_without_weights_there_is_their_fingerprint(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    incident = read_incident(written(tmp_path, model=model, settings=Incidents(weights=False)))
    told = incident.manifest["weights"]
    assert not incident.has_weights
    assert told["why_not"] == "they were not to be kept (weights=False)"
    assert told["fingerprint"]["weight"]["norm"] == pytest.approx(model.weight.norm().item())
    assert len(told["fingerprint"]["bias"]["sha256"]) == 64


def test_without_a_batch_there_is_nothing_to_replay(tmp_path: Path) -> None:
    incident = read_incident(written(tmp_path, settings=Incidents(batch=False)))
    assert "batch=False" in incident.manifest["why_not"]
    draft = IncidentWriter(tmp_path).begin(9, nn.Linear(1, 1), None)
    assert "no longer known" in read_incident(draft.commit("diverging")).manifest["why_not"]


# -- bounds ---------------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    return [read_incident(path).step for path in list_incidents(folder)]


def test_the_first_and_the_latest_of_a_run_are_kept(tmp_path: Path) -> None:
    writer = IncidentWriter(tmp_path, Incidents(max_count=3))
    for step in range(6):
        written(tmp_path, step, writer=writer)
    assert steps(tmp_path) == [0, 1, 5]


def test_incidents_of_earlier_runs_make_way(tmp_path: Path) -> None:
    for step in range(3):
        written(tmp_path, step, settings=Incidents(max_count=3))
    writer = IncidentWriter(tmp_path, Incidents(max_count=3))
    paths = [written(tmp_path, step, writer=writer) for step in (2, 4)]
    assert steps(tmp_path) == [2, 2, 4]
    assert [path.name for path in paths] == ["2-2", "4"]


def test_each_process_counts_its_own(tmp_path: Path) -> None:
    for rank in (0, 1):
        writer = IncidentWriter(tmp_path, Incidents(max_count=1), rank=rank)
        for step in (1, 2):
            written(tmp_path, step, writer=writer)
    assert sorted(path.name for path in list_incidents(tmp_path)) == ["2", "2-rank1"]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_bytes_are_bounded_and_the_weights_go_first(tmp_path: Path) -> None:
    limit = 2**20
    model, batch = nn.Linear(300, 400), torch.ones(10_000)
    writer = IncidentWriter(tmp_path, Incidents(max_count=20, max_bytes=limit))
    for step in range(15):
        written(tmp_path, step, batch, writer=writer, model=model)
        assert size_of(tmp_path) <= limit
    found = [read_incident(path) for path in list_incidents(tmp_path)]
    assert (found[0].step, found[-1].step) == (0, 14)
    assert [incident.has_weights for incident in found][:2] == [True, False]
    assert found[1].manifest["weights"]["why_not"] == "they did not fit in max_bytes"
    assert all(incident.manifest["replayable"] for incident in found)
    assert len(found) < 15


def test_a_batch_that_is_too_large_is_left_out(tmp_path: Path) -> None:
    incident = read_incident(
        written(tmp_path, batch=torch.ones(400_000), settings=Incidents(max_bytes=2**20))
    )
    assert incident.manifest["why_not"] == "its batch did not fit in max_bytes"
    assert incident.has_weights


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_count": 0}, ValueError),
        ({"max_count": 1.0}, TypeError),
        ({"max_bytes": 2**20 - 1}, ValueError),
        ({"weights": 1}, TypeError),
        ({"batch": None}, TypeError),
        ({"history_rows": -1}, ValueError),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{next(iter(arguments))} must be"):
        Incidents(**arguments)


def test_a_reason_must_be_known(tmp_path: Path) -> None:
    draft = IncidentWriter(tmp_path).begin(1, nn.Linear(1, 1), moment(Tensor([1.0])))
    with pytest.raises(ValueError, match="reason must be one of"):
        draft.commit("whim")
