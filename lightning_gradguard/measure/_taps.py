"""Hooks that see gradients pass without changing them, on a user's module and on its tensors.

A module sees a *view* of its input, so that only its own share of the gradient is seen there and
not what reaches the same tensor on another way (``x + rnn(x)``), and so that the user's tensor
stays as it is. What a hook keeps belongs to the graph of its call until a gradient arrives: a graph
that is thrown away, by an exception or a checkpoint's second forward, takes it along.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

# DTensors and nested tensors have norms of another kind; what torch.func wraps is not ours to keep.
_PLAIN = frozenset({Tensor, nn.Parameter})

# Root mean square of elements whose squares are still normal numbers of float32.
FAST_FLOOR = 1e-18


@dataclass
class Switch:
    """What all hooks of a probe share.

    Attributes:
        watching: Whether hooks do anything at all. It is changed between steps: a checkpoint's
            second forward runs inside the backward pass, and has to find what the first one found.
            Whoever steps between the two has changed the weights under the second one anyway.
        exact: Whether the coming forwards are captured for the exact measurement.
        on_error: Told of an error in a hook, which then does nothing; ``None`` to let it be raised
            in the user's forward or backward pass.
    """

    watching: bool = True
    exact: bool = True
    on_error: Callable[[Exception], None] | None = None

    def run(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Run what a hook does."""
        if self.on_error is None:
            return action(*arguments)
        try:
            return action(*arguments)
        except Exception as error:  # noqa: BLE001 - whose error it is, on_error is told
            self.on_error(error)
            return None


class _Hook:
    """A forward hook that sleeps wherever no gradient can be measured.

    A copied model is left without it, and a pickled one takes along a hook that does nothing and
    that needs no package of ours where it is loaded.
    """

    handle: RemovableHandle | None = None

    @property
    def __name__(self) -> str:
        # torch.jit.script asks for it first, and cannot compile a hook that is an object.
        raise AttributeError(
            "a module whose gradient through time is watched cannot be scripted: script a copy of "
            "the model, torch.jit.script(copy.deepcopy(model))"
        )

    def __init__(self, action: Callable[..., Any], switch: Switch) -> None:
        self._action = action
        self._switch = switch

    def __call__(self, *call: Any) -> Any:
        if torch.compiler.is_compiling() or not self._switch.watching:
            return None
        if not torch.is_grad_enabled() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return None
        if forward_ad._current_level >= 0:  # noqa: SLF001 - has no public name
            return None  # what is tapped would lose its tangent
        return self._switch.run(self._action, *call)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        hooks = None if self.handle is None else self.handle.hooks_dict_ref()
        copied = None if hooks is None else memo.get(id(hooks))
        if self.handle is not None and copied is not None:
            # The copy is put into the copied module's hooks after this returns. The memo keeps what
            # is in this list until the whole copy is made, and no longer.
            whole_copy = _WholeCopy()
            memo.setdefault(id(memo), []).append(whole_copy)
            weakref.finalize(whole_copy, copied.pop, self.handle.id, None)
        return contextlib.nullcontext().__exit__


class _WholeCopy:
    """Lives until a deepcopy is complete."""


@functools.cache
def _uncompiled_hook() -> type[_Hook]:
    # Made when it is first needed: it imports the compiler.
    class UncompiledHook(_Hook):
        __call__ = torch.compiler.disable(_Hook.__call__)

    return UncompiledHook


class _EvalHook(_Hook):
    """A forward pre-hook that wakes in evaluation only."""

    def __call__(self, module: nn.Module, *call: Any) -> Any:
        if not (torch.compiler.is_compiling() or torch.is_grad_enabled() or module.training):
            self._switch.run(self._action)


def attach(
    module: nn.Module,
    switch: Switch,
    *,
    before: Callable[..., Any] | None = None,
    after: Callable[..., None],
) -> list[RemovableHandle]:
    """See the calls of a module in training.

    Args:
        module: The module.
        switch: Of the probe.
        before: Gets the module, its arguments and keyword arguments; returns others to be used
            instead, or ``None``.
        after: Gets the module, its arguments and its output.

    ``torch.compile`` leaves fused recurrent modules out of its graphs, but would compile their
    hooks, as if what they do belonged to the user's program: theirs are kept from it. The hooks of
    other modules become part of a graph, in which they do nothing, and do not break it.
    """
    kind: type[_Hook] = _Hook
    if isinstance(module, nn.RNNBase) and not _compiles_recurrent_modules():
        kind = _uncompiled_hook()
    handles = []
    if before is not None:
        first = kind(before, switch)
        first.handle = module.register_forward_pre_hook(first, with_kwargs=True)
        handles.append(first.handle)
    last = kind(after, switch)
    last.handle = module.register_forward_hook(last)
    return [*handles, last.handle]


