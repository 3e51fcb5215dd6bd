"""Gradients of a loss that are returned, and accumulated nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Its backward runs a backward of its own, which accumulates: it refuses torch.autograd.grad.
_REENTRANT = "CheckpointFunctionBackward"


def gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """The gradient of each parameter, ``None`` where the loss does not depend on it.

    The backward pass goes to every leaf that the loss depends on, so that gradient hooks on other
    tensors see what they would see in training. Hooks that wait for an accumulated gradient
    (``DistributedDataParallel``'s, optimizers that step within the backward pass) stay asleep.

    Args:
        loss: Scalar; its graph is freed.
        parameters: Parameters without ``.grad``.

    Raises:
        ValueError: If the loss needs ``backward()``, as reentrant checkpoints do, and that would
            set off hooks on parameters.
    """
    leaves, reentrant = _leaves(loss)
    if reentrant:
        return _backward(loss, parameters)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    of = {id(leaf): grad for leaf, grad in zip(leaves, grads, strict=True)}
    return [of.get(id(parameter)) for parameter in parameters]


def _leaves(loss: Tensor) -> tuple[list[Tensor], bool]:
    """All leaves that ``loss`` depends on, and whether a reentrant checkpoint is on the way."""
    waiting: list[Any] = [torch.autograd.graph.get_gradient_edge(loss).node]
    seen = set(waiting)
    leaves, reentrant = [], False
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        reentrant = reentrant or type(node).__name__ == _REENTRANT
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return leaves, reentrant


def _backward(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in parameters):
        raise ValueError(
            "module must not have both checkpoints with use_reentrant=True and parameters with "
            "hooks on their accumulated gradient, which might change it; got both"
        )
    loss.backward()
    grads = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return grads
