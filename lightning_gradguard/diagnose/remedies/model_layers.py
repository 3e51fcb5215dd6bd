"""Which layers a model has, read off the kinds of its modules in the order of registration."""

from __future__ import annotations

from lightning_gradguard.readings import ModelFacts

WEIGHTED = ("linear", "conv")
RECURRENT = ("rnn", "lstm", "gru")
# Modules whose presence tells that layers see a time axis.
OF_SEQUENCES = (*RECURRENT, "attention", "embedding")
NORMALIZATION = ("batch_norm", "layer_norm", "instance_norm")
# Activations whose slope goes to zero on both sides, with the names of their classes.
SATURATING = {
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "hardsigmoid": "Hardsigmoid",
    "hardtanh": "Hardtanh",
    "softsign": "Softsign",
}
RECTIFIERS = ("relu", "relu6")
_OPEN = ("leakyrelu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish")
_ACTIVATIONS = (*SATURATING, *RECTIFIERS, *_OPEN, "softplus", "hardswish", "logsigmoid")


def hidden_layers(facts: ModelFacts) -> list[tuple[str, str]]:
    """Returns each layer that an activation follows, with that activation's path.

    An activation at the very end of the model is its output and makes no hidden layer. Layers whose
    activation is called as a function are unknown.

    Example:
        >>> kinds = {"0": "linear", "1": "tanh", "2": "linear", "3": "sigmoid"}
        >>> hidden_layers(ModelFacts(kinds=kinds))
        [('0', '1')]
    """
    between = (*NORMALIZATION, "dropout")
    last = list(facts.kinds)[-1] if facts.kinds else ""
    layers, layer = [], ""
    for path, kind in facts.kinds.items():
        if kind in WEIGHTED:
            layer = path
        elif kind in _ACTIVATIONS and layer and path != last:
            layers.append((layer, path))
            layer = ""
        elif kind not in between:
            layer = ""
    return layers


def layer_before(path: str, facts: ModelFacts) -> str:
    """Returns the last linear or convolutional layer before a module; empty if there is none."""
    before = ""
    for name, kind in facts.kinds.items():
        if name == path:
            break
        if kind in WEIGHTED:
            before = name
    else:
        return ""
    return before


def is_first_activation(path: str, facts: ModelFacts) -> bool:
    """Whether no other activation comes before this one."""
    return next((p for p, kind in facts.kinds.items() if kind in _ACTIVATIONS), None) == path


def has_normalization(facts: ModelFacts) -> bool:
    """Whether any layer of the model normalizes."""
    return bool(facts.of_kind(*NORMALIZATION))
