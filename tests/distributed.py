"""Runs a function on several real processes that talk over gloo, as training on a CPU does."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_on_ranks(
    function: Callable[..., Any], world_size: int = 2, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes of one process group.

    The processes meet through a file in a directory of their own, so that tests can do this side
    by side without a free port to agree on.

    Args:
        function: A function at the top level of an importable module. The process group is up when
            it is called; it asks ``torch.distributed`` for its rank.
        world_size: Number of processes.
        args: Arguments, the same on every rank; anything that can be pickled.
        timeout: Seconds after which the processes are killed.

    Returns:
        What the function returned, in order of rank.

    Raises:
        RuntimeError: If a rank raised (with its traceback), died, or did not finish in time.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        rendezvous = (Path(directory) / "rendezvous").as_uri()
        ranks: list[tuple[BaseProcess, Connection]] = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run_rank,
                    args=(sender, rendezvous, rank, world_size, timeout, function, args),
                    daemon=True,
                )
                process.start()
                sender.close()  # the rank holds the only other end: its death ends the pipe
                ranks.append((process, receiver))
            return _collect(ranks, time.monotonic() + timeout)
        finally:
            for process, receiver in ranks:
                process.kill()
                process.join()
                receiver.close()


def _collect(ranks: list[tuple[BaseProcess, Connection]], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(ranks):
        done = {*results, *failures}
        waiting = {receiver: i for i, (_, receiver) in enumerate(ranks) if i not in done}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready and not failures:
            raise RuntimeError(f"ranks {sorted(waiting.values())} did not finish in time")
        if not ready:
            break
        for receiver in ready:
            rank = waiting[receiver]
            succeeded, value = _receive(*ranks[rank])
            if succeeded:
                results[rank] = value
            else:
                failures[rank] = value
                # The others soon fail as well, for want of this one, and may be heard first.
                deadline = min(deadline, time.monotonic() + 5.0)
    if failures:
        raise RuntimeError("\n".join(f"rank {r} {failures[r]}" for r in sorted(failures)))
    return [results[rank] for rank in range(len(ranks))]


def _receive(process: BaseProcess, receiver: Connection) -> tuple[bool, Any]:
    try:
        report: tuple[bool, Any] = receiver.recv()
    except EOFError:
        process.join()
        return False, f"died with exit code {process.exitcode}"
    return report


def _run_rank(
    sender: Connection,
    rendezvous: str,
    rank: int,
    world_size: int,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    try:
        torch.set_num_threads(1)
        if sys.platform == "linux":
            # gloo looks up the host's name otherwise, which not every machine can resolve.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        try:
            result = function(*args)
            dist.barrier()  # nobody leaves while another still waits for an answer
        finally:
            dist.destroy_process_group()
        sender.send((True, result))
    except BaseException:  # noqa: BLE001  # the test's process raises it
        sender.send((False, f"raised:\n{traceback.format_exc()}"))
