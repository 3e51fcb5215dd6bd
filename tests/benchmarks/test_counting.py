"""The counter counts exactly, and what the library promises about counts holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.overhead.contenders import CONTENDERS
from benchmarks.overhead.counting import (
    COUNTED_STEPS,
    OperationCounter,
    StepCounts,
    added_counts,
    count_steps,
)
from benchmarks.overhead.workloads import OPTIMIZERS, counting_workload

# What GradGuard calls beyond `clip_grad_norm_`, which calls 8 operations however many tensors.
MOST_EXTRA_CALLS = {"adamw": 4, "sgd": 7, "adamw_fused": 19}


def _reads(read) -> int:
    counter = OperationCounter()
    with counter.patched(), counter:
        read()
    return counter.take().host_reads


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda x: x + 1, 0),
        (lambda x: x[0].item(), 1),
        (lambda x: bool(x[0] > 0), 1),
        (lambda x: float(x[0]), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.numpy(), 1),
        (lambda x: torch.tensor([x[0], x[1]]), 2),
        (lambda x: x.to("cpu", copy=True).tolist(), 1),
        (lambda x: [v.item() for v in x], 3),
    ],
)
def test_every_way_of_reading_counts(read, expected) -> None:
    x = torch.ones(3)

    assert _reads(lambda: read(x)) == expected


def test_reading_a_copy_that_was_sent_in_an_earlier_step_is_no_host_read() -> None:
    counter = OperationCounter()
    with counter.patched():
        with counter:
            copy = torch.ones(3).to("cpu", copy=True)
        assert counter.take().host_reads == 0
        with counter:
            copy.tolist()
            copy[0].item()  # a view made now, whose value the counter takes to be of now
        assert counter.take().host_reads == 1


def test_calls_of_clip_grad_norm_are_those_in_its_source() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    model(torch.ones(2, 4)).sum().backward()
    counter = OperationCounter()
    with counter.patched(), counter:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    counts = counter.take()
    assert (counts.calls, counts.host_reads) == (8, 0)
    assert counts.names["_foreach_norm"] == counts.names["_foreach_mul_"] == 1


def test_methods_are_put_back() -> None:
    before = {name: getattr(Tensor, name) for name in ("tolist", "numpy", "to", "cpu")}
    own = {name for name in before if name in vars(Tensor)}
    make = torch.tensor
    with OperationCounter().patched():
        assert Tensor.tolist is not before["tolist"]

    assert {name: getattr(Tensor, name) for name in before} == before
    assert {name for name in before if name in vars(Tensor)} == own
    assert torch.tensor is make


def test_what_is_added_is_counted_against_the_median_bare_step() -> None:
    def steps(*numbers: tuple[int, int]) -> list[StepCounts]:
        return [StepCounts(calls, reads, {}) for calls, reads in numbers]

    assert added_counts(steps((15, 2), (15, 2), (18, 3)), steps((10, 1), (10, 1), (99, 1))) == {
        "aten_calls": 5,
        "aten_calls_most": 8,
        "host_reads": 1,
        "host_reads_most": 2,
    }


@pytest.fixture(scope="module")
def count(tmp_path_factory):
    """What a contender adds to a healthy step; each is trained once."""
    known: dict[tuple[str, str, int], list[StepCounts]] = {}

    def added(name: str, optimizer: str, tensors: int):
        for who in ("bare", name):
            if (who, optimizer, tensors) not in known:
                known[who, optimizer, tensors] = count_steps(
                    counting_workload(tensors),
                    CONTENDERS[who],
                    optimizer=optimizer,
                    device="cpu",
                    directory=tmp_path_factory.mktemp("counts"),
                )
        return added_counts(known[name, optimizer, tensors], known["bare", optimizer, tensors])

    added.known = known
    return added


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_guard_calls_clip_grad_norm_and_a_constant(count, optimizer) -> None:
    few, many = (count("GradGuard", optimizer, tensors) for tensors in (40, 80))
    clip = count("gradient_clip_val", optimizer, 40)

    assert clip["aten_calls_most"] == 8
    assert many["aten_calls_most"] == few["aten_calls_most"]
    assert few["aten_calls_most"] <= clip["aten_calls_most"] + MOST_EXTRA_CALLS[optimizer]


@pytest.mark.parametrize("name", ["GradGuard", "GradientMonitor"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_host_reads_once_at_most_and_never_where_the_optimizer_is_fused(
    count, name, optimizer
) -> None:
    most = 0 if optimizer == "adamw_fused" else 1

    assert count(name, optimizer, 40)["host_reads_most"] <= most
    assert len(count.known[name, optimizer, 40]) == COUNTED_STEPS


@pytest.mark.parametrize("name", ["AutoClip", "grad_norm"])
def test_peers_that_read_each_tensor_are_seen_to(count, name) -> None:
    assert count(name, "sgd", 40)["host_reads"] >= 40
