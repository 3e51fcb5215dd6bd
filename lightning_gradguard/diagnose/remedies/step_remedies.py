"""What changes the step, its numbers or its data: one function per remedy.

A remedy that does not apply, or that the model has already, is `None`.
"""

from __future__ import annotations

from lightning_gradguard.diagnose.findings import Remedy
from lightning_gradguard.diagnose.remedies.code import (
    can_be_made,
    optimizer_with_own_rate,
    scaled_optimizer,
)
from lightning_gradguard.readings import ModelFacts

_MEASURED = "docs/remedies.md#"
GUARD = "trainer = Trainer(callbacks=[GradGuard()])"


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
