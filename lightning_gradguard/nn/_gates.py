"""The recurrent parameters of a module: one value per layer and direction, its gates by letter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

# Names of torch.nn.RNN, LSTM, GRU ("weight_hh_l0_reverse") and of their cells ("weight_hh"), and
# the second recurrent matrix of a TemporalSkipRNN.
_RECURRENT_NAME = re.compile(
    r"(weight_ih|weight_hh|weight_hr|weight_sh|bias_ih|bias_hh)(_l\d+(_reverse)?)?"
)
_GATES = {1: ("h",), 3: ("r", "z", "n"), 4: ("i", "f", "g", "o")}
_KINDS = {1: "an Elman RNN", 3: "a GRU", 4: "an LSTM"}


@dataclass(frozen=True, eq=False)
class RecurrentLayer:
    """Parameters of one layer in one direction.

    Attributes:
        hidden_size: Units H; rows of one gate.
        gates: Letters of the gates in the order of their rows: i, f, g, o, or r, z, n, or h alone.
        weight_ih: From the input, shape ``(gates·H, input)``.
        weight_hh: From the state, shape ``(gates·H, H)``, or ``(4H, P)`` with a projection.
        biases: ``bias_ih`` and ``bias_hh``, each ``(gates·H,)``; their sum is what counts.
        weight_hr: Projection of an LSTM's state, shape ``(P, H)``, if there is one.
        weight_sh: From the state some timesteps ago, shape ``(gates·H, H)``, if it is looked at.
    """

    hidden_size: int
    gates: tuple[str, ...]
    weight_ih: Tensor
    weight_hh: Tensor
    biases: tuple[Tensor, ...]
    weight_hr: Tensor | None
    weight_sh: Tensor | None

    @property
    def kind(self) -> str:
        """``"an Elman RNN"``, ``"a GRU"`` or ``"an LSTM"``."""
        return _KINDS[len(self.gates)]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """All of them, in the order in which torch registers and draws them."""
        others = tuple(w for w in (self.weight_hr, self.weight_sh) if w is not None)
        return (self.weight_ih, self.weight_hh, *self.biases, *others)

    def blocks(self, stacked: Tensor) -> dict[str, Tensor]:
        """Return the rows of each gate as views of ``stacked``."""
        return dict(zip(self.gates, stacked.split(self.hidden_size), strict=True))


def recurrent_name(name: str) -> str | None:
    """Return which recurrent parameter a name stands for, as ``"weight_hh"``, or ``None``."""
    match = _RECURRENT_NAME.fullmatch(name)
    return match[1] if match else None


def recurrent_layers(module: nn.Module) -> list[RecurrentLayer]:
    """Return the layers of a module and of those inside it, in order of registration.

    Raises:
        TypeError: If ``module`` is not a module.
        ValueError: If it has none, no ``hidden_size``, or rows that are no gates.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {module!r}")
    layers = []
    for owner in module.modules():
        parameters = dict(owner.named_parameters(recurse=False))
        suffixes = [name[9:] for name in parameters if recurrent_name(name) == "weight_hh"]
        # The layers of a stack may leave their size to the stack.
        hidden_size = getattr(owner, "hidden_size", getattr(module, "hidden_size", None))
        layers += [_layer(owner, parameters, suffix, hidden_size) for suffix in suffixes]
    if not layers:
        raise ValueError(
            "module must have recurrent parameters named as torch's (weight_hh_l0 or weight_hh), "
            f"got {type(module).__name__} with none"
        )
    return layers


def _layer(
    owner: nn.Module, parameters: dict[str, nn.Parameter], suffix: str, hidden_size: object
) -> RecurrentLayer:
    kind = type(owner).__name__
    if not isinstance(hidden_size, int) or hidden_size < 1:
        raise ValueError(f"module must have an integer hidden_size >= 1, got {kind} without")
    input_name, weight_hh = f"weight_ih{suffix}", parameters[f"weight_hh{suffix}"]
    if input_name not in parameters:
        raise ValueError(f"module must have {input_name} next to weight_hh{suffix}, got {kind}")
    count, rest = divmod(weight_hh.shape[0], hidden_size)
    if rest or count not in _GATES:
        raise ValueError(
            f"weight_hh{suffix} of {kind} must have 1, 3 or 4 times hidden_size={hidden_size} "
            f"rows, got shape {tuple(weight_hh.shape)}"
        )
    biases = (parameters.get(f"{name}{suffix}") for name in ("bias_ih", "bias_hh"))
    return RecurrentLayer(
        hidden_size=hidden_size,
        gates=_GATES[count],
        weight_ih=parameters[input_name],
        weight_hh=weight_hh,
        biases=tuple(bias for bias in biases if bias is not None),
        weight_hr=parameters.get(f"weight_hr{suffix}"),
        weight_sh=parameters.get(f"weight_sh{suffix}"),
    )


def layers_of_kind(
    module: nn.Module, caller: str, kinds: Sequence[str], *, bias: bool = True
) -> list[RecurrentLayer]:
    """Return the layers of a module that must all be of certain kinds, with biases.

    Raises:
        ValueError: If one is of another kind or has no bias.
    """
    layers = recurrent_layers(module)
    for layer in layers:
        if layer.kind not in kinds:
            raise ValueError(
                f"{caller} takes only {' or '.join(kinds)}, got {type(module).__name__}, "
                f"which has the gates of {layer.kind}"
            )
        if bias and not layer.biases:
            raise ValueError(f"{caller} needs biases, got {type(module).__name__} with bias=False")
    return layers
