"""Which tensors may move less far than the others: those whose changes compound over time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_gradguard.respond.update_cap import UpdateCap


def cap_allowances(model: nn.Module, parameters: Sequence[Tensor], cap: UpdateCap) -> list[float]:
    """What the cap is multiplied by for each tensor; empty if it is 1 for all.

    The state of a ReLU RNN is multiplied by the same matrix at every timestep, and nothing bounds
    it: when that matrix grows by a share s, what passes through T steps grows by (1 + s)^T. A tanh
    saturates and gates forget, so the recurrent weights of other modules move as far as any.

    Args:
        model: Its recurrent modules are looked for.
        parameters: The tensors.
        cap: Says how far recurrent weights of ReLU RNNs may move.

    Example:
        >>> model = nn.RNN(2, 3, nonlinearity="relu")
        >>> cap_allowances(model, list(model.parameters()), UpdateCap())
        [1.0, 0.05, 1.0, 1.0]
        >>> cap_allowances(model, [model.bias_hh_l0], UpdateCap())
        []
    """
    compounding = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.RNN | nn.RNNCell) and module.nonlinearity != "tanh"
        for name, parameter in module.named_parameters()
        if "weight_hh" in name
    }
    if cap.relu_recurrence == 1.0 or not any(id(p) in compounding for p in parameters):
        return []
    return [cap.relu_recurrence if id(p) in compounding else 1.0 for p in parameters]
