"""Weight decay where it belongs: on matrices, and on recurrent ones by a rate of their own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_gradguard._validation import check_number, check_type
from lightning_gradguard.nn._gates import recurrent_name

# Their weights are scales and look-ups, whatever number of dimensions they have.
_UNDECAYED = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,  # noqa: SLF001 - the only name of all batch and instance norms
    nn.Embedding,
    nn.EmbeddingBag,
)
_RECURRENT = ("weight_hh", "weight_sh")
# If a parameter is shared between modules, the first of these that one of them asks for.
_GROUPS = ("no_decay", "recurrent", "decay")


def weight_decay_groups(
    model: nn.Module, weight_decay: float = 1e-2, *, recurrent: float | None = None
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of a model into the param groups of an optimizer.

    Matrices, and kernels of convolutions, decay. Biases, parameters with fewer than two dimensions,
    and the weights of normalizations and embeddings do not: decay would shrink an offset or a
    scale, which does not make a function simpler, and rows of an embedding that no batch has used.

    Decay of ``weight_hh`` pulls the spectral radius of the recurrent matrix down, so that gradients
    through time vanish sooner: Pascanu et al. 2013, "On the difficulty of training recurrent neural
    networks", note that an L1 or L2 penalty on it keeps a model from long memories. To penalize
    everything but the recurrence, set ``recurrent=0.0``.

    Args:
        model: Model, with the parameters that are to be trained.
        weight_decay: Rate for matrices. Default: that of ``torch.optim.AdamW``.
        recurrent: Rate for the ``weight_hh`` of recurrent modules and cells, by the names that
            torch gives them, and the ``weight_sh`` of a ``TemporalSkipRNN``. Default: the same as
            for other matrices, in one group with them.

    Returns:
        Groups with ``"params"``, ``"weight_decay"`` and ``"name"``: ``"decay"``, ``"no_decay"``,
        ``"recurrent"``, those without parameters left out. Every trainable parameter is in exactly
        one, in the order of ``model.parameters()``; a shared one where its most careful use puts
        it, so the matrix of an output layer tied to an embedding does not decay.

    Raises:
        TypeError: If ``model`` is not a module, or a rate is not a number.
        ValueError: If a rate is negative, or a parameter of a lazy module has no shape yet.

    Example:
        >>> import torch
        >>> model = nn.ModuleDict({"rnn": nn.LSTM(3, 4), "head": nn.Linear(4, 1)})
        >>> groups = weight_decay_groups(model, 0.1, recurrent=0.0)
        >>> [(group["name"], group["weight_decay"], len(group["params"])) for group in groups]
        [('decay', 0.1, 2), ('no_decay', 0.0, 3), ('recurrent', 0.0, 1)]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    check_number("weight_decay", weight_decay, at_least=0)
    rates = {"decay": weight_decay, "no_decay": 0.0}
    if recurrent is not None:
        check_number("recurrent", recurrent, at_least=0)
        rates["recurrent"] = recurrent
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for parameter, group in _placed(model).values():
        members[group if group in rates else "decay"].append(parameter)
    return [
        {"params": members[name], "weight_decay": rate, "name": name}
        for name, rate in rates.items()
        if members[name]
    ]


def _placed(model: nn.Module) -> dict[int, tuple[nn.Parameter, str]]:
    """Each trainable parameter with its group, by identity."""
    placed: dict[int, tuple[nn.Parameter, str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        if is_lazy(parameter):
            raise ValueError(
                f"parameter {path!r} must have a shape: run one batch through the lazy module first"
            )
        group = _group(*_owner(model, path), parameter)
        if id(parameter) in placed:
            group = min(group, placed[id(parameter)][1], key=_GROUPS.index)
        placed[id(parameter)] = (parameter, group)
    return placed


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that a parameter belongs to and its name there, also if it is parametrized."""
    *parts, name = path.split(".")
    # torch.nn.utils.parametrize keeps "weight" as "parametrizations.weight.original".
    if len(parts) >= 2 and parts[-2] == "parametrizations":
        *parts, _, name = parts
    return model.get_submodule(".".join(parts)), name


def _group(owner: nn.Module, name: str, parameter: nn.Parameter) -> str:
    words = name.split("_")
    if parameter.ndim < 2 or "bias" in words or isinstance(owner, _UNDECAYED):
        return "no_decay"
    return "recurrent" if recurrent_name(name) in _RECURRENT else "decay"
