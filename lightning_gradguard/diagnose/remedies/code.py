"""Lines of code that run on the model at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_gradguard.diagnose.time_remedies import module_code
from lightning_gradguard.readings import ModelFacts

# Optimizers of torch that take a learning rate and a weight decay. Others are only told their rate.
_OPTIMIZERS = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD",
)  # fmt: skip
_WITH_MOMENTUM = ("SGD", "RMSprop")
_DECAY_BY_DEFAULT = {"AdamW": 0.01}
_CLASSES = {
    "linear": "torch.nn.Linear",
    "conv": "torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d",
}
# Paths that a line of code can list and still be read.
_MOST_PATHS = 6


def scaled_optimizer(facts: ModelFacts, factor: float, parameters: str = "") -> str:
    """Returns a line that makes the same optimizer with its rate times `factor`.

    Where its class or rate is not known, the line changes the rate of the optimizer that is there.

    Args:
        facts: Class, rate, momentum and weight decay.
        factor: What to multiply the rate by.
        parameters: What it is given; all parameters of the model if empty.
    """
    if not can_be_made(facts):
        return f'for group in optimizer.param_groups: group["lr"] *= {factor:g}'
    return _optimizer(facts, factor * facts.lr, parameters or "model.parameters()")


def optimizer_with_own_rate(facts: ModelFacts, path: str, factor: float) -> str:
    """Returns a line that gives one module a rate of its own, the present one times `factor`."""
    mine = f"{module_code(path)}.parameters()"
    others = f"p for n, p in model.named_parameters() if not n.startswith({path + '.'!r})"
    groups = f'[{{"params": [{others}]}}, {{"params": {mine}, "lr": {factor * facts.lr:.3g}}}]'
    return _optimizer(facts, facts.lr, groups)


def can_be_made(facts: ModelFacts) -> bool:
    """Whether enough is known about the optimizer to make it again."""
    return facts.optimizer in _OPTIMIZERS and math.isfinite(facts.lr) and facts.lr > 0.0


def put(path: str, new: str) -> str:
    """Returns a line that puts `new` in the place of a module.

    Example:
        >>> put("act", "torch.nn.ReLU()"), put("net.1", "torch.nn.ReLU()")
        ('model.act = torch.nn.ReLU()', "setattr(model.net, '1', torch.nn.ReLU())")
    """
    code = module_code(path)
    if not code.startswith("model.get_submodule"):
        return f"{code} = {new}"
    parent, _, name = path.rpartition(".")
    return f"setattr({module_code(parent)}, {name!r}, {new})"


def put_at_each(paths: str, new: str) -> str:
    """Returns an expression that puts `new` in the place of each module `m` of these paths `p`."""
    parent, name = "p.rpartition('.')[0]", "p.rpartition('.')[2]"
    each = f"(p, model.get_submodule(p)) for p in {paths}"
    return f"[setattr(model.get_submodule({parent}), {name}, {new}) for p, m in [{each}]]"


def put_in_place_of(classes: str, new: str) -> str:
    """Returns an expression that puts `new` in the place of every module of these classes."""
    children = f"for n, m in list(parent.named_children()) if isinstance(m, {classes})"
    return f"[setattr(parent, n, {new}) for parent in list(model.modules()) {children}]"


def paths_code(paths: Sequence[str], classes: str, every: Sequence[str]) -> str:
    """Returns an expression for these paths, by their class where there are many.

    Args:
        paths: Paths of the modules.
        classes: Their classes, as code.
        every: All modules of these classes; if `paths` are not the first of them, they are listed.
    """
    if len(paths) <= _MOST_PATHS or list(paths) != list(every)[: len(paths)]:
        return "[" + ", ".join(repr(path) for path in paths) + "]"
    found = f"[n for n, m in model.named_modules() if isinstance(m, {classes})]"
    return found if len(paths) == len(every) else f"{found}[:{len(paths)}]"


def classes_code(kinds: Sequence[str]) -> str:
    """Returns the classes of layers of these kinds, as code for `isinstance`."""
    return as_tuple([_CLASSES[kind] for kind in kinds])


def as_tuple(classes: Sequence[str]) -> str:
    """Returns classes as `isinstance` takes them."""
    joined = ", ".join(classes)
    return f"({joined})" if "," in joined else joined


def _optimizer(facts: ModelFacts, lr: float, parameters: str) -> str:
    options = f"lr={lr:.3g}"
    if facts.momentum and facts.optimizer in _WITH_MOMENTUM:
        options += f", momentum={facts.momentum:.3g}"
    if facts.weight_decay != _DECAY_BY_DEFAULT.get(facts.optimizer, 0.0):
        options += f", weight_decay={facts.weight_decay:.3g}"
    return f"optimizer = torch.optim.{facts.optimizer}({parameters}, {options})"
