"""Hooks that see which module is the first to make something that is not finite.

Nothing is kept of the tensors but whether they are finite, and of the first that is not, where.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric
from typing_extensions import Self

from lightning_gradguard.dry_run.finite import Sequences, Slices, is_finite, tensors_of
from lightning_gradguard.measure import clean_name
from lightning_gradguard.measure._taps import Switch, is_plain, listen, tap


class Call:
    """One call of a module.

    Attributes:
        module: The module.
        path: Its path.
        number: Which of its calls.
        entry: Where an input was not finite; ``None`` if all were.
        carried: Whether an input that was not finite came from an attribute of the model.
        poisoned: Whether a gradient of its output was not finite.
    """

    def __init__(self, module: nn.Module, path: str, number: int) -> None:
        self.module = module
        self.path = path
        self.number = number
        self.entry: Slices | None = None
        self.carried = False
        self.poisoned = False

    @property
    def step(self) -> int | None:
        """The timestep, of a cell that is called once for each."""
        return self.number if isinstance(self.module, nn.RNNCellBase) else None

    def is_inside(self, other: Call) -> bool:
        """Whether its module is a part of the other's."""
        return self.path.startswith(f"{other.path}." if other.path else "")


@dataclass(frozen=True, eq=False)
class Sight:
    """Something that is not finite.

    Attributes:
        call: Of the module where it was seen.
        slices: Where it is along time and samples.
        carried: Whether it came from an attribute of the model, as a state does that is kept from
            batch to batch.
    """

    call: Call
    slices: Slices
    carried: bool = False


