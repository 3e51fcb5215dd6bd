"""What changes the layers of the model: one function per remedy.

A remedy that does not apply, or that the model has already, is `None`.
"""

from __future__ import annotations

from lightning_gradguard.diagnose.findings import Remedy
from lightning_gradguard.diagnose.remedies.code import (
    as_tuple,
    classes_code,
    paths_code,
    put,
    put_at_each,
    put_in_place_of,
)
from lightning_gradguard.diagnose.remedies.model_layers import (
    OF_SEQUENCES,
    RECTIFIERS,
    RECURRENT,
    SATURATING,
    WEIGHTED,
    has_normalization,
    hidden_layers,
    layer_before,
)
from lightning_gradguard.diagnose.time_remedies import module_code
from lightning_gradguard.readings import ModelFacts

_MEASURED = "docs/remedies.md#"
_IN_OPTIMIZER = '{id(p) for g in optimizer.param_groups for p in g["params"]}'
# Hidden layers below which a skip connection spares the gradient next to nothing.
_DEEP = 4


def relu_instead(facts: ModelFacts) -> Remedy | None:
    """ReLU with He initialization for hidden activations that saturate."""
    saturating = [a for _, a in hidden_layers(facts) if facts.kinds[a] in SATURATING]
    if not saturating:
        return None
    kinds = list(dict.fromkeys(facts.kinds[path] for path in saturating))
    classes = as_tuple([f"torch.nn.{SATURATING[kind]}" for kind in kinds])
    if saturating == list(facts.of_kind(*kinds)):
        replaced = put_in_place_of(classes, "torch.nn.ReLU()")
    else:
        paths = paths_code(saturating, classes, facts.of_kind(*kinds))
        replaced = put_at_each(paths, "torch.nn.ReLU()")
    names = " and ".join(kinds)
    return Remedy(
        f"Replace the hidden {names} activations by ReLU, whose slope does not shrink the "
        "gradient, and start the weights with He initialization.",
        f"{replaced}; {_he_code(facts)}",
        _MEASURED + "relu-with-he-initialization",
    )


def relu_here(path: str, facts: ModelFacts) -> Remedy | None:
    """ReLU in the place of one activation that saturates."""
    if facts.kinds.get(path) not in SATURATING or path == list(facts.kinds)[-1]:
        return None
    return Remedy(
        "Replace this activation by ReLU, which does not saturate.",
        put(path, "torch.nn.ReLU()"),
    )


def leaky_relu(path: str, facts: ModelFacts) -> Remedy | None:
    """A slope for the units that are off, in an activation or in the one after a layer."""
    path = dict(hidden_layers(facts)).get(path, path)
    if facts.kinds.get(path) not in RECTIFIERS:
        return None
    return Remedy(
        "Use leaky ReLU here, which passes a gradient to units that are off.",
        put(path, "torch.nn.LeakyReLU(0.1)"),
        _MEASURED + "leaky-relu",
    )


def fresh_layer(path: str, facts: ModelFacts) -> Remedy | None:
    """New weights and biases for the layer that feeds an activation."""
    layer = path if facts.kinds.get(path) in WEIGHTED else layer_before(path, facts)
    if not layer:
        return None
    return Remedy(
        "Start the layer before it afresh, because its weights and biases hold the units at zero.",
        f"{module_code(layer)}.reset_parameters()",
        _MEASURED + "fresh-layer",
    )


def he_weights(facts: ModelFacts) -> Remedy | None:
    """He initialization of every layer of a net with rectifiers."""
    if not facts.of_kind(*WEIGHTED) or not facts.of_kind(*RECTIFIERS):
        return None
    return Remedy(
        "Before training, start the weights with He initialization, which keeps the size of the "
        "signal through ReLU layers.",
        _he_code(facts),
        _MEASURED + "he-initialization",
    )


def kept_scale() -> Remedy:
    """For nets whose activations are not known."""
    return Remedy(
        "Before training, start the weights so that they keep the size of the signal.",
        "[torch.nn.init.xavier_normal_(p) for p in model.parameters() if p.dim() > 1]",
    )


def xavier_weights(facts: ModelFacts) -> Remedy | None:
    """Xavier initialization of every layer of a net whose activations saturate."""
    kinds = [kind for kind in WEIGHTED if facts.of_kind(kind)]
    if not kinds or not facts.of_kind(*SATURATING):
        return None
    return Remedy(
        "Before training, start the weights with Xavier initialization, so that units begin where "
        "their slope is steep.",
        "[torch.nn.init.xavier_uniform_(m.weight) for m in model.modules() "
        f"if isinstance(m, {classes_code(kinds)})]",
        _MEASURED + "xavier-initialization",
    )


