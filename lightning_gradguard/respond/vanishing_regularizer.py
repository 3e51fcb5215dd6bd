"""A pull on the transport gain of recurrent modules toward 1 (Pascanu et al. 2013, eq. 9, 10)."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_gradguard._validation import check_number, check_type
from lightning_gradguard.measure.transport import Transitions, TransportProbe
from lightning_gradguard.respond.cap_enforcement import local_norms

logger = logging.getLogger("lightning_gradguard")


@dataclass(frozen=True)
class VanishingRegularizer:
    """Add the gradient of Pascanu's Ω to that of the loss, so that recurrent modules keep a memory.

    Ω is the mean over timesteps of (ρ_t - 1)², summed over layers and directions, where ρ_t is the
    transport gain: ‖(∂s_{t+1}/∂s_t)ᵀ a_{t+1}‖ / ‖a_{t+1}‖ with a = dL/ds. As in the paper, states
    and adjoints are constants, and its gradient goes through the weights of one step only. The
    paper sums over timesteps, so that one weight means more in longer sequences: its λ is a
    ``weight`` of λ · (T - 1) here.

    It acts on ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` of any configuration whose gradient can be
    measured exactly, from at most 16 sequences of each call. What it adds is part of the gradient
    when that is measured, clipped and capped. A step on which it acts takes two to four times as
    long and waits for the device. In a run of several processes it is left out, as each would add
    the gradient of its own batch.

    Args:
        weight: Factor on Ω, in units of the loss. Default 1; the paper's trials have λ from 0.5
            to 4 for its sum.
        modules: ``"auto"`` (default) for all of them; or names or patterns.
        every_n_steps: Act on each so many-th step. Default 1.
        max_ratio: Largest norm of what is added to a parameter's gradient, as a share of the norm
            that gradient has. Default 1: the pull never outweighs the loss.
        one_sided: Pull only where the gain is below 1. Default ``False``, as in the paper.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> VanishingRegularizer(weight=0.5, modules=["encoder.*"], one_sided=True).max_ratio
        1.0
        >>> VanishingRegularizer(max_ratio=0)
        Traceback (most recent call last):
        ...
        ValueError: max_ratio must be a number > 0, got 0
    """

    weight: float = 1.0
    modules: Literal["auto"] | Sequence[str] = "auto"
    every_n_steps: int = 1
    max_ratio: float = 1.0
    one_sided: bool = False

    def __post_init__(self) -> None:
        check_number("weight", self.weight, above=0.0, below=float("inf"))
        check_number("every_n_steps", self.every_n_steps, at_least=1, integer=True)
        check_number("max_ratio", self.max_ratio, above=0.0)
        check_type("one_sided", self.one_sided, bool, "True or False")
        if isinstance(self.modules, str):
            if self.modules != "auto":
                raise ValueError(
                    f"modules must be 'auto' or a sequence of names, got {self.modules!r}"
                )
            return
        check_type("modules", self.modules, (list, tuple), "'auto' or a sequence of names")
        for name in self.modules:
            check_type("a name in modules", name, str, "a string")

    def check(self, model: nn.Module) -> None:
        """Raise if ``modules`` does not fit ``model``.

        Raises:
            ValueError: If a name matches no module, or one of another kind.
        """
        TransportProbe(model, self.modules).close()


def omega(steps: Sequence[Transitions], *, one_sided: bool = False) -> Tensor:
    """Ω of one module: the mean of (ρ - 1)² over all steps, summed over layers and directions.

    Args:
        steps: Of all of its calls.
        one_sided: Count only gains below 1.

    Returns:
        0-dim, with a graph to the module's weights.
    """
    sums: dict[int, list[Tensor]] = {}
    for one in steps:
        off_S = one.gain() - 1.0
        squares_S = (off_S.clamp(max=0.0) if one_sided else off_S).square()
        known_S = one.known_S
        sums.setdefault(one.part, []).append(
            torch.stack([squares_S.where(known_S, 0.0).sum(), known_S.sum().to(squares_S)])
        )
    totals = [torch.stack(parts).sum(0) for parts in sums.values()]
    return torch.stack([total / count.clamp(min=1.0) for total, count in totals]).sum()


@torch.no_grad()
def add_bounded(
    gradients: Sequence[Tensor], added: Sequence[Tensor], weight: float, max_ratio: float
) -> None:
    """Add ``weight`` times ``added`` to gradients, each held to a share of the gradient's norm.

    Nothing is added to a gradient that is zero or not finite, nor if what would be is not finite.

    Args:
        gradients: Changed in place.
        added: One for each of them.
        weight: Factor.
        max_ratio: Largest ‖added‖ / ‖gradient‖.

    Example:
        >>> gradient = torch.tensor([3.0, 4.0])
        >>> add_bounded([gradient], [torch.tensor([100.0, 0.0])], 1.0, max_ratio=0.2)
        >>> gradient.tolist()
        [4.0, 4.0]
    """
    have_N = local_norms(gradients)
    add_N = local_norms(added)
    factors_N = (max_ratio * have_N / add_N).clamp_(max=weight)
    sound_N = have_N.isfinite() & add_N.isfinite() & factors_N.isfinite()
    factors_N = factors_N.where(sound_N, 0.0)
    parts = [a.where(sound, 0.0) for a, sound in zip(added, sound_N.unbind(), strict=True)]
    torch._foreach_mul_(parts, list(factors_N.unbind()))
    torch._foreach_add_(list(gradients), parts)


class Regularization:
    """Carries out a :class:`VanishingRegularizer` for one optimizer.

    Args:
        settings: What to do.
        model: The model.
        parameters: Those that the optimizer trains.
        silent: Do not say what is left out.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``modules`` does not fit the model.
    """

    def __init__(
        self,
        settings: VanishingRegularizer,
        model: nn.Module,
        parameters: Collection[nn.Parameter],
        *,
        silent: bool = False,
    ) -> None:
        self.settings = settings
        self.active = True
        self._model = model
        self._silent = silent
        self._told: set[str] = set()
        self._upcoming = 0
        self._probe = self._watch(parameters)
        self._arm()

    def _watch(self, parameters: Collection[nn.Parameter]) -> TransportProbe:
        self._trained = {id(parameter) for parameter in parameters}
        probe = TransportProbe(
            self._model, self.settings.modules, parameters=parameters, on_error=self._fail
        )
        for name, reason in probe.unwatched.items():
            self._tell(name, reason)
        if not probe.names:
            self._tell("", "no nn.RNN, nn.LSTM or nn.GRU is trained here")
        return probe

    def follow(self, parameters: Collection[nn.Parameter]) -> None:
        """The optimizer has other parameters from now on."""
        if self.active:
            self._probe.close()
            self._probe = self._watch(parameters)
            self._arm()

    def add_gradient(self, step: int, scale: float) -> None:
        """Add its gradient to those of the parameters.

        Call it after the backward pass, before gradients are measured or clipped.

        Args:
            step: The coming step.
            scale: By what these gradients are multiplied at the moment, as by a gradient scaler.
        """
        if not self.active:
            return
        try:
            if self._probe.watching:
                self._add(scale)
        except Exception as error:  # noqa: BLE001 - the rest of the guard goes on
            self._fail(error)
        self._upcoming = step + 1
        self._arm()

    def _add(self, scale: float) -> None:
        modules, reasons = self._probe.collect()
        for name, reason in reasons.items():
            self._tell(name, reason)
        settings = self.settings
        for steps in filter(None, modules.values()):
            parameters = [p for p in steps[0].rnn.parameters() if self._gets_one(p)]
            penalty = omega(steps, one_sided=settings.one_sided)
            if not parameters or not penalty.requires_grad:
                continue
            pulls = torch.autograd.grad(penalty, parameters, allow_unused=True)
            pairs = [(p.grad, g) for p, g in zip(parameters, pulls, strict=True)]
            there = [(grad, pull) for grad, pull in pairs if grad is not None and pull is not None]
            if there:
                grads, added = zip(*there, strict=True)
                add_bounded(grads, added, settings.weight * scale, settings.max_ratio)

    def _gets_one(self, parameter: nn.Parameter) -> bool:
        trained = id(parameter) in self._trained and parameter.requires_grad
        return trained and parameter.grad is not None

    def _arm(self) -> None:
        self._probe.watching = self.active and self._upcoming % self.settings.every_n_steps == 0

    def pause(self) -> None:
        """See nothing until :meth:`resume`."""
        self._probe.watching = False

    def resume(self) -> None:
        """See the forward passes of the next step again."""
        self._probe.discard()
        self._arm()

    def discard(self) -> None:
        """Forget what passes since the last step have left."""
        self._probe.discard()

    def go_on_from(self, step: int) -> None:
        """``step`` is the next one, as after a resume."""
        self._upcoming = step
        self.resume()

    def close(self) -> None:
        """Take all hooks off the model."""
        self.active = False
        self._probe.watching = False
        self._probe.close()

    def _fail(self, error: Exception) -> None:
        """A hook of ours must not end the forward or backward pass that it is in."""
        if self.active:
            logger.error(
                "GradGuard stops adding the regularizer against vanishing gradients because of an "
                "internal error (%s: %s); everything else goes on.",
                type(error).__name__,
                error,
                exc_info=error,
            )
        self.close()

    def _tell(self, name: str, reason: str) -> None:
        if name not in self._told and not self._silent:
            place = f" {name!r}" if name else ""
            logger.warning("VanishingRegularizer leaves out%s: %s.", place or " all", reason)
        self._told.add(name)
