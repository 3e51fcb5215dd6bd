"""Which modules took part in the forward passes of a step, with gradients on or off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_gradguard.measure._taps import Switch, _Hook


@dataclass(frozen=True)
class Seen:
    """What the forward passes of a step have shown.

    Attributes:
        with_grad: Ids of the modules that ran with gradients on.
        without_grad: That ran with gradients off.
        evaluating: That ran in evaluation mode.
        half: Whether any of them gave an output in float16.
    """

    with_grad: frozenset[int] = frozenset()
    without_grad: frozenset[int] = frozenset()
    evaluating: frozenset[int] = frozenset()
    half: bool = False


class _UsageHook(_Hook):
    """A forward hook that wakes without gradients too."""

    def __call__(self, *call: Any) -> Any:
        if not torch.compiler.is_compiling() and self._switch.watching:
            self._switch.run(self._action, *call)


class UsageWatch:
    """Sees which modules that own parameters are called.

    Args:
        model: The model.
        on_error: As for :class:`ActivationWatch`.
    """

    def __init__(
        self, model: nn.Module, *, on_error: Callable[[Exception], None] | None = None
    ) -> None:
        self._switch = Switch(watching=False, on_error=on_error)
        # By identity, which lasts as long as the modules that are kept with it.
        self._owners: dict[int, list[nn.Module]] = {}
        unseen, self._untold = _out_of_sight(model)
        self._modules: list[nn.Module] = []
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            for parameter in own:
                self._owners.setdefault(id(parameter), []).append(module)
            if own and id(module) not in unseen:
                self._modules.append(module)
        self._known: dict[int, tuple[frozenset[int], bool, bool]] = {}
        self._handles: list[RemovableHandle] = []
        self.discard()

    @property
    def watching(self) -> bool:
        """Whether the coming forward passes are seen; there are hooks only while they are."""
        return self._switch.watching

    @watching.setter
    def watching(self, value: bool) -> None:
        if value and not self._handles:
            for module in self._modules:
                hook = _UsageHook(self._after, self._switch)
                hook.handle = module.register_forward_hook(hook)
                self._handles.append(hook.handle)
        elif not value:
            for handle in self._handles:
                handle.remove()
            self._handles = []
        self._switch.watching = value

    def owners(self, parameter: Tensor) -> Sequence[nn.Module]:
        """The modules that ``parameter`` belongs to."""
        return self._owners.get(id(parameter), ())

    def look(self) -> Seen:
        """What was seen since the last look."""
        seen = Seen(
            frozenset(self._with_grad),
            frozenset(self._without_grad),
            frozenset(self._evaluating),
            self._half,
        )
        self.discard()
        return seen

    def discard(self) -> None:
        """Forget what was seen since the last look."""
        self._with_grad: set[int] = set()
        self._without_grad: set[int] = set()
        self._evaluating: set[int] = set()
        self._half = False

    def close(self) -> None:
        """Take the hooks off the model."""
        self.watching = False
        self.discard()

    def used(self, parameter: Tensor, seen: Seen, *, has_grad: bool) -> tuple[bool | None, bool]:
        """Whether ``parameter`` took part with gradients on, and whether only with them off.

        Not being called says something of torch's own layers alone: others may be used through
        another method than ``forward``, and a few are used through their weights.

        Args:
            parameter: The parameter.
            seen: What was seen in its step.
            has_grad: Whether it has a gradient, which may be zero.
        """
        owners, told, untold = self._facts(parameter)
        if not owners.isdisjoint(seen.with_grad):
            return True, False
        if not seen.with_grad or untold or not owners.isdisjoint(seen.evaluating):
            return None, False
        if not owners.isdisjoint(seen.without_grad):
            return False, True
        return (False if told and not has_grad else None), False

    def _facts(self, parameter: Tensor) -> tuple[frozenset[int], bool, bool]:
        """Owners, whether not being called would say something, whether calls are not seen."""
        facts = self._known.get(id(parameter))
        if facts is None:
            owners = self.owners(parameter)
            ids = frozenset(id(owner) for owner in owners)
            told = bool(owners) and all(map(is_torch_layer, owners))
            facts = self._known[id(parameter)] = ids, told, not ids.isdisjoint(self._untold)
        return facts

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Of a replica the original is meant, which it shares its hooks with but not its identity:
        # then nothing is told of the original.
        if not module.training:
            self._evaluating.add(id(module))
        elif torch.is_grad_enabled():
            self._with_grad.add(id(module))
        else:
            self._without_grad.add(id(module))
        if isinstance(output, Tensor) and output.dtype is torch.float16:
            self._half = True


def is_torch_layer(module: nn.Module) -> bool:
    """Whether ``module`` is, or derives from, a layer that comes with torch."""
    containers = ("torch.nn.modules.module", "torch.nn.modules.container")
    return any(
        base.__module__.startswith("torch.nn.modules.") and base.__module__ not in containers
        for base in type(module).__mro__
    )


def _out_of_sight(model: nn.Module) -> tuple[set[int], set[int]]:
    """Ids of the modules that must have no hook, and of those whose calls hooks do not see."""
    unseen: set[int] = set()
    untold: set[int] = set()
    for module in model.modules():
        parts = {id(part) for part in module.modules()}
        scripted = isinstance(module, torch.jit.ScriptModule)
        # In evaluation it has a fast path, which it leaves if anything in it has a hook.
        if scripted or isinstance(module, nn.TransformerEncoderLayer):
            unseen |= parts
            untold |= parts
        elif isinstance(module, nn.MultiheadAttention):  # uses the weights of what is in it
            untold |= parts - {id(module)}
        elif _is_compiled(module):
            untold |= parts
    return unseen, untold


def _is_compiled(module: nn.Module) -> bool:
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or hasattr(module, "_orig_mod")
