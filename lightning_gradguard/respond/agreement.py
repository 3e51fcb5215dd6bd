"""All ranks decide from the same numbers, and stop guarding together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Agreement:
    """Averages what a decision rests on over all processes, in one small collective per step.

    The vector carries a flag by which a rank whose guard has failed tells the others. They turn
    theirs off when they read it, ``delay`` steps later, so the failed rank keeps sending for just
    as long: no rank is left waiting in a collective.

    Args:
        enabled: Whether to take part; a guard that only observes decides nothing.
        delay: Steps between a collective and its reading on the host.
    """

    def __init__(self, *, enabled: bool, delay: int) -> None:
        self._world_size = _world_size() if enabled else 1
        self._delay = delay
        self._awaited = False
        self._owed = 0
        self._healthy = True
        self._differs = False

    @property
    def replicas_differ(self) -> bool:
        """Whether some ranks held a step to its bounds and others, whose guard failed, did not."""
        return self._differs

    @property
    def alone(self) -> bool:
        """Whether there is no other rank to agree with."""
        return self._world_size == 1

    @property
    def lag(self) -> int:
        """Steps after which all ranks have taken in what one of them has found with a step.

        It is read there, sent with the next step, and read again.
        """
        return 0 if self.alone else 2 * self._delay + 1

    @property
    def owes(self) -> bool:
        """Whether this rank has failed and others still wait for its numbers."""
        return self._owed > 0

    def begin(self) -> None:
        """A step begins in which the others will wait for this rank's numbers."""
        self._awaited = self._world_size > 1

    def reach(self, head: Tensor) -> Tensor:
        """Average ``head`` over all processes, in place; NaN where any is NaN.

        Args:
            head: (K,) this process's numbers, the last of them 0.

        Returns:
            (K,) the same on every process; the last is above 0 if a rank has failed.
        """
        if self._world_size > 1:
            torch.distributed.all_reduce(head)
            head /= self._world_size
            self._awaited = False
        return head

    def fail(self, head: Tensor) -> None:
        """This rank's guard is off: tell the others, now if they wait already.

        Args:
            head: (K,) any tensor of the shape, dtype and device that :meth:`reach` is given.
        """
        self._healthy = False
        self._owed = self._delay + 1 if self._world_size > 1 else 0
        if self._awaited:
            self.send_failure(head)

    def send_failure(self, head: Tensor) -> None:
        """Take part in one more step's collective, as a rank that has failed."""
        self._owed -= 1
        self._differs = self._owed == 0
        self._awaited = False
        torch.distributed.all_reduce(torch.ones_like(head))

    def learn_of_failure(self) -> None:
        """Another rank's guard is off, and so is this one's from now on."""
        self._differs = True

    @torch.no_grad()
    def make_equal(self, optimizer: Optimizer) -> None:
        """Give all ranks the weights and the optimizer state of the lowest one that did not fail.

        Every rank comes here at the same step, the first on which all guards are off.
        """
        self._differs = False
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        rank, failed = torch.distributed.get_rank(), torch.distributed.get_world_size()
        source = torch.tensor(rank if self._healthy else failed, device=parameters[0].device)
        torch.distributed.all_reduce(source, torch.distributed.ReduceOp.MIN)
        if source == failed:
            return
        parcel: list[Any] = [None]
        if rank == source:
            parcel = [([p.cpu() for p in parameters], optimizer.state_dict())]
        torch.distributed.broadcast_object_list(parcel, src=int(source))
        weights, state = parcel[0]
        if rank != source:
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
            optimizer.load_state_dict(state)


def _world_size() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1
