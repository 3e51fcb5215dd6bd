"""Everything that is measured now and then, around the steps of one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.course import Course
from lightning_gradguard.measure import GradNorms
from lightning_gradguard.readings import Inspection, Seen, TimeReading
from lightning_gradguard.sampling import LayerSampler, TimeModules, TimeSampler


class Samplers:
    """The way through time, the layers, and the course of the run.

    Args:
        model: The model.
        optimizer: The optimizer that steps.
        timesteps: Modules to watch through time, ``None`` for none.
        exact_every_n_steps: Steps between exact measurements through time.
        trained_elsewhere: Parameters of the model that other optimizers update.
        delay: Steps until a measurement is on the host.
        silent: Do not say what cannot be watched (for all ranks but one).

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or a name matches no module.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        timesteps: TimeModules | None,
        exact_every_n_steps: int,
        trained_elsewhere: Collection[nn.Parameter] = (),
        *,
        delay: int = 0,
        silent: bool = False,
    ) -> None:
        self._optimizer = optimizer
        self._trained_elsewhere = trained_elsewhere
        self._course = Course(optimizer)
        self._layers = LayerSampler(
            model, optimizer, trained_elsewhere=trained_elsewhere, delay=delay
        )
        self._time: TimeSampler | None = None
        if timesteps is not None:
            self._time = TimeSampler(
                model,
                _parameters(optimizer),
                timesteps,
                exact_every_n_steps,
                delay,
                silent=silent,
            )

    @property
    def watched_in_time(self) -> tuple[str, ...]:
        """Paths of the modules that are watched through time."""
        return self._time.names if self._time is not None else ()

    @property
    def inspecting(self) -> bool:
        """Whether layers are still looked at."""
        return self._layers.active

    @property
    def rates(self) -> list[float]:
        """Learning rate of each group at the step measured last, as the schedule sets it."""
        return self._course.rates

    def follow(self) -> None:
        """The optimizer has other parameters from now on."""
        self._layers.follow(self._optimizer, self._trained_elsewhere)
        if self._time is not None:
            self._time.follow(_parameters(self._optimizer))

    def before_step(self, step: int, norms: GradNorms, scale: float, *, unscaled: bool) -> Seen:
        """Measure before the weights change; returns what has become known.

        Args:
            step: The step.
            norms: Its gradient norms, unscaled.
            scale: What the loss was multiplied by in the backward pass, as by a gradient scaler.
            unscaled: Whether the gradients of the parameters have been divided by it again.
        """
        time = self._time.sample(step, scale) if self._time is not None else ()
        self._layers.before_step(step, norms, scale, scaled=not unscaled)
        changed = self._course.changed(norms.present)
        return Seen(time=time, lr=self._course.lr, new_phase=changed)

    def after_step(self, step: int, dropped: Callable[[], bool | Tensor]) -> Inspection | None:
        """Measure what the step has changed; returns what has become known.

        Args:
            step: The step.
            dropped: Whether it was dropped, 0-dim where that was decided on the device; asked for
                only where it matters.
        """
        if self._layers.looks_at(step):
            self._layers.after_step(step, dropped())
        return self._layers.take(step)

    def want_exact(self, step: int) -> None:
        """Ask for an exact measurement through time soon after ``step``."""
        if self._time is not None:
            self._time.request(step)

    def pause(self) -> None:
        """Do not watch forward and backward passes until :meth:`resume`."""
        self._layers.pause()
        if self._time is not None:
            self._time.pause()

    def resume(self) -> None:
        """Watch them again."""
        self._layers.resume()
        if self._time is not None:
            self._time.resume()

    def discard(self) -> None:
        """Forget what passes since the last step have left."""
        self._layers.discard()
        if self._time is not None:
            self._time.discard()

    def drain(self) -> tuple[TimeReading, ...]:
        """Wait for the readings through time that are not due yet."""
        return self._time.drain() if self._time is not None else ()

    def close(self) -> None:
        """Take all hooks off the model."""
        self._layers.close()
        if self._time is not None:
            self._time.close()

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues at the same steps."""
        return {
            "course": self._course.state_dict(),
            "layers": self._layers.state_dict(),
            "time": self._time.state_dict() if self._time is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Continue from a saved state at ``step``."""
        self._course.load_state_dict(state["course"])
        self._layers.load_state_dict(state["layers"], step)
        if self._time is not None and state["time"] is not None:
            self._time.load_state_dict(state["time"], step)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
