"""Parameters whose gradients are given."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def with_grads(*grads: Tensor | None) -> list[tuple[str, nn.Parameter]]:
    named = []
    for i, grad in enumerate(grads):
        like = torch.zeros(2) if grad is None else grad
        parameter = nn.Parameter(torch.zeros(like.shape, dtype=like.dtype, device=like.device))
        parameter.grad = grad
        named.append((f"layer_{i}.weight", parameter))
    return named
