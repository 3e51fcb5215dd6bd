"""A probe changes nothing in the training that it watches."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from lightning_gradguard.measure import _recurrent_calls, timesteps
from lightning_gradguard.measure.timesteps import TimestepProbe

T, B, I, H = 7, 5, 4, 8  # noqa: E741 - input


class Fused(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(I, H, **options)
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Loop(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(I, H)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for x_t in x:
            state = self.cell(x_t, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(I, H)
        layer = nn.TransformerEncoderLayer(H, 2, 16, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.embed(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Fused(nn.LSTM, num_layers=2, dropout=0.3),
    "gru": lambda: Fused(nn.GRU, bidirectional=True),
    "rnn": lambda: Fused(nn.RNN),
    "lstm_cell": lambda: Loop(nn.LSTMCell),
    "gru_cell": lambda: Loop(nn.GRUCell),
    "rnn_cell": lambda: Loop(nn.RNNCell),
    "attention": Attention,
}


def train(model: nn.Module, probe: TimestepProbe | None) -> tuple[list[Tensor], Tensor]:
    """Five steps; returns all weights and losses, and what the generator would draw next."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    kept = []
    for _ in range(5):
        x = torch.randn(T, B, I, generator=generator)
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        if probe is not None:
            assert probe.measure()
            assert not x.requires_grad
            assert x.grad is None
        optimizer.step()
        model.eval()
        with torch.no_grad():
            kept.append(model(x))
        model.train()
        kept += [loss.detach(), *(p.detach().clone() for p in model.parameters())]
    return kept, torch.rand(3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("exact", [False, True])
def test_training_is_bit_identical(name: str, exact: bool) -> None:
    model = MODELS[name]()
    model(torch.randn(T, B, I))
    twin = copy.deepcopy(model)
    with TimestepProbe(model) as probe:
        probe.exact = exact or isinstance(model, Loop)
        ours, drawn = train(model, probe)
    theirs, expected = train(twin, None)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(drawn, expected)


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def test_hooks_come_off() -> None:
    model = nn.ModuleList(build() for build in MODELS.values())
    before = hooks_of(model)  # those of lazy modules
    probe = TimestepProbe(model)
    assert hooks_of(model) > before
    probe.close()
    assert hooks_of(model) == before
    probe.close()
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), TimestepProbe(model):
            raise error
        assert hooks_of(model) == before


class Fragile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(I, H)
        self.cell = nn.GRUCell(I, H)

    def forward(self, x: Tensor, error: type[BaseException] | None = None) -> Tensor:
        output, _ = self.rnn(x)
        state = self.cell(x[1], self.cell(x[0]))
        if error is not None:
            raise error
        return output.pow(2).sum() + state.sum()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_after_the_module_leaves_nothing(error: type[BaseException]) -> None:
    model = Fragile()
    x = torch.randn(T, B, I)
    with TimestepProbe(model) as probe:
        model(x).backward()
        expected = probe.measure()
        with pytest.raises(error):
            model(x, error)
        assert probe.measure() == []
        with pytest.raises(error):
            model(x, error)
        model(x).backward()
        assert [(r.name, r.sequences, r.decay_rate) for r in probe.measure()] == [
            (r.name, r.sequences, pytest.approx(r.decay_rate)) for r in expected
        ]


def test_an_exception_inside_the_module_leaves_nothing() -> None:
    rnn, cell = nn.LSTM(I, H), nn.LSTMCell(I, H)
    with TimestepProbe(nn.ModuleList([rnn, cell])) as probe:
        for module in (rnn, cell):
            with pytest.raises((RuntimeError, ValueError)):
                module(torch.randn(T, B, I + 1))
        for bad in (torch.randn(0, B, I), torch.randn(2, 2, 2, 2)):
            with pytest.raises((RuntimeError, ValueError)):
                rnn(bad)
        with pytest.raises((TypeError, AttributeError)):
            rnn()
        assert probe.measure() == []
        rnn(torch.randn(T, B, I))[0].sum().backward()
        (reading,) = probe.measure()
        assert reading.sequences == B


def test_a_graph_that_is_thrown_away_takes_its_copies_along() -> None:
    rnn = nn.LSTM(I, H)
    with TimestepProbe(rnn) as probe:
        output = rnn(torch.randn(T, B, I))[0]
        (call,) = probe._watches[0]._live
        kept = weakref.ref(call.capture)
        del call, output
        gc.collect()
        assert kept() is None
        output = rnn(torch.randn(T, B, I))[0]
        (call,) = probe._watches[0]._live
        kept = weakref.ref(call.capture)
        output.sum().backward()
        del call
        probe.measure()
        assert kept() is None  # though the graph lives on


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.RNN])
def test_activation_checkpointing(kind: type[nn.Module], reentrant: bool) -> None:
    rnn = kind(I, H, num_layers=2, dropout=0.4)
    x = torch.randn(T, B, I, requires_grad=True)

    def step(*, checkpointed: bool) -> None:
        x.grad = None
        torch.manual_seed(3)
        if checkpointed:
            output = checkpoint(lambda x: rnn(x)[0], x, use_reentrant=reentrant)
        else:
            output = rnn(x)[0]
        output.pow(2).sum().backward()

    step(checkpointed=True)
    gradient = x.grad
    with TimestepProbe(rnn) as probe:
        step(checkpointed=False)
        expected = probe.measure()
        step(checkpointed=True)
        readings = probe.measure()
    assert torch.equal(x.grad, gradient)
    assert [reading.note for reading in readings] == ["", ""]
    for ours, theirs in zip(readings, expected, strict=True):
        assert ours.sequences == theirs.sequences
        assert ours.decay_rate == pytest.approx(theirs.decay_rate, rel=1e-5)


