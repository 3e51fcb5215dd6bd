"""What all ways of watching a module have in common: hooks, calls, and measurements that end."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_gradguard.measure._taps import Switch, attach

ModuleT = TypeVar("ModuleT", bound=nn.Module)
CallT = TypeVar("CallT", bound="WatchedCall")


class Watch(ABC, Generic[ModuleT]):
    """Sees the calls of one module.

    Args:
        name: Path of the module.
        module: The module.
        switch: Of the probe.

    Attributes:
        seen: Whether there ever was a call in training.
        reason: Why it cannot be watched, if that has shown; else empty.
        generation: Number of measurements; graphs from before the last one are over.
    """

    def __init__(self, name: str, module: ModuleT, switch: Switch) -> None:
        self.name = name
        self.module = module
        self.seen = False
        self.reason = ""
        self.generation = 0
        self._switch = switch
        self._number = 0  # of calls since the last measurement
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def attach(self) -> None:
        """Begin to see calls."""

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def forget(self) -> None:
        """Begin a new measurement."""
        self.generation += 1
        self._number = 0


class CallWatch(Watch[ModuleT], Generic[ModuleT, CallT]):
    """Sees what goes into each call of a module, and what comes out.

    Attributes:
        calls: Those that a gradient has reached since the last measurement.
    """

    def __init__(self, name: str, module: ModuleT, switch: Switch) -> None:
        super().__init__(name, module, switch)
        self.calls: list[CallT] = []
        self._begun = threading.local()  # nn.DataParallel calls one module in several threads

    def attach(self) -> None:
        """Begin to see calls."""
        self._handles = attach(self.module, self._switch, before=self.before, after=self.after)

    def forget(self) -> None:
        """Begin a new measurement."""
        super().forget()
        for call in self.calls:
            call.forget()
        self.calls = []

    @abstractmethod
    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See the arguments; return others to be used instead, or ``None``."""

    @abstractmethod
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """See the output."""

    def _take_begun(self) -> CallT | None:
        """The call that :meth:`before` has begun, once."""
        call: CallT | None = getattr(self._begun, "call", None)
        self._begun.call = None
        return call


class WatchedCall(ABC):
    """One call of a module.

    Args:
        watch: Sees it.
        number: Which call since the last measurement it is.

    Attributes:
        number: As given.
        generation: Of the measurement that it belongs to.
    """

    def __init__(self, watch: CallWatch[Any, Any], number: int) -> None:
        self.number = number
        self.generation = watch.generation
        self._watch = watch
        self._kept = False

    @abstractmethod
    def forget(self) -> None:
        """Let go of all copies, as the graph may live on."""

    def _keep(self) -> bool:
        """Belong to the measurement from the first gradient on, unless that is over."""
        if self.generation != self._watch.generation:
            return False
        if not self._kept:
            self._kept = True
            self._watch.calls.append(self)
        return True