class FirstNonFinite:
    """Watches all modules of a model, in one forward pass and its backward pass.

    Metrics are left out, as the loss does not depend on what they return, and so is TorchScript,
    which takes no hooks: what it makes counts for the module that calls it.

    Args:
        model: The model.
        state: Tensors that its attributes hold.

    Attributes:
        made: The first call with an output that is not finite although its inputs are.
        passed_on: The first call with both not finite.
        backward: The first call, on the way back, from which the gradient of an input is not
            finite although those of its outputs are.
        arrived: Where the first gradient of an output was that is not finite.
        layouts: Axis of time of tensors by their first two sizes, as recurrent modules tell it.
    """

    def __init__(self, model: nn.Module, state: Iterable[Tensor] = ()) -> None:
        self.made: Sight | None = None
        self.passed_on: Sight | None = None
        self.backward: Sight | None = None
        self.arrived: Sight | None = None
        self.layouts: dict[tuple[int, ...], int] = {}
        self._state = {tensor.data_ptr() for tensor in state} - {0}
        self._forward = True
        self._stack: list[Call] = []
        self._calls: list[Call] = []  # as they ended
        self._numbers: Counter[str] = Counter()
        self._switch = Switch()
        self._handles: list[RemovableHandle] = []
        for path, module in model.named_modules():
            if not isinstance(module, (Metric, torch.jit.ScriptModule)):
                self._attach(module, clean_name(path))

    def _attach(self, module: nn.Module, path: str) -> None:
        before = partial(self._before, path)
        self._handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(self._after),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def turn_back(self) -> None:
        """The forward pass is over; what runs from now on is the backward pass."""
        self._forward = False

    def with_bad_weights(self, bad: Collection[int]) -> Call | None:
        """The last module to whose weights the gradient comes finite and is not, there.

        Args:
            bad: Ids of the parameters whose gradient is not finite.
        """
        poisoned = {call.path for call in self._calls if call.poisoned}
        suspects = {
            call.path: call
            for call in reversed(self._calls)
            if call.path not in poisoned
            and any(id(parameter) in bad for parameter in call.module.parameters())
        }
        for path, call in suspects.items():
            if not any(o.is_inside(call) for other, o in suspects.items() if other != path):
                return call
        return None

    # -- hooks -----------------------------------------------------------------------------------

    def _before(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = Call(module, path, self._numbers[path])
        self._numbers[path] += 1
        self._stack.append(call)
        if self._forward:
            self._read_inputs(call, [value for _, value in tensors_of((args, kwargs))])
        if not torch.is_grad_enabled():
            return None
        # Also in a second forward pass of a checkpoint, which has to find what the first one did.
        views: dict[int, Tensor] = {}
        tapped = [self._tapped(value, call, views, n) for n, value in enumerate(args)]
        named = {name: self._tapped(value, call, views, 1) for name, value in kwargs.items()}
        return tuple(tapped), named

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._ended(module)
        if call is None:
            return
        self._calls.append(call)
        outputs = [value for _, value in tensors_of(output)]
        if self._forward and self.made is None:
            self._read_outputs(call, outputs)
        if torch.is_grad_enabled():
            for position, value in enumerate(outputs):
                tensor = value.data if isinstance(value, PackedSequence) else value
                listen(tensor, partial(self._take_output, call, value, position), self._switch)

    def _ended(self, module: nn.Module) -> Call | None:
        """The call that has ended; those of it that an exception has ended have no hook."""
        while self._stack:
            call = self._stack.pop()
            if call.module is module:
                return call
        return None

    # -- forward ---------------------------------------------------------------------------------

    def _read_inputs(self, call: Call, inputs: list[Sequences]) -> None:
        if inputs:
            self._learn_layout(call.module, inputs[0])
        if self.made is not None:
            return
        for position, value in enumerate(inputs):
            # What comes after the first may be a mask that is added to attention scores.
            if not is_finite(value, mask=position > 0):
                tensor = value.data if isinstance(value, PackedSequence) else value
                call.carried = call.carried or tensor.data_ptr() in self._state
                if call.entry is None:
                    call.entry = Slices.of(value, call.module, position)

    def _learn_layout(self, module: nn.Module, value: Sequences) -> None:
        if isinstance(value, PackedSequence):
            timesteps, samples = len(value.batch_sizes), int(value.batch_sizes[0])
            time = 0
        else:
            batch_first = getattr(module, "batch_first", None)
            if not isinstance(batch_first, bool) or value.dim() != 3:
                return
            time = int(batch_first)
            timesteps, samples = value.shape[time], value.shape[1 - time]
        sizes = (timesteps, samples) if time == 0 else (samples, timesteps)
        self.layouts.setdefault(sizes, time)
        self.layouts.setdefault(sizes[::-1], 1 - time)

    def _read_outputs(self, call: Call, outputs: list[Sequences]) -> None:
        for position, value in enumerate(outputs):
            if is_finite(value):
                continue
            if call.entry is not None:
                self.passed_on = self.passed_on or Sight(call, call.entry, call.carried)
            elif self.passed_on is not None and self.passed_on.call.is_inside(call):
                # Its own code did it, on the way to that part.
                self.made = Sight(call, self.passed_on.slices, self.passed_on.carried)
            else:
                self.made = Sight(call, Slices.of(value, call.module, position))
            return

    # -- backward --------------------------------------------------------------------------------

    def _tapped(self, value: Any, call: Call, views: dict[int, Tensor], position: int) -> Any:
        """The same value, with every tensor as a view that reports its gradient.

        Lists and mappings stay as they are, since the module may put something into them.
        """
        if isinstance(value, PackedSequence):
            data = self._tapped(value.data, call, views, position)
            return value if data is value.data else value._replace(data=data)
        if type(value) is tuple:
            return tuple(self._tapped(part, call, views, position) for part in value)
        if not isinstance(value, Tensor) or not is_plain(value):
            return value
        # Torch's own do not change their input; from others a leaf might be refused.
        if not value.requires_grad and not (isinstance(call.module, nn.RNNBase) and position == 0):
            return value
        if id(value) not in views:  # attention asks whether its inputs are the same tensor
            views[id(value)] = tap(value, partial(self._take_input, call, position), self._switch)
        return views[id(value)]

    def _take_output(self, call: Call, value: Sequences, position: int, grad: Tensor) -> None:
        if self.backward is None and not call.poisoned and not is_finite(grad):
            call.poisoned = True
            if self.arrived is None:
                self.arrived = Sight(call, Slices.of(grad, call.module, position))

    def _take_input(self, call: Call, position: int, grad: Tensor) -> None:
        if self.backward is None and not call.poisoned and not is_finite(grad):
            self.backward = Sight(call, Slices.of(grad, call.module, position))
