"""Run a model on one process of several, which must not wait for the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_COLLECTIVES = frozenset({"c10d", "c10d_functional", "_c10d_functional"})


@contextlib.contextmanager
def alone(module: nn.Module) -> Iterator[None]:
    """Let hooks on every part of ``module`` be called, and no collective be started.

    Raises:
        ValueError: Inside the block, at a collective: the other processes would not take part.
    """
    with contextlib.ExitStack() as stack:
        if any(_is_compiled(part) for part in module.modules()):
            # Compiled code would be compiled anew for the hooks, or leave them out.
            set_stance: Any = getattr(torch.compiler, "set_stance", None)
            if set_stance is not None:  # from torch 2.6 on
                stack.enter_context(set_stance("force_eager"))
        distributed = torch.distributed
        if (
            distributed.is_available()
            and distributed.is_initialized()
            and distributed.get_world_size() > 1
        ):
            stack.enter_context(_NoCollectives())  # type: ignore[no-untyped-call]
        yield


def _is_compiled(module: nn.Module) -> bool:
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or type(module).__name__ == "OptimizedModule"


class _NoCollectives(TorchDispatchMode):
    """Raises where one process would wait for ever."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "namespace", "") in _COLLECTIVES:
            raise ValueError(
                f"module must not need other processes for its loss, but it starts {func}, in "
                "which they would have to take part"
            )
        call: Callable[..., Any] = func
        return call(*args, **(kwargs or {}))
