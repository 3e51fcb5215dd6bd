"""How much is kept of what goes wrong."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_gradguard._validation import check_number, check_type


@dataclass(frozen=True)
class Incidents:
    """What an incident holds, and how much room all of them may take.

    Each process of a run counts its own incidents. The first ``max_count - 1`` of a run stay, since
    what comes later often follows from them, and the last place goes to the latest; incidents of
    earlier runs in the same folder make way first. What does not fit in ``max_bytes`` is left out:
    first the weights, of which a fingerprint remains, then other incidents than the first, then
    the batch.

    Args:
        max_count: Most incidents that are kept. Default 5: more of a run repeat themselves.
        max_bytes: Most bytes of all of them together. Default 512 MiB, enough for the weights of
            100 million parameters in float32.
        weights: Whether to keep the weights; otherwise shape, dtype, norm and SHA-256 of each.
            Default ``True``.
        batch: Whether to keep the batch; without it nothing can be replayed. Default ``True``.
        history_rows: Steps of the history that are kept. Default 200: enough to see a trend.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> Incidents(max_count=2, weights=False).history_rows
        200
    """

    max_count: int = 5
    max_bytes: int = 512 * 2**20
    weights: bool = True
    batch: bool = True
    history_rows: int = 200

    def __post_init__(self) -> None:
        check_number("max_count", self.max_count, at_least=1, integer=True)
        # A manifest with its fingerprint and the history take up to some hundred KiB.
        check_number("max_bytes", self.max_bytes, at_least=2**20, integer=True)
        check_type("weights", self.weights, bool, "True or False")
        check_type("batch", self.batch, bool, "True or False")
        check_number("history_rows", self.history_rows, at_least=0, integer=True)