def attach_to_evaluation(
    module: nn.Module, switch: Switch, action: Callable[[], None]
) -> RemovableHandle:
    """Call ``action`` before each call of ``module`` in eval mode and without gradients."""
    hook = _EvalHook(action, switch)
    hook.handle = module.register_forward_pre_hook(hook)
    return hook.handle


def _compiles_recurrent_modules() -> bool:
    import torch._dynamo.config as config

    return bool(getattr(config, "allow_rnn", False))


def is_plain(value: Any) -> TypeGuard[Tensor]:
    """Whether ``value`` is a floating tensor whose gradient can be measured here."""
    return (
        type(value) in _PLAIN
        and value.is_floating_point()
        and not value.is_meta
        and not value.is_inference()
        and not _is_transformed(value)
    )


def _is_transformed(value: Tensor) -> bool:
    """Whether it stands for many tensors or is followed by torch.func, whose it then is.

    ``is_grads_batched`` and ``jacobian(vectorize=True)`` make tensors of the older kind.
    """
    functorch = torch._C._functorch  # noqa: SLF001 - has no public name
    if functorch.peek_interpreter_stack() is not None:
        return True
    is_batched = getattr(functorch, "is_legacy_batchedtensor", None)
    return is_batched is not None and bool(is_batched(value))


def trains(module: nn.Module) -> bool:
    """Whether any parameter of ``module`` gets a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())


def tap(tensor: Tensor, arrived: Callable[[Tensor], None], switch: Switch) -> Tensor:
    """A view of ``tensor`` that requires grad and reports its gradient, once per backward."""
    if tensor.requires_grad:
        view = tensor.view_as(tensor)
    else:
        view = tensor.detach().requires_grad_()
        # The gradient ends here; it need not wait in memory until the graph is gone.
        view.register_post_accumulate_grad_hook(_drop_grad)
    listen(view, arrived, switch)
    return view


def listen(tensor: object, arrived: Callable[[Tensor], None], switch: Switch) -> None:
    """Report the gradient of ``tensor``, if it gets one."""
    if not is_plain(tensor) or not tensor.requires_grad:
        return

    def report(grad: Tensor | None) -> None:
        if grad is not None:
            switch.run(take, grad)

    def take(grad: Tensor) -> None:
        if _is_transformed(grad):
            return
        if not torch.is_grad_enabled():
            arrived(grad)
            return
        with torch.no_grad():  # as backward(create_graph=True) leaves it on
            arrived(grad.detach())

    tensor.register_hook(report)


def _drop_grad(leaf: Tensor) -> None:
    leaf.grad = None


def feature_norms(grad: Tensor, dims: Iterable[int] = (-1,), *, fast: bool = False) -> Tensor:
    """Norms over ``dims``, in float64 since squares of a vanished gradient leave float32's range.

    The gradient of a mean or a sum repeats itself along the dimensions that went into it; what is
    repeated is computed once.

    Args:
        grad: The gradient.
        dims: Its feature dimensions.
        fast: Sum squares in float32 where that is the gradient's dtype or a wider one: about four
            times as fast on a CPU, but only down to :data:`FAST_FLOOR`.
    """
    narrow = grad.device.type == "mps" or (fast and grad.dtype is not torch.float64)
    dtype = torch.float32 if narrow else torch.float64
    dims = [dim % grad.dim() for dim in dims]
    if not dims:
        return grad.abs().to(dtype)
    shape = [size for dim, size in enumerate(grad.shape) if dim not in dims]
    if 0 in grad.stride():
        for dim, stride in enumerate(grad.stride()):
            if stride == 0 and grad.shape[dim] > 1 and dim not in dims:
                grad = grad.narrow(dim, 0, 1)
    norms: Tensor = torch.linalg.vector_norm(grad, dim=dims, dtype=dtype)
    return norms.expand(shape)
