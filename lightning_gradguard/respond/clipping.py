"""What gradients are clipped to: the strategies to choose from.

All but two compare the norm of a *segment* with a threshold: of all gradients together, of each
parameter group or of each layer, by their ``scope``. :class:`ValueClip` judges every element and
:class:`AGC` by default every unit alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lightning_gradguard._validation import check_choice, check_number

ClipScope: TypeAlias = Literal["global", "group", "layer"]
UnitScope: TypeAlias = Literal["unit", "global", "group", "layer"]


@dataclass(frozen=True)
class AdaptiveClip:
    """Clip the gradient norm to a multiple of the run's own median norm.

    There is no absolute threshold, so scaling the loss changes nothing.

    Args:
        multiple: The threshold as a multiple of the running median norm. Default 10: it is there
            for outliers, which would fill Adam's second moment for a thousand steps; clipping
            ordinary noise costs slow starters, and large updates are the cap's business.
        scope: Whose norm is judged: ``"global"`` (default) for all gradients together, ``"group"``
            for each parameter group of the optimizer, ``"layer"`` for each module.

    Raises:
        TypeError: If ``multiple`` is not a number.
        ValueError: If ``multiple`` is not positive, or ``scope`` is none of these.

    Example:
        >>> AdaptiveClip().threshold(median_norm=0.5)
        5.0
    """

    multiple: float = 10.0
    scope: ClipScope = "global"

    def __post_init__(self) -> None:
        check_number("multiple", self.multiple, above=0.0)
        check_choice("scope", self.scope, get_args(ClipScope))

    def threshold(self, median_norm: float | None) -> float:
        """The norm to clip to; ``inf`` while there is no baseline yet."""
        return math.inf if median_norm is None else self.multiple * median_norm


@dataclass(frozen=True)
class NormClip:
    """Clip the gradient norm to a fixed value, as ``torch.nn.utils.clip_grad_norm_`` does.

    Args:
        max_norm: The threshold. Default 1.0, which most published recipes use.
        scope: Whose norm is judged, see :class:`AdaptiveClip`. Default ``"global"``.

    Raises:
        TypeError: If ``max_norm`` is not a number.
        ValueError: If ``max_norm`` is not positive, or ``scope`` is not known.

    Example:
        >>> NormClip(0.5, scope="module")
        Traceback (most recent call last):
        ...
        ValueError: scope must be one of 'global', 'group', 'layer', got 'module'
    """

    max_norm: float = 1.0
    scope: ClipScope = "global"

    def __post_init__(self) -> None:
        check_number("max_norm", self.max_norm, above=0.0)
        check_choice("scope", self.scope, get_args(ClipScope))


@dataclass(frozen=True)
class ValueClip:
    """Clamp every gradient element to [-``max_value``, ``max_value``].

    As ``torch.nn.utils.clip_grad_value_``, which changes the direction of the gradient too. There
    is no ``scope``: each element is judged alone, so it would change nothing. Real and imaginary
    part of a complex element count as two elements.

    Args:
        max_value: The largest absolute value. No default: it depends on the scale of the loss.

    Raises:
        TypeError: If ``max_value`` is not a number.
        ValueError: If ``max_value`` is not positive.

    Example:
        >>> ValueClip(0.5).max_value
        0.5
    """

    max_value: float

    def __post_init__(self) -> None:
        check_number("max_value", self.max_value, above=0.0)


@dataclass(frozen=True)
class AGC:
    """Clip a gradient to a share of the norm of the weights that it changes (Brock et al. 2021).

    Where ‖g‖ > ``clip_factor`` · max(‖w‖, ``eps``), g is scaled down to that. A *unit* is a row of
    a weight (all that leads to one output), or a whole vector. The norms of units are measured on
    every step, one call for each tensor; those of larger segments' weights every 16 steps.

    Gradients that no unit can be told of on one process are left alone by ``scope="unit"``: sparse
    ones, and those of sharded tensors (FSDP2, tensor parallelism), of which a warning tells.

    Args:
        clip_factor: The share. Default 0.01, the paper's for batches of 4096; smaller batches bear
            0.02 to 0.08.
        eps: The least norm of a weight, so that one that starts from zero can move. Default 1e-3,
            as in the paper.
        scope: ``"unit"`` (default), as in the paper; or the same rule for ``"global"``, ``"group"``
            or ``"layer"``, see :class:`AdaptiveClip`.
        exclude: Names of parameters that are left alone, or patterns of them as in
            ``("head.*",)``. The paper leaves out the last linear layer. Default: none.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> AGC(exclude=["head.*"]).exclude
        ('head.*',)
    """

    clip_factor: float = 0.01
    eps: float = 1e-3
    scope: UnitScope = "unit"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_number("clip_factor", self.clip_factor, above=0.0)
        check_number("eps", self.eps, above=0.0)
        check_choice("scope", self.scope, get_args(UnitScope))
        given: object = self.exclude
        if not isinstance(given, (tuple, list)) or not all(isinstance(p, str) for p in given):
            raise TypeError(f"exclude must be a tuple of names or patterns, got {given!r}")
        object.__setattr__(self, "exclude", tuple(given))  # from YAML it comes as a list


@dataclass(frozen=True)
class PercentileClip:
    """Clip the gradient norm to a percentile of the norms so far: AutoClip (Seetharaman 2020).

    Only norms that are finite and not zero enter: one infinity would lift the percentile for good,
    and a threshold of zero would stop training.

    Args:
        percentile: Which one, above 0 and at most 100. Default 10, the paper's.
        window: How many norms are remembered. Default 1000; the paper remembers all, by which a
            long run keeps the threshold of its beginning, and a checkpoint grows without end.
        scope: Whose norm is judged, see :class:`AdaptiveClip`. Default ``"global"``. Norms are
            remembered for each segment.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> PercentileClip(0)
        Traceback (most recent call last):
        ...
        ValueError: percentile must be a number > 0 and <= 100, got 0
    """

    percentile: float = 10.0
    window: int = 1000
    scope: ClipScope = "global"

    def __post_init__(self) -> None:
        check_number("percentile", self.percentile, above=0.0, at_most=100.0)
        check_number("window", self.window, at_least=1, integer=True)
        check_choice("scope", self.scope, get_args(ClipScope))


@dataclass(frozen=True)
class ZScoreClip:
    """Clip gradient norms that lie far above their running mean: ZClip (Kumar et al. 2025).

    With mean μ and deviation σ, a norm n of which (n - μ)/σ exceeds ``z`` is clipped to
    μ + z·σ / ((n - μ)/(z·σ)): the larger the outlier, the less is left of it. The clipped norm
    enters μ and σ. Unlike the original, norms that are not finite or zero never do, and 16 clipped
    steps in a row are taken for a new level instead of being clipped for ever.

    Args:
        z: The bound on the z-score. Default 2.5, the paper's.
        alpha: What μ and σ² keep of themselves in one step. Default 0.97, the paper's.
        warmup_steps: Norms from which μ and σ are first taken; until then nothing is clipped.
            Default 25, the paper's.
        scope: Whose norm is judged, see :class:`AdaptiveClip`. Default ``"global"``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> ZScoreClip(alpha=1.0)
        Traceback (most recent call last):
        ...
        ValueError: alpha must be a number > 0 and < 1, got 1.0
    """

    z: float = 2.5
    alpha: float = 0.97
    warmup_steps: int = 25
    scope: ClipScope = "global"

    def __post_init__(self) -> None:
        check_number("z", self.z, above=0.0)
        check_number("alpha", self.alpha, above=0.0, below=1.0)
        check_number("warmup_steps", self.warmup_steps, at_least=2, integer=True)
        check_choice("scope", self.scope, get_args(ClipScope))


ThresholdStrategy: TypeAlias = AdaptiveClip | NormClip | PercentileClip | ZScoreClip
ClipStrategy: TypeAlias = AdaptiveClip | NormClip | ValueClip | AGC | PercentileClip | ZScoreClip


def check_clip(clip: object) -> None:
    """Raise ``TypeError`` unless ``clip`` is a strategy or ``None``.

    Example:
        >>> check_clip(1.0)
        Traceback (most recent call last):
        ...
        TypeError: clip must be an AdaptiveClip, NormClip, ValueClip, AGC, PercentileClip, \
ZScoreClip or None, got 1.0
    """
    strategies = get_args(ClipStrategy)
    if clip is not None and not isinstance(clip, strategies):
        names = ", ".join(strategy.__name__ for strategy in strategies)
        raise TypeError(f"clip must be an {names} or None, got {clip!r}")