def test_forwards_without_gradients_leave_nothing() -> None:
    rnn = nn.LSTM(I, H)
    x = torch.randn(T, B, I)
    with TimestepProbe(rnn) as probe:
        with torch.no_grad():
            assert not rnn(x)[0].requires_grad
        with torch.inference_mode():
            rnn(x)
        rnn.eval()
        rnn(x)
        rnn.train()
        rnn(x)[0].sum().backward()
        (reading,) = probe.measure()
        assert reading.sequences == B
        rnn.requires_grad_(requires_grad=False)
        assert not rnn(x)[0].requires_grad  # nor is a graph made that the user did not ask for
        given = x.clone().requires_grad_()
        rnn(given)[0].sum().backward()
        (reading,) = probe.measure()
    assert reading.sequences == B


def test_gradient_of_a_leaf_input_is_its_own() -> None:
    rnn = nn.GRU(I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    rnn(x)[0].pow(2).sum().backward()
    expected, x.grad = x.grad, None
    with TimestepProbe(rnn):
        rnn(x)[0].pow(2).sum().backward()
    assert torch.equal(x.grad, expected)
    assert x.is_leaf


def test_no_gradient_waits_in_memory_for_the_graph_to_go() -> None:
    rnn = nn.GRU(I, H)
    given: list[Tensor] = []
    with TimestepProbe(rnn):
        rnn.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        output = rnn(torch.randn(T, B, I))[0]
        output.sum().backward()
    assert given[0].requires_grad
    assert given[0].grad is None


def test_gradients_of_gradients() -> None:
    rnn = nn.RNN(I, H)
    x = torch.randn(T, B, I, requires_grad=True)

    def penalty() -> Tensor:
        (grad,) = torch.autograd.grad(rnn(x)[0].pow(2).sum(), x, create_graph=True)
        return grad.pow(2).sum()

    expected = torch.autograd.grad(penalty(), list(rnn.parameters()))
    with TimestepProbe(rnn) as probe:
        for ours, theirs in zip(
            torch.autograd.grad(penalty(), list(rnn.parameters())), expected, strict=True
        ):
            assert torch.equal(ours, theirs)
        snapshot = probe.collect()
    assert not snapshot.values.requires_grad


def test_torch_func_is_left_alone() -> None:
    rnn = nn.RNN(I, H)
    x = torch.randn(T, B, I)
    parameters = dict(rnn.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(rnn, parameters, (x,))[0].pow(2).sum()

    expected = torch.func.grad(loss)(parameters)
    with TimestepProbe(rnn) as probe:
        ours = torch.func.grad(loss)(parameters)
        assert probe.measure() == []
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_copies_and_pickles_of_a_watched_model_are_free() -> None:
    model = Fused(nn.LSTM)
    x = torch.randn(T, B, I)
    model(x)
    with TimestepProbe(model) as probe:
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        copies.append(torch.load(stream, weights_only=False))
        for twin in copies:
            twin(x).sum().backward()
            assert torch.equal(twin(x), model(x))
        assert b"gradguard" not in pickle.dumps(model)
        assert probe.measure() == []


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_distributed_data_parallel(options: dict[str, bool]) -> None:
    model, x = Fragile(), torch.randn(T, B, I)
    model(x).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model, **options)
        with TimestepProbe(model) as probe:
            for _ in range(3):
                model.zero_grad()
                parallel(x).backward()
                names = [reading.name for reading in probe.measure()]
                assert names == ["rnn/l0", "cell"]
                for parameter, grad in zip(model.parameters(), expected, strict=True):
                    assert torch.equal(parameter.grad, grad)
    finally:
        distributed.destroy_process_group()


def test_packed_input_stays_as_it_is() -> None:
    rnn = nn.LSTM(I, H)
    packed = pack_padded_sequence(torch.randn(T, B, I), torch.arange(T, T - B, -1))
    before = packed.data.clone()
    with TimestepProbe(rnn):
        rnn(packed)[0].data.sum().backward()
    assert torch.equal(packed.data, before)
    assert not packed.data.requires_grad
    assert packed.data.grad is None


@pytest.mark.parametrize("where", ["before", "after", "input_arrived", "output_arrived"])
def test_an_error_in_a_hook_is_told_and_training_goes_on(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    on_the_call = where.endswith("arrived")
    owner = _recurrent_calls.RecurrentCall if on_the_call else _recurrent_calls.RecurrentWatch
    monkeypatch.setattr(owner, where, broken)
    rnn = nn.LSTM(I, H)
    x = torch.randn(T, B, I)
    errors: list[Exception] = []
    with timesteps.TimestepProbe(rnn, on_error=errors.append):
        rnn(x)[0].sum().backward()
    assert [str(error) for error in errors] == ["broken"]
    assert rnn.weight_hh_l0.grad is not None
    with TimestepProbe(rnn), pytest.raises(RuntimeError, match="broken"):
        rnn(x)[0].sum().backward()
