"""Gradients spread over real processes have the norms of the same gradients in one process."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.distributed import run_on_ranks
from tests.measure import reference
from tests.measure.sharded_cases import SHAPES, all_cases, four_ranks, grads_of, norms_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_on_ranks(all_cases)


def test_even_uneven_and_empty_shards_in_one_collective(ranks: list[dict[str, Any]]) -> None:
    grads = grads_of(SHAPES)
    for rank in ranks:
        result = rank["shapes"]
        assert result["parameters"] == pytest.approx(norms_of(grads), rel=1e-6)
        elements = [e for grad in grads for e in reference.elements(grad)]
        assert result["total"] == pytest.approx(reference.norm(elements), rel=1e-6)
        assert result["collectives"] == 1


def test_sharded_replicated_partial_plain_complex_and_double(ranks: list[dict[str, Any]]) -> None:
    grads = grads_of([(4, 3)] * 6)
    grads[4] = torch.complex(grads[4], grads[4])
    for rank in ranks:
        result = rank["mixed"]
        assert result["parameters"] == pytest.approx(norms_of(grads), rel=1e-6)
        assert result["dtype"] == "torch.float64"
        # One for all that is sharded, whatever its dtype, and one to sum the partial gradient.
        assert result["collectives"] == 2


def test_a_gradient_that_one_rank_lacks(ranks: list[dict[str, Any]]) -> None:
    halves = [grad.chunk(2) for grad in grads_of([(4, 3)] * 3)]
    shards = [torch.cat(halves[0]), halves[1][0], halves[2][1]]
    total = reference.norm([e for shard in shards for e in reference.elements(shard)])
    assert [rank["absent"]["present"] for rank in ranks] == [
        (True, True, False),
        (True, False, True),
    ]
    for rank in ranks:
        assert rank["absent"]["total"] == pytest.approx(total, rel=1e-6)
    total = reference.norm([e for half, _ in halves[:2] for e in reference.elements(half)])
    for rank in ranks:
        assert rank["absent_everywhere"]["total"] == pytest.approx(total, rel=1e-6)
    assert ranks[1]["absent_everywhere"]["present"] == (False, False)


def test_ranks_that_sort_their_gradients_anew_at_different_steps(
    ranks: list[dict[str, Any]],
) -> None:
    all_three, two = math.sqrt(12), math.sqrt(8)
    expected = [all_three, all_three, two, all_three, all_three]
    assert ranks[0]["changes"] == pytest.approx(expected, rel=1e-6)
    expected = [all_three, two, all_three, two, all_three]
    assert ranks[1]["changes"] == pytest.approx(expected, rel=1e-6)


def test_non_finite_value_of_one_rank_is_seen_by_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        values = list(rank["non_finite"]["parameters"].values())
        assert values[0] == pytest.approx(2.0)
        assert math.isnan(values[1])
        assert values[2] == math.inf
        assert values[3] == pytest.approx(1.5e19 * math.sqrt(2), rel=1e-6), "squares leave float32"
        assert math.isnan(rank["non_finite"]["total"])


def test_two_mesh_dimensions(ranks: list[dict[str, Any]]) -> None:
    check_two_dimensional([rank["two_dimensional"] for rank in ranks])


def check_two_dimensional(results: list[dict[str, Any]]) -> None:
    expected = norms_of(grads_of([(4, 6)] * 4))
    for result in results:
        both = dict(list(expected.items())[:2])
        assert result["both"]["parameters"] == pytest.approx(both, rel=1e-6)
        assert result["both"]["collectives"] == 1
        assert result["mixed"]["parameters"] == pytest.approx(expected, rel=1e-6)


def test_fully_sharded_model_equals_the_bare_one(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["fsdp"] == ranks[1]["fsdp"]
    assert ranks[0]["fsdp"]["collectives"] == 1


def test_tensor_parallel_model_equals_the_bare_one(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["tensor_parallel"] == ranks[1]["tensor_parallel"]
    assert ranks[0]["tensor_parallel"]["collectives"] == 1


def test_four_processes_data_and_tensor_parallel() -> None:
    results = run_on_ranks(four_ranks, 4)
    check_two_dimensional([result["two_dimensional"] for result in results])
    assert all(result["both_parallel"] == results[0]["both_parallel"] for result in results)


def test_measuring_plain_gradients_does_not_load_dtensor() -> None:
    code = """
import sys
from torch import nn
from lightning_gradguard.measure import grad_norms
before = set(sys.modules)
model = nn.Linear(2, 2)
model.weight.grad = model.weight.detach().clone()
grad_norms(model).layers()
new = set(sys.modules) - before
assert not any(name.startswith("torch.distributed") for name in new), sorted(new)
import torch.distributed.tensor
assert "torch.distributed.tensor" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
