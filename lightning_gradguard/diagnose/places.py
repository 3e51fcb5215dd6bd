"""How places in a model are named in findings."""

from __future__ import annotations


def module_of(parameter: str) -> str:
    """Returns the path of the module that owns a parameter, `"model"` for the root.

    Example:
        >>> module_of("encoder.rnn.weight_hh_l0"), module_of("bias")
        ('encoder.rnn', 'model')
    """
    return parameter.rpartition(".")[0] or "model"


def in_words(where: str) -> str:
    """Returns a place as it reads in a sentence."""
    return "the model" if where == "model" else f"`{where}`"
