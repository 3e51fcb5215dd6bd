"""The norms that the next step is clipped to: norms in, thresholds out.

Plain values only, so that every rank decides the same and a resumed run goes on exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lightning_gradguard.diagnose import RobustBaseline
from lightning_gradguard.measure import layer_index
from lightning_gradguard.respond.clip_levels import make_level
from lightning_gradguard.respond.clipping import (
    AGC,
    ClipStrategy,
    ThresholdStrategy,
    ValueClip,
)


@dataclass(frozen=True)
class ClipSegments:
    """Which parameters are clipped together.

    Args:
        names: Name of each segment.
        numbers: For each parameter the number of its segment; ``len(names)`` for one that is left
            alone.

    Example:
        >>> ClipSegments(("a", "b"), (0, 0, 1)).members
        {'a': 2, 'b': 1}
    """

    names: tuple[str, ...] = ("",)
    numbers: tuple[int, ...] = ()

    @property
    def members(self) -> dict[str, int]:
        """How many parameters are in each segment."""
        return {name: self.numbers.count(number) for number, name in enumerate(self.names)}

    @property
    def slots(self) -> int:
        """Number of segments, and one more if some parameters are left alone."""
        return len(self.names) + (len(self.names) in self.numbers)


EVERYTHING = ClipSegments()


def make_segments(
    scope: str,
    names: Sequence[str],
    group_of: Sequence[int] = (),
    exclude: Sequence[str] = (),
) -> ClipSegments:
    """Divide parameters into what is clipped together.

    Args:
        scope: ``"global"``, ``"group"`` or ``"layer"``.
        names: Name of each parameter.
        group_of: The number of the parameter group of each.
        exclude: Patterns of the names of parameters that are left alone.

    Example:
        >>> make_segments("layer", ["a.weight", "a.bias", "b.weight"], exclude=["*.bias"])
        ClipSegments(names=('a', 'b'), numbers=(0, 2, 1))
    """
    if scope == "layer":
        layers, numbers = layer_index(names)
    elif scope == "group":
        numbers = list(group_of)
        layers = [f"group {number}" for number in range(max(numbers, default=-1) + 1)]
    else:
        layers, numbers = [""], [0] * len(names)
    kept = [
        len(layers) if any(fnmatchcase(name, pattern) for pattern in exclude) else number
        for name, number in zip(names, numbers, strict=True)
    ]
    return ClipSegments(tuple(layers), tuple(kept))


@dataclass(frozen=True)
class ClipBounds:
    """What each segment is clipped to in one step.

    Args:
        thresholds: Norms beyond which a segment is clipped; ``inf`` for one that is not.
        centers: See :func:`~lightning_gradguard.respond.clip_levels.clip_target`.
    """

    thresholds: tuple[float, ...]
    centers: tuple[float, ...]

    @property
    def limit(self) -> float:
        """The largest total norm that clipping lets through.

        Example:
            >>> ClipBounds((3.0, 4.0), (-math.inf, -math.inf)).limit
            5.0
        """
        return math.hypot(*self.thresholds)

    def to_dict(self) -> dict[str, list[float]]:
        """As plain values."""
        return {"thresholds": list(self.thresholds), "centers": list(self.centers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[float]]) -> ClipBounds:
        """The inverse of :meth:`to_dict`."""
        return cls(tuple(values["thresholds"]), tuple(values["centers"]))


UNBOUNDED = ClipBounds((math.inf,), (-math.inf,))


class ClipThresholds:
    """The thresholds of every segment, from the norms so far.

    Args:
        settings: The strategy.
        segments: What is clipped together; see :meth:`follow`. Default: everything.
        baseline: The baseline of the total log-norm that the ladder keeps anyway: the median of
            all gradients together is taken from it.

    Example:
        >>> from lightning_gradguard.respond import NormClip
        >>> ClipThresholds(NormClip(2.0)).bounds()
        ClipBounds(thresholds=(2.0,), centers=(-inf,))
    """

    def __init__(
        self,
        settings: ThresholdStrategy,
        segments: ClipSegments = EVERYTHING,
        baseline: RobustBaseline | None = None,
    ) -> None:
        self.settings = settings
        self._baseline = baseline if settings.scope == "global" else None
        self._members: dict[str, int] = {"": 0}
        self._levels = [make_level(settings, self._baseline)]
        self.follow(segments)

    def follow(self, segments: ClipSegments) -> None:
        """Take over other segments: those with new members start afresh, the others go on.

        With the scope ``"global"`` there is one segment, the run, which goes on in any case.
        """
        if not self.by_segment:
            return
        known = dict(zip(self._members.items(), self._levels, strict=True))
        self._members = segments.members
        self._levels = [
            known.get(member) or make_level(self.settings) for member in self._members.items()
        ]

    @property
    def by_segment(self) -> bool:
        """Whether segments are judged, and not the total norm."""
        return self.settings.scope != "global"

    def bounds(self) -> ClipBounds:
        """What the next step is clipped to."""
        return ClipBounds(
            tuple(level.threshold for level in self._levels),
            tuple(level.center for level in self._levels),
        )

    def observe(self, norms: Sequence[float]) -> None:
        """Take in the norm of each segment, before clipping.

        Norms that are not finite or zero leave no trace, nor do those of other segments than the
        present ones.
        """
        if len(norms) != len(self._levels):
            return
        for level, norm in zip(self._levels, norms, strict=True):
            if 0.0 < norm < math.inf:
                level.observe(norm)

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which :meth:`load_state_dict` continues."""
        return {
            "strategy": strategy_of(self.settings),
            "members": dict(self._members),
            "levels": [level.state_dict() for level in self._levels],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; of another strategy, or of other segments, start afresh."""
        if state["strategy"] != strategy_of(self.settings):
            return
        saved = dict(zip(state["members"].items(), state["levels"], strict=True))
        for member, level in zip(self._members.items(), self._levels, strict=True):
            if member in saved:
                level.load_state_dict(saved[member])


def make_thresholds(
    settings: ClipStrategy | None, baseline: RobustBaseline
) -> ClipThresholds | None:
    """The thresholds of a strategy; ``None`` for one that judges each gradient by itself."""
    if settings is None or isinstance(settings, (ValueClip, AGC)):
        return None
    return ClipThresholds(settings, baseline=baseline)


def strategy_of(settings: ClipStrategy | None) -> str:
    """Name and scope of a strategy, by which a saved state is known to be of the same one.

    Example:
        >>> from lightning_gradguard.respond import NormClip
        >>> strategy_of(NormClip(2.0, scope="layer"))
        'NormClip/layer'
    """
    return f"{type(settings).__name__}/{getattr(settings, 'scope', '')}"
