"""Modules that note their states: the gradient of each is that of the fused kernels' twin."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from lightning_gradguard.measure import TimestepProbe, recurrent_adjoint
from lightning_gradguard.measure._traced_adjoint import traced_adjoint
from lightning_gradguard.measure.adjoint import RecurrentAdjoint
from lightning_gradguard.nn import GRU, LSTM, RNN, DilatedRNN, LayerNormLSTM, SkipLSTM
from lightning_gradguard.nn._layers import Layers
from lightning_gradguard.nn._scan import Gradients, Trace
from tests.models import assert_same_bits
from tests.nn.twins import TwinGRU, TwinLSTM

KINDS = {"lstm": (TwinLSTM, nn.LSTM), "gru": (TwinGRU, nn.GRU)}
F64 = torch.float64


def traced(module: Layers, sequence: Tensor | PackedSequence, loss) -> RecurrentAdjoint:
    """The adjoint of one call, by its trace."""
    found: list[RecurrentAdjoint] = []

    def arrived(trace: Trace, gradients: Gradients) -> None:
        found.append(traced_adjoint(trace, gradients, has_cell="c" in module.state_names))

    module.recording = Trace(arrived)
    loss(*module(sequence)).backward()
    (adjoint,) = found
    return adjoint


@settings(max_examples=40)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    lengths=st.none() | st.lists(st.integers(2, 9), min_size=1, max_size=4),
    entry=st.sampled_from(["last", "all", "states", "some"]),
    seed=st.integers(0, 10**6),
)
def test_all_numbers_are_those_of_the_fused_twin(
    kind: str, layers: int, bidirectional: bool, lengths: list[int] | None, entry: str, seed: int
) -> None:
    torch.manual_seed(seed)
    mine, theirs = (
        make(3, 4, layers, bidirectional=bidirectional, dtype=F64) for make in KINDS[kind]
    )
    theirs.load_state_dict(mine.state_dict())
    sequence: Tensor | PackedSequence = torch.randn(9, 3, 3, dtype=F64)
    if lengths is not None:
        padded = torch.randn(max(lengths), len(lengths), 3, dtype=F64)
        # Packed by length: what is measured of packed sequences is in that order.
        sequence = pack_padded_sequence(padded, sorted(lengths, reverse=True))
    known: dict[str, Tensor] = {}

    def loss(output: Tensor | PackedSequence, states: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        data = output.data if isinstance(output, PackedSequence) else output
        states = states if isinstance(states, tuple) else (states,)
        for name, tensor in zip(("output", "hn", "cn"), (data, *states), strict=False):
            tensor.retain_grad()
            known[name] = tensor
        weights = torch.randn_like(data)
        if entry == "last":
            weights[:-1] = 0.0
        elif entry == "some":
            weights[::2] = 0.0
        total = (data * weights).sum() if entry != "states" else data.sum() * 0.0
        if entry in ("states", "all"):
            total = total + sum((state * torch.randn_like(state)).sum() for state in states)
        return total

    adjoint = traced(mine, sequence, loss)
    grad_output: Tensor | PackedSequence = known["output"].grad
    if isinstance(sequence, PackedSequence):
        grad_output = PackedSequence(known["output"].grad, sequence.batch_sizes)
        sequence = PackedSequence(sequence.data, sequence.batch_sizes)
    expected = recurrent_adjoint(
        theirs,
        sequence,
        grad_output=grad_output,
        grad_hn=known["hn"].grad,
        grad_cn=known["cn"].grad if "cn" in known else None,
    )
    for name in ("hidden", "cell", "arriving", "transported", "followed", "lengths"):
        ours, truth = getattr(adjoint, name), getattr(expected, name)
        assert (ours is None) == (truth is None), name
        if ours is not None:
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12, msg=name)


def test_gradients_of_the_input() -> None:
    weights = torch.randn(6, 2, 8, dtype=F64)
    for makers in KINDS.values():
        mine, theirs = (make(3, 4, 2, bidirectional=True, dtype=F64) for make in makers)
        theirs.load_state_dict(mine.state_dict())
        x = torch.randn(6, 2, 3, dtype=F64, requires_grad=True)
        adjoint = traced(mine, x, lambda output, _: (output * weights).sum())
        torch.testing.assert_close(adjoint.input, x.grad)
        expected = recurrent_adjoint(theirs, x.detach(), grad_output=weights)
        torch.testing.assert_close(adjoint.input_norms, expected.input_norms)


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_reads_what_it_reads_of_the_fused_twin(kind: str) -> None:
    first, second = KINDS[kind]
    model = nn.ModuleDict({"a": first(3, 8, 2), "b": second(3, 8, 2)})
    model["b"].load_state_dict(model["a"].state_dict())
    x = torch.randn(40, 6, 3)
    with TimestepProbe(model) as probe:
        for rnn in model.values():
            rnn(x)[0].square().sum().backward()
        mine0, mine1, theirs0, theirs1 = probe.measure()
    for mine, theirs in ((mine0, theirs0), (mine1, theirs1)):
        assert (mine.source, mine.note) == ("exact", "")
        assert mine.decay_rate == pytest.approx(theirs.decay_rate, rel=1e-4)
        assert mine.decay_error == pytest.approx(theirs.decay_error, rel=1e-3)
        assert mine.profile == pytest.approx(theirs.profile, rel=1e-4)
        assert mine.entry == pytest.approx(theirs.entry, rel=1e-4)
        assert mine.recency == pytest.approx(theirs.recency, rel=1e-4)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_not_a_bit_is_changed(kind: str, exact: bool) -> None:
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = KINDS[kind][0](3, 8, 2, bidirectional=True, residual=True, dropout=0.3)
        x = torch.randn(12, 4, 3, requires_grad=True)
        probe = TimestepProbe(model) if watched else None
        if probe is not None:
            probe.exact = exact
        output, states = model(x)
        first = states[0] if isinstance(states, tuple) else states
        (output.square().sum() + first.sum()).backward()
        if probe is not None:
            assert all(reading.note == "" for reading in probe.measure()) == exact
            probe.close()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append({"output": output.detach(), "x": x.grad, **gradients})
    assert_same_bits(*results)


def test_packed_batch_first_unbatched_and_bfloat16() -> None:
    x = torch.randn(5, 9, 3)
    packed = pack_padded_sequence(x, [9, 2, 5, 5, 7], batch_first=True, enforce_sorted=False)
    for given_, sequences in ((x, 5), (packed, 5), (x[0], 1)):
        model = TwinLSTM(3, 4, batch_first=True)
        with TimestepProbe(model) as probe, torch.autocast("cpu", torch.bfloat16):
            output, _ = model(given_)
            data = output.data if isinstance(output, PackedSequence) else output
            data.sum().backward()
            (reading,) = probe.measure()
        assert (reading.source, reading.timesteps, reading.sequences) == ("exact", 9, sequences)
        assert reading.decay_rate < 0


def test_two_calls_are_read_together_and_two_backward_passes_are_refused() -> None:
    model, x = TwinGRU(3, 4), torch.randn(9, 2, 3)
    with TimestepProbe(model) as probe:
        for _ in range(2):
            model(x)[0].sum().backward()
        (reading,) = probe.measure()
        assert (reading.source, reading.sequences) == ("exact", 4)
        loss = model(x)[0].sum()
        loss.backward(retain_graph=True)
        loss.backward()
        (reading,) = probe.measure()
        assert reading.source == "input"
        assert "more than once" in reading.note


def test_a_graph_of_gradients_is_left_alone() -> None:
    model, x = TwinGRU(3, 4), torch.randn(9, 2, 3)
    with TimestepProbe(model) as probe:
        loss = model(x)[0].square().sum()
        first = torch.autograd.grad(loss, model.weight_hh_l0, create_graph=True)[0]
        first.square().sum().backward()
        assert [reading.source for reading in probe.measure()] == ["input"]
    assert model.weight_hh_l0.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_a_checkpoint_training_is_as_without(reentrant: bool) -> None:
    gradients = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, x = TwinLSTM(3, 4), torch.randn(9, 2, 3, requires_grad=True)
        probe = TimestepProbe(model) if watched else None
        checkpoint(lambda v, m=model: m(v)[0], x, use_reentrant=reentrant).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        if probe is not None:
            (reading,) = probe.measure()
            assert reading.decay_rate < 0
            probe.close()
    assert_same_bits(*gradients)


def test_nothing_is_noted_without_need_and_nothing_is_left_behind() -> None:
    model, x = TwinLSTM(3, 4), torch.randn(9, 2, 3)
    with TimestepProbe(model) as probe:
        with torch.no_grad():
            model(x)
        assert model.recording is None
        with pytest.raises(RuntimeError, match="input_size"):
            model(torch.randn(9, 2, 5))
        probe.watching = False
        model(x)[0].sum().backward()
        assert probe.measure() == []
        probe.watching = True
        gc.collect()
        gc.disable()
        try:
            output = model(x)[0]
            graph = weakref.ref(output.grad_fn)
            del output  # a graph that is thrown away takes its trace along
            assert graph() is None
        finally:
            gc.enable()
    assert model.recording is None
    copy.deepcopy(model)(x)


def test_a_failing_measurement_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ArithmeticError("of the probe's own")

    monkeypatch.setattr("lightning_gradguard.measure._traced_calls.traced_adjoint", fail)
    errors: list[Exception] = []
    model = TwinLSTM(3, 4)
    with TimestepProbe(model, on_error=errors.append):
        model(torch.randn(9, 2, 3))[0].sum().backward()
    assert [str(error) for error in errors] == ["of the probe's own"]
    assert all(p.grad is not None for p in model.parameters())


def test_too_many_states_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gradguard.measure._traced_calls._MOST_STATES", 9)
    model = TwinLSTM(3, 4)
    with TimestepProbe(model) as probe:
        model(torch.randn(9, 2, 3))[0].sum().backward()
        (reading,) = probe.measure()
    assert reading.source == "input"
    assert "too many to keep their gradients" in reading.note


def test_kinds_in_all_their_configurations_train_under_the_probe() -> None:
    for kind, layers, both, bias in itertools.product(KINDS, (1, 2), (False, True), (False, True)):
        model = KINDS[kind][0](3, 4, layers, bias, bidirectional=both)
        with TimestepProbe(model) as probe:
            model(torch.randn(9, 2, 3))[0][0].sum().backward()
            assert len(probe.measure()) == layers * (1 + both)


@pytest.mark.parametrize("make", [LSTM, GRU])
def test_residual_stacks_run_their_kernels_and_are_measured_beside(make: type[LSTM | GRU]) -> None:
    twin = (TwinLSTM if make is LSTM else TwinGRU)(3, 4, 3, residual=True, dtype=F64)
    model = make(3, 4, 3, residual=True, dtype=F64)
    model.load_state_dict(twin.state_dict())
    weights = torch.randn(9, 2, 4, dtype=F64)
    x = torch.randn(9, 2, 3, dtype=F64, requires_grad=True)
    mine, theirs = (traced(m, x, lambda output, _: (output * weights).sum()) for m in (model, twin))
    for name in ("hidden", "arriving", "transported", "followed", "input_norms"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name))


@pytest.mark.parametrize(
    "make",
    [
        lambda: LSTM(3, 8, 3, residual=True, dropout=0.5),
        lambda: RNN(3, 8, 2, nonlinearity="leaky_relu", residual=True, dropout=0.5),
        lambda: DilatedRNN(3, 8, 3, cell="gru", residual=True),
        lambda: LayerNormLSTM(3, 8, 2, zoneout=0.1, recurrent_dropout=0.1),
        lambda: SkipLSTM(3, 8, 2, dropout=0.5),
    ],
    ids=["residual", "leaky", "dilated", "normalized", "skip"],
)
def test_every_kind_of_module_is_measured_without_changing_a_bit(make) -> None:
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, x = make(), torch.randn(24, 4, 3, requires_grad=True)
        probe = TimestepProbe(model) if watched else None
        model(x)[0].square().sum().backward()
        results.append({"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}})
        results[-1]["random"] = torch.rand(3)
        if probe is not None:
            readings = probe.measure()
            assert readings
            assert {(r.source, r.note) for r in readings} == {("exact", "")}
            assert all(r.decay_rate < 0.1 for r in readings)
    assert_same_bits(*results)
