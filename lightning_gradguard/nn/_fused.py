"""What the subclasses of torch's own recurrent modules have in common.

Shape suffixes: ``T`` time, ``B`` batch, ``I`` input, ``K`` layers times directions, ``H`` hidden.
"""

from __future__ import annotations

import functools
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from lightning_gradguard.nn._layers import Layers, State
from lightning_gradguard.nn._scan import States, Trace, flattened
from lightning_gradguard.nn._sequences import Input, check_features
from lightning_gradguard.nn.init import initialize

Kernel = Callable[..., tuple[Tensor, ...]]


@functools.cache
def _uncompiled_forward() -> Callable[..., tuple[Input, State]]:
    # torch.compile leaves recurrent modules of torch out of its graphs, but would make one of each
    # function that is called inside. Made when it is first needed: it imports the compiler.
    uncompiled: Callable[..., tuple[Input, State]] = torch.compiler.disable(Layers.forward)
    return uncompiled


def runs_fused(rnn: nn.Module) -> bool:
    """Whether torch's own module, or a subclass, runs the equations of torch's own forward."""
    return not isinstance(rnn, FusedLayers) or rnn.runs_fused


class FusedLayers(Layers, nn.RNNBase):
    """Runs torch's own forward where it can, else one fused kernel for each layer, else timesteps.

    A subclass inherits from this and from ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, in this order.
    """

    # What holds while the constructor of torch's own module runs.
    init: str = "torch"
    t_max: float | None = None
    residual: bool = False
    recording: Trace | None = None

    @property
    def runs_fused(self) -> bool:
        """Whether forward is torch's own, one fused kernel for all layers."""
        return self._kernel is not None and (not self.residual or self.num_layers == 1)

    @property
    @abstractmethod
    def _kernel(self) -> Kernel | None:
        """The function of torch that runs fused layers, if there is one for these equations."""

    @property
    def _names(self) -> list[str]:
        """Parameters of each layer and direction, in torch's order."""
        biases = ["bias_ih", "bias_hh"] if self.bias else []
        return ["weight_ih", "weight_hh", *biases, *(["weight_hr"] if self.proj_size else [])]

    def _set_up(self, init: str, t_max: float | None, *, residual: bool) -> None:
        """Take in the arguments that torch's own module does not have."""
        if not isinstance(residual, bool):
            raise TypeError(f"residual should be of type bool, got: {type(residual).__name__}")
        self.init, self.t_max, self.residual, self.recording = init, t_max, residual, None
        if (init, t_max) != ("torch", None):  # which torch's own constructor has done
            self.reset_parameters()
        if not self.runs_fused:
            self.flatten_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as ``init`` says."""
        initialize(self, self.init, self.t_max)

    def forward(
        self,
        input: Input,  # noqa: A002 - as torch's own modules call it
        hx: State | None = None,
    ) -> tuple[Input, State]:
        """Run all layers, as torch's own module does.

        Args:
            input: ``(T, B, I)``, ``(B, T, I)`` if ``batch_first``, ``(T, I)``, or packed.
            hx: The state to begin with, as this returns it. Default zero.

        Returns:
            The output, ``(T, B, H)`` in the layout of the input (2H if bidirectional), and the
            state after the last timestep, ``(K, B, H)`` each.

        Raises:
            RuntimeError: If a shape does not fit.
            ValueError: If the number of dimensions or the dtype does not fit.
        """
        if isinstance(input, PackedSequence):  # torch's own module does not look
            check_features(input.data, self.input_size)
        if self.runs_fused and self.recording is None:
            result: tuple[Input, State] = super(Layers, self).forward(input, hx)
        elif torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:
            result = super().forward(input, hx)
        else:
            result = _uncompiled_forward()(self, input, hx)
        return result

    def _run(
        self,
        x: Tensor,
        states: Sequence[States],
        batch_sizes: list[int] | None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, list[States]]:
        if trace is None or self._kernel is None:
            return super()._run(x, states, batch_sizes, trace)
        # The kernels run as without a trace, bit for bit, and beside them the same timestep by
        # timestep, with the same dropout.
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices):
            if not is_parametrized(self):  # reading those weights once more may change them
                apart = [tuple(state.detach() for state in part) for part in states]
                twin = super()._run(x.detach().requires_grad_(), apart, batch_sizes, trace)
                trace.results = flattened(*twin)
        return super()._run(x, states, batch_sizes)

    def _layer(
        self,
        layer: int,
        x: Tensor,
        states: Sequence[States],
        batch_sizes: list[int] | None,
        trace: Trace | None,
    ) -> tuple[Tensor, list[States]]:
        kernel = self._kernel
        if kernel is None or trace is not None:
            return super()._layer(layer, x, states, batch_sizes, trace)
        parts = range(layer * self._directions, (layer + 1) * self._directions)
        weights = [weight for part in parts for weight in self._weights(part).values()]
        hx = [torch.stack(both) for both in zip(*states[: self._directions], strict=True)]
        if torch.is_autocast_enabled(x.device.type):  # the layer below may have given another dtype
            hx = [state.to(x.dtype) for state in hx]
        state = hx[0] if len(hx) == 1 else hx
        settings = (weights, self.bias, 1, 0.0, self.training, self.bidirectional)
        if batch_sizes is None:
            output, *last = kernel(x, state, *settings, False)
        else:
            output, *last = kernel(x, torch.tensor(batch_sizes), state, *settings)
        return output, list(zip(*(tensor.unbind(0) for tensor in last), strict=True))

    def _weights(self, part: int) -> dict[str, Tensor]:
        suffix = self._suffix(part)
        return {name: getattr(self, name + suffix) for name in self._names}

    def _suffix(self, part: int) -> str:
        layer, way = divmod(part, self._directions)
        return f"_l{layer}{'_reverse' if way else ''}"

    def flatten_parameters(self) -> None:
        """Lay the weights out in memory as cuDNN wants them, for the kernels that will run."""
        if self.runs_fused:
            super().flatten_parameters()
        elif self._kernel is not None and all(weight.is_cuda for weight in self.parameters()):
            for layer in range(self.num_layers):
                self._alone(layer).flatten_parameters()

    def _alone(self, layer: int) -> nn.RNNBase:
        """One layer, of the same parameters."""
        parts = range(layer * self._directions, (layer + 1) * self._directions)
        weights = [self._weights(part) for part in parts]
        alone = nn.RNNBase(
            self.mode, weights[0]["weight_ih"].shape[1], self.hidden_size, bias=self.bias,
            bidirectional=self.bidirectional, proj_size=self.proj_size, device="meta",
        )  # fmt: skip
        for number, own in enumerate(weights):
            for name, weight in own.items():
                setattr(alone, f"{name}_l0{'_reverse' if number else ''}", weight)
        return alone

    def extra_repr(self) -> str:
        """As of torch's own modules: what differs from the defaults."""
        defaults = {**self._own_defaults(), "init": "torch", "t_max": None, "residual": False}
        values = {name: getattr(self, name) for name in defaults}
        words = [f"{name}={v!r}" for name, v in values.items() if v != defaults[name]]
        return ", ".join([super().extra_repr(), *words])

    def _own_defaults(self) -> dict[str, Any]:
        """Other arguments that torch's own module does not have or show, with their defaults."""
        return {}
