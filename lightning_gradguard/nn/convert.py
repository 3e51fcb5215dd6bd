"""Recurrent modules of torch turned into those of this package, with the same parameters."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar, overload

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_gradguard._validation import check_type
from lightning_gradguard.nn._gates import recurrent_layers
from lightning_gradguard.nn.dilated import DilatedRNN
from lightning_gradguard.nn.rnn import GRU, LSTM, RNN

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)

# What a module of torch or of ours can have, with the values that need not be said.
_TAKEN = {
    "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False,
    "proj_size": 0, "nonlinearity": "tanh", "negative_slope": 0.01, "residual": False,
}  # fmt: skip
_OF_THE_WEIGHTS = ("input_size", "hidden_size", "num_layers", "bias", "bidirectional", "proj_size")
_REFUSED = {
    **dict.fromkeys(_OF_THE_WEIGHTS, "it is that of rnn"),
    **dict.fromkeys(("init", "t_max", "forget_bias"), "the weights are those of rnn"),
    **dict.fromkeys(("device", "dtype"), "it is that of rnn, which can be moved before"),
}


@overload
def from_torch(rnn: nn.LSTM, kind: None = None, **options: Any) -> LSTM: ...
@overload
def from_torch(rnn: nn.GRU, kind: None = None, **options: Any) -> GRU: ...
@overload
def from_torch(rnn: nn.RNN, kind: None = None, **options: Any) -> RNN: ...
@overload
def from_torch(
    rnn: nn.LSTM | nn.GRU | nn.RNN, kind: type[_ModuleT], **options: Any
) -> _ModuleT: ...
def from_torch(
    rnn: nn.LSTM | nn.GRU | nn.RNN, kind: type[nn.Module] | None = None, **options: Any
) -> nn.Module:
    """Make one of our modules out of one of torch's.

    The result has the same parameters, not copies of them: an optimizer made before goes on with
    them, and they train through both modules. Parameters that only the new module has are on the
    same device and in the same dtype, and start as its class lets them start. Hooks stay
    behind, and what a subclass of torch's module does besides.

    Args:
        rnn: An ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, or one of ours, which are such modules too.
        kind: Class with the same gates, as ``SkipLSTM`` for an LSTM. Default: :class:`LSTM`,
            :class:`GRU` or :class:`RNN`.
        options: For its constructor, besides what it takes over from ``rnn``; ``batch_first``,
            ``dropout``, ``residual`` and the nonlinearity may be others than those of ``rnn``.

    Raises:
        TypeError: If ``rnn`` or ``kind`` has the wrong type, ``kind`` has other gates, or its
            constructor does not know an option.
        ValueError: If ``kind`` lacks something that ``rnn`` has, an option contradicts its
            weights, or its weights are parametrized.

    Example:
        >>> model = nn.ModuleDict({"rnn": nn.LSTM(3, 8, num_layers=2), "head": nn.Linear(8, 1)})
        >>> model.set_submodule("rnn", from_torch(model.get_submodule("rnn"), residual=True))
        >>> model["rnn"]
        LSTM(3, 8, num_layers=2, residual=True)
    """
    check_type("rnn", rnn, (nn.LSTM, nn.GRU, nn.RNN), "an nn.LSTM, nn.GRU or nn.RNN")
    if kind is None:
        kind = LSTM if isinstance(rnn, nn.LSTM) else GRU if isinstance(rnn, nn.GRU) else RNN
    check_type("kind", kind, type, "a class of recurrent modules")
    if not issubclass(kind, nn.Module):
        raise TypeError(f"kind must be a class of recurrent modules, got {kind!r}")
    if is_parametrized(rnn):
        raise ValueError(
            "rnn must not be parametrized: its weights are computed from others; remove that "
            "first, with torch.nn.utils.parametrize.remove_parametrizations"
        )
    weight = rnn.all_weights[0][0]
    new = kind(**_arguments(rnn, kind, options), device=weight.device, dtype=weight.dtype)
    _share(rnn, new)
    return new.train(rnn.training)


def _arguments(rnn: nn.RNNBase, kind: type[nn.Module], options: dict[str, Any]) -> dict[str, Any]:
    """For the constructor of ``kind``."""
    known = _known(kind)
    for name, value in options.items():
        if name not in known:
            raise TypeError(
                f"options must be arguments of {kind.__name__} ({', '.join(known)}), got {name!r}"
            )
        why = _REFUSED.get(name)
        if why:
            raise ValueError(f"{name} must be left out: {why}, got {value!r}")
    taken: dict[str, Any] = {"input_size": rnn.input_size, "hidden_size": rnn.hidden_size}
    for name, default in _TAKEN.items():
        value = getattr(rnn, name, default)
        if name not in options and value != default:
            taken[name] = value
    if options.get("nonlinearity", "leaky_relu") != "leaky_relu":
        taken.pop("negative_slope", None)
    for name, value in taken.items():
        if name not in known:
            raise ValueError(
                f"rnn must not have {name}={value!r} to become {kind.__name__}, which knows none"
            )
    return {**taken, **options}


def _known(kind: type[nn.Module]) -> list[str]:
    """Arguments of its constructor, by name."""
    known: list[str] = ["nonlinearity"] if issubclass(kind, nn.RNN) else []
    for base in kind.__mro__:
        if "__init__" in vars(base):
            arguments = list(inspect.signature(base).parameters.values())
            names = [
                a.name for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)
            ]
            known += [name for name in names if name not in known]
            if all(argument.kind is not argument.VAR_KEYWORD for argument in arguments):
                break
    if "hidden_size" not in known:
        raise TypeError(f"kind must be a class of recurrent modules, got {kind.__name__}")
    return known


def _share(rnn: nn.RNNBase, new: nn.Module) -> None:
    """Let ``new`` have the parameters of ``rnn``."""
    old_gates, new_gates = recurrent_layers(rnn)[0].kind, recurrent_layers(new)[0].kind
    if old_gates != new_gates:
        raise TypeError(
            f"kind must have the gates of {old_gates}, like rnn, got {type(new).__name__}, which "
            f"has those of {new_gates}"
        )
    own = dict(new.named_parameters())
    parameters = dict(rnn.named_parameters(recurse=False))
    place = new.path_of if isinstance(new, DilatedRNN) else str
    paths = {name: place(name) for name in parameters}
    for name, parameter in parameters.items():
        if paths[name] not in own or own[paths[name]].shape != parameter.shape:
            raise ValueError(
                f"rnn must have only parameters that {type(new).__name__} has too, got {name} of "
                f"shape {tuple(parameter.shape)}"
            )
    for name, parameter in parameters.items():
        owner, _, own_name = paths[name].rpartition(".")
        setattr(new.get_submodule(owner), own_name, parameter)
    for module in new.modules():  # laid out for kernels of all layers, it may run one by one
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
