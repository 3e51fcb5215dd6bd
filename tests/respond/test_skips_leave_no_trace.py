"""A step that the engine skips leaves parameters and optimizer state to the bit as they were."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard import GuardEngine
from lightning_gradguard.respond import SkipBadSteps
from tests.models import INPUTS, Batch, Regression, assert_same_bits, make_batches

O = torch.optim  # noqa: E741
Make = Callable[[Iterable[Tensor]], Optimizer]


def each_way(kind: Any, *more: str, **arguments: Any) -> dict[str, Make]:
    """The optimizer with its tensors in a loop, all at once and, if it has one, in its kernel."""
    name = " ".join([kind.__name__.lower(), *(k for k, v in arguments.items() if v and k != "lr")])
    return {
        f"{name} {way}": lambda p, way=way: kind(
            p, **arguments, **{way.split("=")[0]: way[-1] == "1"}
        )
        for way in ("foreach=0", "foreach=1", *more)
    }


MAKERS: dict[str, Make] = {
    **each_way(O.SGD, "fused=1", lr=0.05),
    **each_way(O.SGD, "fused=1", lr=0.05, momentum=0.9, weight_decay=1e-2),
    **each_way(O.SGD, "fused=1", lr=0.05, momentum=0.9, nesterov=True),
    **each_way(O.Adam, "fused=1", lr=1e-2, weight_decay=1e-2),
    **each_way(O.Adam, "fused=1", lr=1e-2, amsgrad=True),
    **each_way(O.AdamW, "fused=1", lr=1e-2),
    **each_way(O.RMSprop, lr=1e-2),
    **each_way(O.RMSprop, lr=1e-2, centered=True),
    **each_way(O.RMSprop, lr=1e-2, momentum=0.9),
}
if hasattr(O, "Adafactor"):  # torch 2.5
    MAKERS |= each_way(O.Adafactor, lr=1e-2)
ALONE: dict[str, Any] = dict.fromkeys(("clip", "cap", "backoff", "rollback"))
RUNGS = {"alone": ALONE, "all rungs": {}}
# At this step the median of the norms is known, and with it what an outlier is.
LATER = 40


@pytest.fixture(autouse=True)
def _no_luck_with_uninitialized_memory() -> Iterator[None]:
    """Memory that was never written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Run:
    """A bare loop under the engine."""

    def __init__(self, make: Make, rungs: str) -> None:
        self.model = Regression(make)
        self.optimizer = make(self.model.parameters())
        how = {"skip": SkipBadSteps(outlier_factor=100.0), **RUNGS[rungs]}
        self.guard = GuardEngine(self.model, self.optimizer, **how)

    def step(self, batch: Batch, scale: float = 1.0) -> None:
        self.optimizer.zero_grad()
        loss = self.model.loss(batch) * scale
        loss.backward()
        self.guard.before_step(loss)
        self.optimizer.step()

    def all(self) -> Any:
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict()])


@pytest.mark.parametrize("rungs", RUNGS)
@pytest.mark.parametrize(
    ("at", "scale"),
    [(0, math.nan), (0, math.inf), (1, math.nan), (LATER, math.nan), (LATER, 1e6)],
)
@pytest.mark.parametrize("name", MAKERS)
def test_nothing_of_a_skipped_step_is_left(name: str, at: int, scale: float, rungs: str) -> None:
    """Nor does the run that goes on know of it: it is that without the bad step."""
    batches = make_batches(at + 4)
    with_it, without = Run(MAKERS[name], rungs), Run(MAKERS[name], "alone")
    for batch in batches[:at]:
        with_it.step(batch)
    before = with_it.all()
    with_it.step(batches[at], scale)
    after = with_it.all()
    assert_same_bits(after[0], before[0])
    if at == 0 and "fused" in name:  # the kernel makes its state, as if there had been no step
        for state in after[1].pop("state").values():
            for key, value in state.items():
                # momentum that is missing is given the first gradient, and not zero
                assert value is None if key == "momentum_buffer" else not value.any()
        del before[1]["state"]
    assert_same_bits(after[1], before[1])
    with_it.step(batches[at + 1])
    with_it.guard.close()
    assert with_it.guard.counts["skipped_steps"] == 1
    if rungs == "alone":
        for batch in (*batches[:at], batches[at + 1]):
            without.step(batch)
        assert_same_bits(with_it.all(), without.all())


class Branches(nn.Module):
    """Of two layers a step uses one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.one, self.other = nn.Linear(INPUTS, 1), nn.Linear(INPUTS, 1)


def train_branches(uses: list[str], bad: int | None, *, late_group: bool) -> Any:
    model = Branches()
    first = model.one.parameters() if late_group else model.parameters()
    optimizer = O.SGD(first, lr=0.05, momentum=0.9, fused=True)
    guard = GuardEngine(model, optimizer, skip=SkipBadSteps(), **ALONE)
    for number, (branch, batch) in enumerate(zip(uses, make_batches(len(uses)), strict=True)):
        if branch == "other" and late_group and len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": list(model.other.parameters())})
        if bad is None and number == uses.index("other"):
            continue
        optimizer.zero_grad()
        loss = (model.get_submodule(branch)(batch[0]) - batch[1]).square().mean()
        (loss * math.nan if number == bad else loss).backward()
        guard.before_step(loss)
        optimizer.step()
    guard.close()
    assert guard.counts["skipped_steps"] == (bad is not None)
    return model.state_dict()


@pytest.mark.parametrize("late_group", [True, False], ids=["new group", "new branch"])
def test_momentum_that_begins_in_the_middle_of_a_run_begins_with_a_gradient(
    late_group: bool,
) -> None:
    """The kernel that is told to do nothing leaves new momentum as the memory was."""
    uses = ["one"] * 3 + ["other"] * 3 + ["one"]
    skipped = train_branches(uses, uses.index("other"), late_group=late_group)
    expected = train_branches(uses, None, late_group=late_group)
    assert all(value.isfinite().all() for value in skipped.values())
    assert_same_bits(skipped, expected)
