"""Gradient norm and the guard's state in the progress bar that the Trainer has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_gradguard.guard import GuardEngine
from lightning_gradguard.record.guard_state import STATE_STEPS, guard_state

logger = logging.getLogger("lightning_gradguard")

_METHOD = "get_metrics"


class ProgressState:
    """Shows ``grad_norm`` and ``guard`` in the progress bar while training runs.

    What the bar shows is what its ``get_metrics`` returns. That method of the one bar is wrapped
    until :meth:`detach`, so that any bar will do, a user's own included. A value of the user's with
    the same name stays. The numbers are those that the engines have recorded: nothing is read from
    a device. With several optimizers, the names end in theirs: ``grad_norm/optimizer0``.

    Example:
        >>> trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> state = ProgressState()
        >>> state.attach(trainer, [])  # when training starts, with the engines of its optimizers
        >>> state.detach()  # when it ends, in whatever way
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._wrapper: _Wrapper | None = None
        self._engines: tuple[GuardEngine, ...] = ()

    def attach(self, trainer: Trainer, engines: Sequence[GuardEngine]) -> None:
        """Show the state of these engines from now on; without a bar, do nothing.

        Args:
            trainer: Of either namespace.
            engines: One for each optimizer.
        """
        self.detach()
        bar = trainer.progress_bar_callback
        if bar is None or not engines:
            return
        self._bar = bar
        self._engines = tuple(engines)
        self._wrapper = _Wrapper(bar, self._add)
        vars(bar)[_METHOD] = self._wrapper

    def detach(self) -> None:
        """Leave the bar as it was found."""
        bar, wrapper = self._bar, self._wrapper
        self._bar, self._wrapper, self._engines = None, None, ()
        if wrapper is None:
            return
        wrapper.add = None  # whoever has wrapped it meanwhile gets the bar's own values from it
        if vars(bar).get(_METHOD) is not wrapper:
            return
        if wrapper.replaced is None:
            del vars(bar)[_METHOD]
        else:
            vars(bar)[_METHOD] = wrapper.replaced

    def _add(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The bar's values and ours; in its drawing, nothing of ours may end a run."""
        try:
            shown = [item for engine in self._engines for item in _shown(engine).items()]
            return {**metrics, **{name: value for name, value in shown if name not in metrics}}
        except Exception:
            self._engines = ()
            logger.exception("The progress bar goes on without the gradient norm.")
            return metrics


def _shown(engine: GuardEngine) -> dict[str, Any]:
    """What the bar shows of one optimizer; nothing before its first step."""
    recorder = engine.recorder
    newest = recorder.last
    if newest is None:
        return {}
    rows = recorder.history_since(newest.step - STATE_STEPS)
    state = guard_state(rows, protecting=engine.mode == "protect") if engine.active else "off"
    suffix = f"/{recorder.label}" if recorder.label else ""
    return {f"grad_norm{suffix}": _Norm(newest.total_norm), f"guard{suffix}": state}


class _Norm(float):
    """A number that stays one in the bars that show three decimals of everything."""

    __slots__ = ()

    @override
    def __format__(self, format_spec: str) -> str:
        return f"{float(self):.3g}"


class _Wrapper:
    """Stands in for the ``get_metrics`` of one bar.

    Attributes:
        replaced: What stood in the bar's own ``__dict__`` before; ``None`` if nothing did.
        add: Adds to the values of the bar; ``None`` once there is nothing to add.
    """

    def __init__(self, bar: Any, add: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._bar = bar
        self._original = getattr(bar, _METHOD)
        self.replaced = vars(bar).get(_METHOD)
        self.add: Callable[[dict[str, Any]], dict[str, Any]] | None = add

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        metrics = self._original(*args, **kwargs)
        return metrics if self.add is None else self.add(metrics)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the bar, made while training runs, is of the bar alone: its method is its own.
        return getattr, (self._bar, _METHOD)
