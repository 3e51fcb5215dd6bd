"""Log-norm statistics against numpy, and over ranks."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.record.statistics import LogNormStatistics
from tests.distributed import run_on_ranks

NORMS = st.lists(
    st.one_of(
        st.floats(1e-12, 1e12),
        st.sampled_from([0.0, math.nan, math.inf, -1.0]),
    ),
    max_size=50,
)


def reference(norms: Sequence[float]) -> dict[str, float]:
    values = np.asarray(norms, dtype=np.float64)
    usable = values[np.isfinite(values) & (values > 0)]
    logs = np.log(usable)
    empty = len(logs) == 0
    return {
        "mean": math.nan if empty else logs.mean(),
        "std": math.nan if empty else logs.std(),
        "max": -math.inf if empty else logs.max(),
        "count": float(len(logs)),
        "left_out": float(len(values) - len(logs)),
    }


def check(metric: LogNormStatistics, norms: Sequence[float]) -> None:
    result = {name: value.item() for name, value in metric.compute().items()}
    assert result == pytest.approx(reference(norms), rel=1e-6, abs=1e-5, nan_ok=True)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric LogNormStatistics was called")
@given(norms=NORMS, parts=st.integers(1, 5))
def test_same_as_numpy(norms: list[float], parts: int) -> None:
    metric = LogNormStatistics()
    for start in range(parts):
        metric.update(torch.tensor(norms[start::parts], dtype=torch.float64))
    check(metric, norms)


def test_numbers_and_tensors_of_any_shape() -> None:
    metric = LogNormStatistics()
    metric.update(2.0)
    metric.update(torch.tensor(3.0))
    metric.update(torch.tensor([[4.0, math.nan], [0.0, 5.0]]))
    check(metric, [2.0, 3.0, 4.0, math.nan, 0.0, 5.0])


def test_half_precision_norms() -> None:
    metric = LogNormStatistics()
    norms = torch.rand(50).add(0.5).to(torch.bfloat16)
    metric.update(norms)
    check(metric, norms.double().tolist())


def test_memory_does_not_grow() -> None:
    metric = LogNormStatistics()
    for _ in range(100):
        metric.update(torch.rand(10) + 0.1)
    assert all(getattr(metric, name).numel() == 1 for name in metric._defaults)


def test_norms_keep_no_graph() -> None:
    metric = LogNormStatistics()
    metric.update(torch.tensor([1.0, 2.0], requires_grad=True))
    assert not any(value.requires_grad for value in metric.compute().values())


def test_reset_forgets_everything() -> None:
    metric = LogNormStatistics()
    metric.update(torch.tensor([1e9, math.nan]))
    metric.reset()
    metric.update(torch.tensor([1.0, 2.0]))
    check(metric, [1.0, 2.0])


def test_pickling_keeps_what_was_seen() -> None:
    metric = LogNormStatistics()
    metric.update(torch.tensor([1.0, 2.0]))
    copy = pickle.loads(pickle.dumps(metric))
    copy.update(3.0)
    check(copy, [1.0, 2.0, 3.0])
    check(metric, [1.0, 2.0])


def norms_of_rank(rank: int) -> list[float]:
    return [[1.0, 2.0, math.nan], [3.0, 400.0, 0.0, 5.0, 0.1]][rank]


def merged() -> dict[str, Any]:
    metric = LogNormStatistics()
    metric.update(torch.tensor(norms_of_rank(torch.distributed.get_rank())))
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.slow
def test_ranks_merge_to_what_one_process_sees() -> None:
    expected = reference(norms_of_rank(0) + norms_of_rank(1))
    for result in run_on_ranks(merged):
        assert result == pytest.approx(expected, rel=1e-6)