def normalization(facts: ModelFacts) -> Remedy | None:
    """Batch normalization in every hidden layer of a model that has none.

    Not in models of sequences, whose layers see a time axis where batch normalization expects the
    features.
    """
    layers = [layer for layer, _ in hidden_layers(facts)]
    if not layers or has_normalization(facts) or facts.of_kind(*OF_SEQUENCES):
        return None
    kinds = [kind for kind in WEIGHTED if any(facts.kinds[layer] == kind for layer in layers)]
    norms = {
        "linear": "torch.nn.BatchNorm1d(m.out_features)",
        "conv": "getattr(torch.nn, f'BatchNorm{m.weight.dim() - 2}d')(m.out_channels)",
    }
    norm = norms[kinds[0]]
    if len(kinds) > 1:
        norm = f"({norm} if isinstance(m, torch.nn.Linear) else {norms[kinds[1]]})"
    paths = paths_code(layers, classes_code(kinds), facts.of_kind(*kinds))
    return Remedy(
        "Before the optimizer is made, put batch normalization before each hidden activation.",
        put_at_each(paths, f"torch.nn.Sequential(m, {norm}.to(m.weight))"),
        _MEASURED + "batch-normalization",
    )


def skip_connections(facts: ModelFacts) -> Remedy | None:
    """A sum with its input for every layer that keeps the width."""
    layers = [layer for layer, _ in hidden_layers(facts)]
    if len(layers) < _DEEP:
        return None
    kinds = [kind for kind in WEIGHTED if any(facts.kinds[layer] == kind for layer in layers)]
    paths = paths_code(layers, classes_code(kinds), facts.of_kind(*kinds))
    hook = "lambda m, x, y: x[0] + y if x[0].shape == y.shape else y"
    return Remedy(
        "Add skip connections around layers that keep the width, a way back on which the gradient "
        "does not shrink.",
        f"[model.get_submodule(p).register_forward_hook({hook}) for p in {paths}]",
        _MEASURED + "skip-connections",
    )


def orthogonal_recurrence(path: str, facts: ModelFacts) -> Remedy | None:
    """Orthogonal recurrent weights, in one module or in all that are recurrent."""
    if facts.kinds.get(path) in RECURRENT:
        scope = module_code(path)
    elif facts.of_kind(*RECURRENT):
        scope = "model"
    else:
        return None
    return Remedy(
        "Before training, start the recurrent weights orthogonal, so that they keep the size of "
        "the gradient.",
        f"[torch.nn.init.orthogonal_(p) for n, p in {scope}.named_parameters() "
        "if 'weight_hh' in n]",
        _MEASURED + "orthogonal-recurrence",
    )


def _he_code(facts: ModelFacts) -> str:
    kinds = [kind for kind in WEIGHTED if facts.of_kind(kind)]
    return (
        "[torch.nn.init.kaiming_normal_(m.weight) for m in model.modules() "
        f"if isinstance(m, {classes_code(kinds)})]"
    )


# -- what does not train --------------------------------------------------------------------------


def into_optimizer(path: str) -> Remedy:
    """Parameters that were forgotten."""
    if path:
        code = f'optimizer.add_param_group({{"params": {module_code(path)}.parameters()}})'
    else:
        code = (
            'optimizer.add_param_group({"params": [p for p in model.parameters() '
            f"if id(p) not in {_IN_OPTIMIZER}]}})"
        )
    return Remedy(
        "Give its parameters to the optimizer.", code, _MEASURED + "parameters-for-the-optimizer"
    )


def freeze(path: str) -> Remedy:
    """Parameters that were left out on purpose; without a path all that no optimizer has."""
    if path:
        code = f"{module_code(path)}.requires_grad_(False)"
    else:
        code = (
            f"[p.requires_grad_(False) for p in model.parameters() if id(p) not in {_IN_OPTIMIZER}]"
        )
    return Remedy(
        "Freeze its parameters if they are meant to stay as they are, which saves their gradient.",
        code,
    )


def unfreeze(path: str) -> Remedy:
    """A freeze that was declared."""
    return Remedy(
        "Let its parameters require a gradient, unless they are frozen on purpose.",
        f"{module_code(path)}.requires_grad_(True)",
    )


def keep_graph(path: str) -> Remedy:
    """No `no_grad`, no `detach`."""
    return Remedy(
        "Call it outside of no_grad, and use its output without detach, item or numpy.",
        f"with torch.enable_grad(): outputs = {module_code(path)}(inputs)",
    )


def list_without_gradient() -> Remedy:
    """Where the way from the loss ends."""
    return Remedy(
        "Use its output in the loss, or leave it out, after a look at what has no gradient.",
        "print([n for n, p in model.named_parameters() if p.grad is None])",
    )
