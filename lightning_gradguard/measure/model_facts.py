"""What is known of a model and its optimizer without measuring anything."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.measure._activation_kinds import activation_kind
from lightning_gradguard.measure._layers import clean_name
from lightning_gradguard.nn import DilatedRNN, TemporalAttention
from lightning_gradguard.readings import ModelFacts

# The first that a class derives from decides.
_KINDS: dict[str, str] = {
    "Linear": "linear",
    "Bilinear": "linear",
    "_ConvNd": "conv",
    "Embedding": "embedding",
    "EmbeddingBag": "embedding",
    "LSTM": "lstm",
    "LSTMCell": "lstm",
    "GRU": "gru",
    "GRUCell": "gru",
    "RNN": "rnn",
    "RNNCell": "rnn",
    "_BatchNorm": "batch_norm",
    "_InstanceNorm": "layer_norm",
    "LayerNorm": "layer_norm",
    "RMSNorm": "layer_norm",
    "GroupNorm": "layer_norm",
    "_DropoutNd": "dropout",
    "MultiheadAttention": "attention",
}
_IN_TRAINING = frozenset({"batch_norm", "layer_norm", "dropout"})
# Activations without a flat side, which are not watched, under torch's names for them.
_OTHER_ACTIVATIONS = frozenset(
    {"LeakyReLU", "PReLU", "RReLU", "Softmax", "LogSoftmax", "LogSigmoid", "GLU", "Threshold"}
)


def model_facts(model: nn.Module, optimizer: Optimizer) -> ModelFacts:
    """Describe a model and its optimizer; precision and planned steps are for the caller to add.

    Kinds are those of modules without children. Attention and parametrized modules count as such,
    and what is in them is left out. Every normalization that is not over the batch counts as
    ``"layer_norm"``. Of a stack of dilated layers both the stack, ``"dilated"``, and its layers are
    there.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Dropout(0.1))
        >>> facts = model_facts(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        >>> facts.kinds, facts.training, facts.momentum
        ({'0': 'linear', '1': 'relu', '2': 'dropout'}, {'2': True}, 0.9)
    """
    kinds: dict[str, str] = {}
    training: dict[str, bool] = {}
    inside: set[int] = set()
    for raw, module in model.named_modules():
        kind = kind_of(module)
        whole = kind == "attention" or nn.utils.parametrize.is_parametrized(module)
        if whole:
            inside.update(id(part) for part in module.modules() if part is not module)
        known = whole or kind == "dilated" or next(module.children(), None) is None
        if id(module) in inside or not known:
            continue
        name = clean_name(f"{raw}.").rstrip(".")
        kinds[name] = kind
        if kind in _IN_TRAINING:
            training[name] = module.training
    group: dict[str, Any] = optimizer.param_groups[0] if optimizer.param_groups else {}
    return ModelFacts(
        optimizer=type(optimizer).__name__,
        # What the user has set: a scheduler keeps it under this name, and moves the other.
        lr=host_value(group.get("initial_lr", group.get("lr"))),
        momentum=_or_zero(host_value(group.get("momentum", 0.0))),
        weight_decay=_or_zero(host_value(group.get("weight_decay", 0.0))),
        kinds=kinds,
        training=training,
    )


def kind_of(module: nn.Module) -> str:
    """What ``module`` is, as in :class:`ModelFacts`."""
    for base in type(module).__mro__:
        if base.__module__.startswith("torch.nn.modules."):
            if base.__name__ in _KINDS:
                return _KINDS[base.__name__]
            if base.__name__ in _OTHER_ACTIVATIONS:
                return base.__name__.lower()
    if isinstance(module, TemporalAttention):
        return "attention"
    if isinstance(module, DilatedRNN):
        return "dilated"
    activation = activation_kind(module)
    return "other" if activation is None else activation.name


def host_value(value: Any) -> float:
    """A number of an optimizer's settings; NaN if reading it would make the host wait."""
    if isinstance(value, Tensor):
        known = value.device.type == "cpu" and value.numel() == 1
        return float(value.item()) if known else math.nan
    return float(value) if isinstance(value, int | float) else math.nan


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
