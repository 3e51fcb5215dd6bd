"""How large a relative update may be: settings."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_gradguard._validation import check_number, check_type


@dataclass(frozen=True)
class UpdateCap:
    """Let no tensor move by more than a share of its own norm in one step.

    With ``adaptive``, the share follows the loss while most tensors would move by more than the
    widest share; the learning rate is then no ordinary one. If the loss gets worse beyond its
    noise, it is tightened. If it neither improves nor gets worse, either the updates are too
    large or the run is on a plateau; so smaller ones are tried for two windows, kept if the
    loss improves, and otherwise taken back. After each trial in vain the next one waits twice
    as long. In all other cases it is loosened: fast until it is tightened for the first time.
    The reasons for the defaults, with the trials that led to them, are in ``docs/default-
    response.md``.

    Args:
        max_ratio: No update is larger. Default 0.15: Adam and its relatives, whose steps have the
            size of their learning rate, are held to this alone as long as most tensors stay below
            it, so that ordinary rates are left as they are.
        wide_ratio: The widest share otherwise. Default 2/3 · ``max_ratio``, or ``start_ratio`` if
            that is more.
        start_ratio: The share at the start. Default 0.3 · ``wide_ratio``.
        min_ratio: The tightest share. Default ``wide_ratio`` / 30, or ``start_ratio`` if less.
        adaptive: Whether the share follows the loss; otherwise it stays at ``max_ratio``.
        window: Steps between the first looks at the loss. Default 25; as improvement slows down,
            the window grows with the run, to a sixteenth of it.
        opening: Factor on the share while it has never been tightened. Default 1.6: a healthy run
            reaches the widest share in three windows.
        tighten: Factor on the share while smaller updates are tried. Default 0.4: large enough to
            show within two windows.
        retreat: Factor on the share when the loss gets worse. Default 0.5: what a window of too
            large updates destroys, as dead units, may not come back.
        loosen: Factor on the share otherwise. Default 1.25.
        confidence: The change of the loss that counts, in standard errors. Default 2.
        relu_recurrence: Factor on the share for the recurrent weights of ReLU RNNs, whose changes
            compound from timestep to timestep. Default 0.05; 1 makes no difference between tensors.
        on_evidence: Whether nothing is bounded until the loss speaks against it: if it rises within
            the first ``2 * window`` steps whose updates are large, the weights of before are put
            back and the cap holds for good. A run that gets through this is left alone, but for its
            learning rate, which is then lowered by the rules above in place of the share. Needs
            ``adaptive``, a loss, and going back and back-off as well; without one of them, and for
            ReLU RNNs, the cap holds from the first step on; with several optimizers, where a loss
            that rises is none, never. Default ``False``; the guard itself
            comes with ``True``, because no bound that saves failing runs was found that does not
            slow some healthy ones down.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or ``on_evidence`` without ``adaptive``.

    Example:
        >>> UpdateCap(max_ratio=0.02, start_ratio=0.05)
        Traceback (most recent call last):
        ...
        ValueError: start_ratio must be a number > 0 and <= 0.02, got 0.05
    """

    max_ratio: float = 0.15
    wide_ratio: float | None = None
    start_ratio: float | None = None
    min_ratio: float | None = None
    adaptive: bool = True
    window: int = 25
    opening: float = 1.6
    tighten: float = 0.4
    retreat: float = 0.5
    loosen: float = 1.25
    confidence: float = 2.0
    relu_recurrence: float = 0.05
    on_evidence: bool = False

    def __post_init__(self) -> None:
        check_number("max_ratio", self.max_ratio, above=0.0)
        if self.wide_ratio is not None:
            check_number("wide_ratio", self.wide_ratio, above=0.0, at_most=self.max_ratio)
        if self.start_ratio is not None:
            most = self.max_ratio if self.wide_ratio is None else self.wide_ratio
            check_number("start_ratio", self.start_ratio, above=0.0, at_most=most)
        if self.min_ratio is not None:
            check_number("min_ratio", self.min_ratio, above=0.0, at_most=self.first_ratio)
        check_number("relu_recurrence", self.relu_recurrence, above=0.0, at_most=1.0)
        check_type("adaptive", self.adaptive, bool, "True or False")
        check_type("on_evidence", self.on_evidence, bool, "True or False")
        if self.on_evidence and not self.adaptive:
            raise ValueError(
                "on_evidence must be False with adaptive=False: what the loss does is the evidence"
            )
        check_number("window", self.window, at_least=2, integer=True)
        check_number("opening", self.opening, above=1.0)
        check_number("tighten", self.tighten, above=0.0, below=1.0)
        check_number("retreat", self.retreat, above=0.0, below=1.0)
        check_number("loosen", self.loosen, above=1.0)
        check_number("confidence", self.confidence, at_least=0.0)

    @property
    def widest_ratio(self) -> float:
        """``wide_ratio``, filled in."""
        if self.wide_ratio is None:
            return max(2 / 3 * self.max_ratio, self.start_ratio or 0.0)
        return self.wide_ratio

    @property
    def first_ratio(self) -> float:
        """``start_ratio``, filled in."""
        if self.start_ratio is None:
            return 0.3 * self.widest_ratio
        return self.start_ratio

    @property
    def least_ratio(self) -> float:
        """``min_ratio``, filled in."""
        if self.min_ratio is None:
            return min(self.widest_ratio / 30, self.first_ratio)
        return self.min_ratio
