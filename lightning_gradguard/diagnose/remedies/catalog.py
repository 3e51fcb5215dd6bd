"""One function per remedy: its sentence, its line of code, its measurement.

A remedy that does not apply, or that the model has already, is `None`.
"""

from __future__ import annotations

from lightning_gradguard.diagnose.findings import Remedy
from lightning_gradguard.diagnose.remedies.code import (
    as_tuple,
    can_be_made,
    classes_code,
    optimizer_with_own_rate,
    paths_code,
    put,
    put_at_each,
    put_in_place_of,
    scaled_optimizer,
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
# Hidden layers below which a skip connection spares the gradient next to nothing.
_DEEP = 4

GUARD = "trainer = Trainer(callbacks=[GradGuard()])"


# -- the step -------------------------------------------------------------------------------------


def lower_rate(facts: ModelFacts) -> Remedy:
    """A tenth of the learning rate, for the same optimizer."""
    return Remedy(
        "Lower the learning rate to a tenth.",
        scaled_optimizer(facts, 0.1),
        _MEASURED + "lower-learning-rate",
    )


def raise_rate(facts: ModelFacts) -> Remedy:
    """Ten times the learning rate."""
    return Remedy(
        "Raise the learning rate tenfold, because steps this small change nothing.",
        scaled_optimizer(facts, 10.0),
        _MEASURED + "higher-learning-rate",
    )


def own_rate(path: str, facts: ModelFacts, factor: float) -> Remedy | None:
    """A learning rate of its own for one module."""
    if not path or not can_be_made(facts):
        return None
    change = "a tenth" if factor < 1.0 else "ten times"
    return Remedy(
        f"Give this layer a learning rate of its own, {change} of the present one.",
        optimizer_with_own_rate(facts, path, factor),
        _MEASURED + "own-learning-rate" if factor < 1.0 else "",
    )


def adaptive_optimizer(facts: ModelFacts) -> Remedy | None:
    """AdamW for a run with SGD."""
    if facts.optimizer not in ("SGD", "ASGD"):
        return None
    return Remedy(
        "Use AdamW, whose steps do not shrink with the gradient.",
        "optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)",
        _MEASURED + "adaptive-optimizer",
    )


def decay_rate(facts: ModelFacts) -> Remedy:
    """A learning rate that falls to the end of the run."""
    steps = facts.planned_steps or 1000
    return Remedy(
        "Let the learning rate fall over the run, so that the steps become smaller than the "
        "valley that they jump across.",
        f"scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, {steps})",
        _MEASURED + "learning-rate-decay",
    )


def warm_up() -> Remedy:
    """A learning rate that rises at the start."""
    return Remedy(
        "Let the learning rate rise over the first steps.",
        "scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=200)",
    )


def guard_bounds() -> Remedy:
    """Clipping and capping."""
    return Remedy(
        "Let the guard clip the gradient and cap the update.",
        GUARD,
        _MEASURED + "clipping-and-capping",
    )


def guard_skips() -> Remedy:
    """Dropping of bad steps."""
    return Remedy(
        "Let the guard drop such steps before they reach the weights.",
        GUARD,
        _MEASURED + "dropping-bad-steps",
    )


def some_rate(facts: ModelFacts) -> Remedy:
    """A rate for groups that have none."""
    rate = facts.lr if facts.lr > 0.0 else 0.001
    return Remedy(
        "Give its parameter group a learning rate above zero.",
        'for group in optimizer.param_groups: group["lr"] = group["lr"] or ' + f"{rate:.3g}",
    )


def clear_gradients() -> Remedy:
    """No sums over steps, and the right sign."""
    return Remedy(
        "Check the sign of the loss and clear the gradients before each backward pass.",
        "optimizer.zero_grad()",
    )


# -- the numbers ----------------------------------------------------------------------------------


def check_batch() -> Remedy:
    """A look at what goes in."""
    return Remedy(
        "Check the batches, and leave out those that hold NaN or infinite values.",
        "assert all(torch.isfinite(t).all() for t in batch)",
    )


def look_at_batch() -> Remedy:
    """Whether one batch is to blame."""
    return Remedy(
        "Look at the batch of this step for wrong labels or values.",
        "print([(t.min().item(), t.max().item()) for t in batch])",
    )


def safe_loss() -> Remedy:
    """No logarithm of zero."""
    return Remedy(
        "Keep logarithms, roots and divisions in the loss away from zero.",
        "loss = -torch.log(probability.clamp_min(1e-8)).mean()",
    )


def anomaly_detection() -> Remedy:
    """Torch's own search for the operation."""
    return Remedy(
        "Run a few steps with anomaly detection, which names the operation at fault.",
        "torch.autograd.set_detect_anomaly(True)",
    )


def bfloat16(facts: ModelFacts) -> Remedy | None:
    """The range of float32 in 16 bits."""
    if "bf16" in facts.precision or facts.precision.startswith(("32", "64")):
        return None
    return Remedy(
        "Use bfloat16, whose range is that of float32.",
        'trainer = Trainer(precision="bf16-mixed")',
        _MEASURED + "bfloat16",
    )


def loss_scaling(facts: ModelFacts) -> Remedy | None:
    """Lightning's GradScaler."""
    if facts.precision not in ("", "16-true"):
        return None
    return Remedy(
        "Use float16 with weights in float32 and a loss that is scaled up before the backward "
        "pass.",
        'trainer = Trainer(precision="16-mixed")',
        _MEASURED + "loss-scaling",
    )


def float32(facts: ModelFacts) -> Remedy | None:
    """All digits."""
    if facts.precision.startswith(("32", "64")):
        return None
    return Remedy(
        "Compute in float32.",
        'trainer = Trainer(precision="32-true")',
        _MEASURED + "float32",
    )


def standardized_inputs(facts: ModelFacts) -> Remedy | None:
    """Inputs of mean zero and deviation one, where the model does not see to it."""
    first = next(iter(facts.kinds.values()), "")
    if first.endswith("_norm") or first == "embedding":
        return None
    return Remedy(
        "Standardize the inputs to a mean of zero and a deviation of one.",
        "inputs = (inputs - inputs.mean(0)) / inputs.std(0).clamp_min(1e-6)",
        _MEASURED + "standardized-inputs",
    )


# -- the layers -----------------------------------------------------------------------------------


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
    known = '{id(p) for g in optimizer.param_groups for p in g["params"]}'
    if path:
        code = f'optimizer.add_param_group({{"params": {module_code(path)}.parameters()}})'
    else:
        code = (
            'optimizer.add_param_group({"params": [p for p in model.parameters() '
            f"if id(p) not in {known}]}})"
        )
    return Remedy(
        "Give its parameters to the optimizer.", code, _MEASURED + "parameters-for-the-optimizer"
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
