"""Ways of autograd beyond one backward pass: a probe does not get into their way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lightning_gradguard.measure.timesteps import TimestepProbe
from tests.measure.time_readings import B, H, I, T


class Chunks(nn.Module):
    """Each chunk of a long sequence in a checkpoint of its own."""

    def __init__(self, kind: type[nn.Module], *, reentrant: bool) -> None:
        super().__init__()
        self.rnn = kind(I, H)
        self.reentrant = reentrant

    def forward(self, x: Tensor, chunks: int) -> Tensor:
        state = None
        for chunk in x.chunk(chunks):
            output, state = checkpoint(self.rnn, chunk, state, use_reentrant=self.reentrant)
        return output[-1].square().mean()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("chunks", [1, 3, 4, 5, 8, 9, 20])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_any_number_of_checkpointed_chunks(
    kind: type[nn.Module], chunks: int, *, exact: bool
) -> None:
    model = Chunks(kind, reentrant=False)
    x = torch.randn(60, B, I)
    model(x, chunks).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with TimestepProbe(model) as probe:
        probe.exact = exact
        model(x, chunks).backward()
        (reading,) = probe.measure()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert reading.sequences == B * min(8, chunks)
    assert reading.source == ("exact" if exact else "input")


def test_reentrant_checkpoints_of_chunks() -> None:
    model = Chunks(nn.GRU, reentrant=True)
    x = torch.randn(60, B, I, requires_grad=True)
    with TimestepProbe(model) as probe:
        model(x, 12).backward()
        (reading,) = probe.measure()
    assert reading.sequences == B * 8


@pytest.mark.parametrize("create_graph", [False, True])
def test_many_gradients_at_once(*, create_graph: bool) -> None:
    rnn = nn.RNN(I, H)
    x = torch.randn(T, B, I)

    def jacobian() -> Tensor:
        return torch.autograd.functional.jacobian(
            lambda x: rnn(x)[0][-1].sum(0), x, vectorize=True, create_graph=create_graph
        )

    def batched() -> Tensor:
        given = x.clone().requires_grad_()
        output = rnn(given)[0][-1].sum(0)
        (gradient,) = torch.autograd.grad(
            output, given, torch.eye(H), is_grads_batched=True, create_graph=create_graph
        )
        return gradient

    expected = [jacobian(), batched()]
    with TimestepProbe(rnn) as probe:
        ours = [jacobian(), batched()]
        assert probe.measure() == []
        rnn(x)[0].sum().backward()
        (reading,) = probe.measure()
        assert reading.source == "exact"
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", [nn.RNN, nn.RNNCell])
def test_tangents_of_forward_mode_stay(kind: type[nn.Module]) -> None:
    module = kind(I, H)
    shape = (T, B, I) if kind is nn.RNN else (B, I)
    x, tangent = torch.randn(shape), torch.randn(shape)

    def derivative() -> Tensor:
        with forward_ad.dual_level():
            output = module(forward_ad.make_dual(x, tangent))
            output = output[0] if isinstance(output, tuple) else output
            return forward_ad.unpack_dual(output).tangent.detach()

    expected = derivative()
    with TimestepProbe(module):
        assert torch.equal(derivative(), expected)
