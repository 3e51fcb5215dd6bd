"""A look at every layer on one sampled step, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ParameterReading:
    """One parameter tensor on one step.

    Attributes:
        name: Its name in the model, ``"encoder.rnn.weight_hh_l0"``.
        elements: Number of elements.
        dims: Number of dimensions: 2 and more for weights, 1 for biases and scales.
        requires_grad: ``False`` if it was frozen by a declaration.
        in_optimizer: Whether any optimizer of the run updates it.
        used: Whether its module took part in a forward pass with gradients on: ``True``,
            ``False`` (it did not run), or ``None`` where that is not known.
        used_without_grad: Whether its module ran with gradients off (``torch.no_grad``) and never
            with gradients on, in training.
        grad_norm: L2 norm of its gradient; NaN if it has none.
        weight_norm: L2 norm of its values before the step.
        update_ratio: ‖ΔW‖ / max(‖W‖, floor) of the step, estimated from a sample; exactly 0 if no
            sampled element changed; NaN if it was not measured (a dropped step, no optimizer).
        lr: Learning rate that was in force for it; NaN if not known.
        zero_share: Share of sampled gradient elements that are exactly zero; NaN without gradient.
        tiny_share: Share of the sampled elements that are not zero but below the smallest normal
            number of the dtype that they were computed in, so that they have lost digits.
        dead_rows: Share of its rows (output units) whose gradient is exactly zero; NaN where it
            has no rows to speak of (biases, embeddings) or no gradient.
    """

    name: str
    elements: int = 0
    dims: int = 2
    requires_grad: bool = True
    in_optimizer: bool = True
    used: bool | None = None
    used_without_grad: bool = False
    grad_norm: float = math.nan
    weight_norm: float = math.nan
    update_ratio: float = math.nan
    lr: float = math.nan
    zero_share: float = math.nan
    tiny_share: float = math.nan
    dead_rows: float = math.nan

    @property
    def module(self) -> str:
        """Path of the module that owns it; empty for the root."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class ActivationReading:
    """The units of one activation over the last few looks at it.

    Attributes:
        module: Path of the activation module, or of the recurrent module whose output it is.
        kind: ``"relu"``, ``"gelu"``, ``"tanh"``, ``"sigmoid"``, … in lower case.
        units: Units: the last dimension, or the channels of a convolution.
        examples: Outputs per unit that the shares rest on, over all looks that are counted.
        dead: Share of units that were inactive in every one of them; NaN for kinds that have no
            inactive side (``tanh``, ``sigmoid``).
        inactive: Share of all outputs that are inactive, between 0 and 1; NaN likewise. Sparse
            activations have many inactive outputs and no dead unit.
        saturated: Share of units of which nearly all outputs lie where the slope is below a
            twentieth of its maximum; NaN for kinds that do not saturate.
    """

    module: str
    kind: str
    units: int = 0
    examples: int = 0
    dead: float = math.nan
    inactive: float = math.nan
    saturated: float = math.nan


@dataclass(frozen=True)
class Inspection:
    """Everything that was read of the layers on one step.

    Attributes:
        step: Optimizer step.
        parameters: All parameters of the model in the order of their registration, also those that
            no optimizer updates.
        activations: Those that were watched.
        depth_slope: Slope of log(‖g‖/‖W‖) of the weight matrices on depth, nats per layer back from
            the output: below 0 the gradient vanishes on its way to the input. NaN if not known.
        depth_error: Half width of its 95% confidence interval.
        depth_layers: Layers that the slope rests on.

    Example:
        >>> weight = ParameterReading("net.0.weight", grad_norm=0.1, weight_norm=2.0)
        >>> inspection = Inspection(step=3, parameters=(weight,))
        >>> Inspection.from_dict(inspection.to_dict()).parameters[0].module
        'net.0'
    """

    step: int
    parameters: tuple[ParameterReading, ...] = ()
    activations: tuple[ActivationReading, ...] = ()
    depth_slope: float = math.nan
    depth_error: float = math.nan
    depth_layers: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for JSON or a checkpoint."""
        return {
            **asdict(self),
            "parameters": [asdict(reading) for reading in self.parameters],
            "activations": [asdict(reading) for reading in self.activations],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Inspection:
        """The inverse of :meth:`to_dict`."""
        return cls(
            **{
                **values,
                "parameters": tuple(ParameterReading(**v) for v in values["parameters"]),
                "activations": tuple(ActivationReading(**v) for v in values["activations"]),
            }
        )


@dataclass(frozen=True)
class NonFiniteOrigin:
    """Where NaN or Inf first appeared.

    Attributes:
        place: ``"batch"``, ``"weights"`` (before the forward pass), ``"forward"`` (outputs),
            ``"loss"`` (all outputs are finite, the loss is not) or ``"backward"`` (gradients).
        module: Path of the module; of the batch, the path within it (``"0"``, ``"inputs"``).
        timestep: First position along the time axis that is not finite, where it has one.
        sample: First example of the batch that is not finite, where there is one.
        tensor: Which tensor, in words: the path within the batch, the name of the parameter,
            ``"output"``, ``"loss"`` or ``"gradient of ..."``; empty if not known.
    """

    place: Literal["batch", "weights", "forward", "loss", "backward"]
    module: str = ""
    timestep: int | None = None
    sample: int | None = None
    tensor: str = field(default="", repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NonFiniteOrigin:
        """The inverse of :meth:`to_dict`."""
        return cls(**values)
