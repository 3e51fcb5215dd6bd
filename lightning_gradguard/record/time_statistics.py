"""The gradient's way through time, aggregated over an epoch and over ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import plot_curve

from lightning_gradguard._validation import check_type
from lightning_gradguard.measure.student_t import student_t
from lightning_gradguard.readings import HORIZON_FACTOR, MAX_BINS, TimeReading


class TimeDecayStatistics(Metric):
    """Mean decay rate and decay curve of one layer and direction, with a confidence interval.

    Each measurement is a block of one or a few batches, so their spread says how far another epoch
    would be off; lags of one batch do not, since they are autocorrelated. The states are sums and
    extremes, so memory does not grow with the number of measurements or timesteps, and ranks
    combine in one reduction each.

    The decay curve is the mean log norm per timestep. It is kept in 256 bins of equal shares of the
    sequence, in which a profile of T <= 256 timesteps is a staircase: while all measurements have
    the same T, its timesteps come back exactly; sequences of different lengths are averaged at the
    same share of their length. Norms that are zero or not finite are left out of it.

    Args:
        name: Name of the readings, as in :attr:`TimeReading.name`; readings of another are refused.
            Default: any, but do not mix them.
        sync_on_compute: Whether :meth:`compute` combines the ranks.

    Example:
        >>> statistics = TimeDecayStatistics("rnn/l0")
        >>> for rate in (-0.21, -0.23, -0.22):
        ...     statistics.update(TimeReading("rnn", "l0", "exact", timesteps=50, decay_rate=rate))
        >>> values = statistics.compute()
        >>> {name: round(values[name].item(), 3) for name in ("decay_rate", "decay_error", "count")}
        {'decay_rate': -0.22, 'decay_error': 0.025, 'count': 3.0}
    """

    higher_is_better = None
    is_differentiable = False
    full_state_update = False

    rate: Tensor
    rate_squared: Tensor
    count: Tensor
    error: Tensor
    recency: Tensor
    recency_count: Tensor
    timesteps: Tensor
    readings: Tensor
    log_profile: Tensor
    profile_count: Tensor
    longest: Tensor
    shortest: Tensor

    def __init__(self, name: str = "", *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        check_type("name", name, str, "a string")
        self.name = name
        zero = torch.tensor(0.0, dtype=torch.float64)
        for state in ("rate", "rate_squared", "count", "error", "recency", "recency_count"):
            self.add_state(state, default=zero.clone(), dist_reduce_fx="sum")
        for state in ("timesteps", "readings"):
            self.add_state(state, default=zero.clone(), dist_reduce_fx="sum")
        for state in ("log_profile", "profile_count"):
            self.add_state(state, default=zero.repeat(MAX_BINS), dist_reduce_fx="sum")
        self.add_state("longest", default=zero.clone(), dist_reduce_fx="max")
        self.add_state("shortest", default=zero + math.inf, dist_reduce_fx="min")
        # Made by compute while the ranks are combined, because plot runs on one of them.
        self._curve: tuple[Tensor, Tensor, bool] | None = None

    def update(self, *readings: TimeReading) -> None:
        """Add one reading or several.

        Raises:
            TypeError: If one is not a :class:`TimeReading`.
            ValueError: If one is of another module or part than this metric's name.
        """
        for reading in readings:
            check_type("readings", reading, TimeReading, "TimeReading objects")
            if self.name and reading.name != self.name:
                raise ValueError(f"readings must be those of {self.name!r}, got {reading.name!r}")
        for reading in readings:
            self._add(reading)

    def _add(self, reading: TimeReading) -> None:
        self.readings += 1
        self.timesteps += reading.timesteps
        if math.isfinite(reading.decay_rate):
            self.rate += reading.decay_rate
            self.rate_squared += reading.decay_rate**2
            self.error += reading.decay_error
            self.count += 1
        if math.isfinite(reading.recency):
            self.recency += reading.recency
            self.recency_count += 1
        if reading.profile:
            self._add_profile(reading)

    def _add_profile(self, reading: TimeReading) -> None:
        profile = torch.tensor(reading.profile, dtype=self.log_profile.dtype, device=self.device)
        stairs = torch.arange(MAX_BINS, device=self.device) * len(profile) // MAX_BINS
        usable = (profile.isfinite() & (profile > 0))[stairs]
        self.log_profile += torch.where(usable, profile[stairs], 1.0).log()
        self.profile_count += usable
        self.longest = self.longest.clamp(min=reading.timesteps)
        self.shortest = self.shortest.clamp(max=reading.timesteps)

    def compute(self) -> dict[str, Tensor]:
        """The figures of the epoch, each of shape ``()``.

        Returns:
            ``decay_rate``, the mean over the measurements, nats per step back in time; its
            ``decay_error``, the half width of the 95% confidence interval from their spread (of a
            single measurement: its own); ``half_life`` and ``horizon`` in steps; ``recency`` and
            ``timesteps``, means; ``count``, the measurements with a rate; ``left_out``, those
            without. What no measurement has is NaN.
        """
        rate = self.rate / self.count
        self._curve = self._decay_curve()
        return {
            "decay_rate": rate,
            "decay_error": self._half_width(rate),
            "half_life": math.log(2.0) / rate.abs(),
            "horizon": math.log(HORIZON_FACTOR) / rate.abs(),
            "recency": self.recency / self.recency_count,
            "timesteps": self.timesteps / self.readings,
            # A copy: older torchmetrics hand out the state, which the next update changes.
            "count": self.count.clone(),
            "left_out": self.readings - self.count,
        }

    def plot(self, val: Any = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw the decay curve: gradient norm on timestep, with the half-life in the legend.

        Args:
            val: A result of :meth:`compute` or a list of them, to be drawn as torchmetrics draws
                any metric's values. Default: the decay curve of what has been seen.
            ax: Matplotlib axes to draw in. Default: those of a new figure.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        if val is not None:
            figure, ax = self._plot(val, ax)
            return figure or ax.figure, ax
        values = {name: value.item() for name, value in self.compute().items()}
        positions, norms, shares = self._curve if self._curve is not None else self._decay_curve()
        labels = ("Share of the sequence" if shares else "Timestep", "Gradient norm")
        figure, ax = plot_curve(
            (positions, norms, positions), ax=ax, label_names=labels, name=self.name or None
        )
        ax.lines[-1].set_label(_legend(values))
        ax.set_yscale("log")
        ax.legend()
        return figure or ax.figure, ax

    def _half_width(self, rate: Tensor) -> Tensor:
        count = int(self.count)
        if count < 2:
            return self.error / self.count
        variance = (self.rate_squared - count * rate.square()).clamp(min=0.0) / (count - 1)
        return student_t(count - 1) * (variance / count).sqrt()

    def _decay_curve(self) -> tuple[Tensor, Tensor, bool]:
        """Positions, norms, and whether the positions are shares of sequences that differ."""
        norms = (self.log_profile / self.profile_count).exp()
        longest = int(self.longest)
        if longest != self.shortest:
            bins = torch.arange(MAX_BINS, dtype=norms.dtype, device=norms.device)
            return (bins + 0.5) / MAX_BINS, norms, bool(longest)
        number = min(longest, MAX_BINS)
        steps = torch.arange(number, device=norms.device)
        first = (steps * MAX_BINS + number - 1) // number  # the first bin of each stair
        return (steps + 0.5) * (longest / number) - 0.5, norms[first], False


def _legend(values: dict[str, float]) -> str:
    rate = values["decay_rate"]
    if math.isnan(rate):
        return "rate not known"
    name = "doubling" if rate > 0 else "half-life"
    error = values["decay_error"]
    spread = "" if math.isnan(error) else f" ± {error:.2g}"
    return f"{name} {values['half_life']:.3g} steps ({rate:+.3g}{spread} nats/step)"
