"""The launcher of several processes: it brings back results, and it brings back failures."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_on_ranks


def _sum_of_ranks(offset: int) -> tuple[int, float]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def _fail_on_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("told to fail")


def _die_on_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(7)


def _sleep() -> None:
    time.sleep(600)


def test_results_come_back_in_order_of_rank() -> None:
    assert run_on_ranks(_sum_of_ranks, 2, 10) == [(0, 21.0), (1, 21.0)]


def test_an_exception_on_one_rank_is_raised_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 raised:[\s\S]*ValueError: told to fail"):
        run_on_ranks(_fail_on_last_rank)


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RuntimeError, match="rank 1 died with exit code 7"):
        run_on_ranks(_die_on_last_rank)


def test_ranks_that_hang_are_ended() -> None:
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] did not finish in time"):
        run_on_ranks(_sleep, timeout=5.0)
