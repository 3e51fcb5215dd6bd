"""LSTM, GRU and RNN: torch's own bit for bit, and the equations where torch has none."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_gradguard.measure import TimestepProbe, recurrent_adjoint
from lightning_gradguard.measure.activations import ActivationWatch
from lightning_gradguard.nn._scan import Gradients, Trace
from lightning_gradguard.nn.init import initialize
from lightning_gradguard.nn.rnn import GRU, LSTM, RNN
from lightning_gradguard.respond.allowances import cap_allowances
from lightning_gradguard.respond.update_cap import UpdateCap
from tests.nn.rnn_reference import one_sequence

I, H = 3, 4  # noqa: E741 - input
OURS: dict[str, tuple[type[nn.RNNBase], type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (LSTM, nn.LSTM, {}),
    "projected": (LSTM, nn.LSTM, {"proj_size": 2}),
    "gru": (GRU, nn.GRU, {}),
    "tanh": (RNN, nn.RNN, {}),
    "relu": (RNN, nn.RNN, {"nonlinearity": "relu"}),
}
LEAKY = {
    "leaky": {"nonlinearity": "leaky_relu", "negative_slope": 0.2},
    "prelu": {"nonlinearity": "prelu"},
}
# oneDNN has no projections, and says so once in a process.
no_projection = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


def make(name: str, **arguments: Any) -> Any:
    if name in LEAKY:
        return RNN(I, H, **LEAKY[name], **arguments)
    return OURS[name][0](I, H, **OURS[name][2], **arguments)


def flat(result: Any) -> list[Tensor]:
    """The output and the states."""
    output, states = result
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(states if isinstance(states, tuple) else (states,))]


def loss_of(tensors: list[Tensor]) -> Tensor:
    weights = torch.Generator().manual_seed(1)
    return sum((t * torch.randn(t.shape, generator=weights, dtype=t.dtype)).sum() for t in tensors)


def packed(*lengths: int, dtype: torch.dtype = torch.float32) -> PackedSequence:
    sequences = [torch.randn(length, I, dtype=dtype) for length in lengths]
    return pack_sequence(sequences, enforce_sorted=False)


# torch's own, bit for bit


@no_projection
@pytest.mark.parametrize("form", ["batch", "batch first", "packed", "unbatched"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_bit_for_bit_torchs_own(name: str, bidirectional: bool, form: str) -> None:
    ours, torchs, own = OURS[name]
    common = {"num_layers": 2, "bidirectional": bidirectional, "dropout": 0.5, **own}
    common |= {"batch_first": form == "batch first", "bias": form != "unbatched"}
    torch.manual_seed(3)
    theirs = torchs(I, H, **common)
    drawn_after = torch.rand(())
    torch.manual_seed(3)
    mine = ours(I, H, **common)
    assert torch.equal(torch.rand(()), drawn_after)  # what comes next is drawn the same too
    assert all(map(torch.equal, mine.parameters(), theirs.parameters()))

    x = {"packed": packed(2, 5, 3), "unbatched": torch.randn(5, I)}.get(form, torch.randn(5, 4, I))
    results = []
    for rnn in (mine, theirs):
        torch.manual_seed(4)
        result = flat(rnn(x))
        gradients = torch.autograd.grad(loss_of(result), list(rnn.parameters()))
        results.append([*result, *gradients])
    assert mine.runs_fused
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", OURS)
def test_the_constructor_takes_positions_as_torchs_own(name: str) -> None:
    ours, torchs, own = OURS[name]
    if torchs is nn.RNN:
        positions: tuple[Any, ...] = (I, H, 2, own.get("nonlinearity", "tanh"), False, True)
    else:
        positions = (I, H, 2, False, True)
    positions += (0.25, True, *own.values()) if torchs is nn.LSTM else (0.25, True)
    mine, theirs = ours(*positions), torchs(*positions)
    shapes = [{n: p.shape for n, p in rnn.named_parameters()} for rnn in (mine, theirs)]
    assert shapes[0] == shapes[1]
    kept = ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size", "mode")
    assert all(getattr(mine, name) == getattr(theirs, name) for name in kept)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_state_dict_both_ways(name: str, residual: bool) -> None:
    ours, torchs, own = OURS[name]
    mine, theirs = ours(I, H, 2, **own, residual=residual), torchs(I, H, 2, **own)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict())
    assert all(map(torch.equal, mine.parameters(), theirs.parameters()))
    for parameter in mine.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(mine.state_dict())
    assert all(map(torch.equal, mine.parameters(), theirs.parameters()))


def test_a_saved_prelu_loads_without_trust_and_fits_torchs_own_but_for_its_slopes() -> None:
    buffer = io.BytesIO()
    rnn = make("prelu", num_layers=2, bidirectional=True)
    torch.save(rnn.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert make("prelu", num_layers=2, bidirectional=True).load_state_dict(state)
    missing, unexpected = nn.RNN(I, H, 2, bidirectional=True).load_state_dict(state, strict=False)
    slopes = ["slope_l0", "slope_l0_reverse", "slope_l1", "slope_l1_reverse"]
    assert (missing, unexpected) == ([], slopes)


@pytest.mark.parametrize("name", ["lstm", "gru", "tanh", "relu"])
def test_the_probe_sees_them_as_torchs_own(name: str) -> None:
    ours, torchs, own = OURS[name]
    mine, theirs = ours(I, H, 2, **own), torchs(I, H, 2, **own)
    mine.load_state_dict(theirs.state_dict())
    x, readings = torch.randn(9, 2, I), []
    for rnn in (mine, theirs):
        with TimestepProbe(nn.ModuleDict({"rnn": rnn})) as probe:
            rnn(x)[0][-1].sum().backward()
            readings.append(probe.measure())
    assert [r.source for r in readings[0]] == ["exact", "exact"]
    assert repr(readings[0]) == repr(readings[1])  # NaN included


def test_the_adjoint_of_torchs_own_kernel_is_not_taken_for_that_of_another_forward() -> None:
    grad = torch.ones(5, 2, H)
    recurrent_adjoint(LSTM(I, H, 2), torch.randn(5, 2, I), grad_output=grad)
    for rnn in (LSTM(I, H, 2, residual=True), make("prelu"), make("leaky")):
        with pytest.raises(ValueError, match="rnn must run torch's own fused forward"):
            recurrent_adjoint(rnn, torch.randn(5, 2, I), grad_output=grad)


def test_leaky_states_are_as_unbounded_as_those_of_a_relu_and_never_dead() -> None:
    seen = {}
    for name in ("relu", *LEAKY):
        rnn = make(name, bias=False)
        weights = [rnn.weight_ih_l0, rnn.weight_hh_l0]
        assert cap_allowances(rnn, weights, UpdateCap()) == [1.0, UpdateCap().relu_recurrence]
        watch = ActivationWatch(rnn)
        watch.watching = True
        rnn(torch.randn(9, 2, I))
        snapshot = watch.look()
        seen[name] = len(snapshot.decode(snapshot.values.tolist()))
    assert seen == {"relu": 1, "leaky": 0, "prelu": 0}


# where torch has no forward of its own


@no_projection
@given(
    name=st.sampled_from([*OURS, *LEAKY]),
    num_layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
    recorded=st.booleans(),
    given_state=st.booleans(),
    form=st.sampled_from(["batch", "batch first", "packed", "unbatched"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60)
def test_the_equations_in_every_configuration(
    name: str,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
    residual: bool,
    recorded: bool,
    given_state: bool,
    form: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rnn = make(
        name,
        num_layers=num_layers,
        bidirectional=bidirectional,
        bias=bias,
        residual=residual,
        batch_first=form == "batch first",
        dtype=torch.float64,
    )
    lengths = {"packed": [2, 5, 1, 3], "unbatched": [4]}.get(form, [4, 4, 4])
    sequences = [torch.randn(n, I, dtype=torch.float64, requires_grad=True) for n in lengths]
    parts = num_layers * (2 if bidirectional else 1)
    sizes = [rnn.proj_size or H, *([H] if isinstance(rnn, nn.LSTM) else [])]
    hx = [
        torch.randn(parts, len(lengths), size, dtype=torch.float64, requires_grad=True)
        for size in sizes
    ]
    state: Any = tuple(t.squeeze(1) for t in hx) if form == "unbatched" else tuple(hx)
    state = state if len(state) == 2 else state[0]
    if form == "packed":
        x: Any = pack_sequence(sequences, enforce_sorted=False)
    elif form == "unbatched":
        x = sequences[0]
    else:
        x = torch.stack(sequences, 0 if form == "batch first" else 1)
    rnn.recording = Trace(lambda *_: None) if recorded else None
    trace = rnn.recording

    output, last = rnn(x, state if given_state else None)

    if trace is not None:
        assert len(trace.steps) == parts * max(lengths)
        assert rnn.recording is None
    last = last if isinstance(last, tuple) else (last,)
    if form == "packed":
        padded, _ = nn.utils.rnn.pad_packed_sequence(output)
        outputs = [padded[:length, n] for n, length in enumerate(lengths)]
    elif form == "unbatched":
        outputs, last = [output], tuple(tensor.unsqueeze(1) for tensor in last)
    else:
        outputs = list(output.unbind(0 if form == "batch first" else 1))
    twins = [
        one_sequence(rnn, s, [t[:, n] for t in hx] if given_state else None, residual=residual)
        for n, s in enumerate(sequences)
    ]
    ends = [
        torch.stack([torch.stack([end[n] for end in twin[1]]) for twin in twins], 1)
        for n in range(len(sizes))
    ]
    found, wanted = [*outputs, *last], [*(twin[0] for twin in twins), *ends]
    inputs = [*rnn.parameters(), *sequences, *(hx if given_state else [])]
    found += torch.autograd.grad(loss_of(found), inputs)
    wanted += torch.autograd.grad(loss_of(wanted), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["lstm", "gru", "relu", "prelu"])
def test_gradcheck(name: str) -> None:
    rnn = make(name, num_layers=2, residual=True, dtype=torch.float64)
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    names, values = zip(*rnn.named_parameters(), strict=True)

    def run(x: Tensor, *weights: Tensor) -> list[Tensor]:
        parameters = dict(zip(names, weights, strict=True))
        return flat(torch.func.functional_call(rnn, parameters, (x,)))

    assert torch.autograd.gradcheck(run, (x, *values), check_forward_ad=False)


@pytest.mark.parametrize("name", [*OURS, *LEAKY])
@no_projection
def test_the_recorded_pass_is_the_other_one_dropout_included(name: str) -> None:
    rnn = make(name, num_layers=3, residual=True, dropout=0.5)
    x, results = packed(3, 5), []
    for recording in (None, Trace(lambda *_: None)):
        torch.manual_seed(1)
        rnn.recording = recording
        results.append(flat(rnn(x)))
    torch.testing.assert_close(*results)
    rnn.eval()
    assert not torch.allclose(flat(rnn(x))[0], results[0][0])


def test_the_trace_sees_the_adjoint_of_every_state() -> None:
    rnn = RNN(I, H, residual=False, dtype=torch.float64)
    adjoints: list[tuple[Tensor, ...]] = []

    def arrived(trace: Trace, gradients: Gradients) -> None:
        states = [step.made[0] for step in trace.steps]
        adjoints.append(torch.autograd.grad(trace.results[0], states, gradients[0]))

    rnn.recording = trace = Trace(arrived)
    output, _ = rnn(torch.randn(5, 2, I, dtype=torch.float64))
    states = [step.made[0] for step in trace.steps]
    output[-1].sum().backward()
    expected = torch.ones(2, H, dtype=torch.float64)
    (found,) = adjoints
    for adjoint, later in zip(reversed(found), [None, *reversed(states)], strict=False):
        if later is not None:
            expected = (expected * (1 - later**2)) @ rnn.weight_hh_l0
        torch.testing.assert_close(adjoint, expected)


@no_projection
@pytest.mark.parametrize("name", [*OURS, *LEAKY])
def test_padding_and_company_change_nothing(name: str) -> None:
    rnn = make(name, num_layers=2, residual=True, bidirectional=True, dtype=torch.float64)
    sequences = [torch.randn(n, I, dtype=torch.float64) for n in (2, 5, 3)]
    output, states = rnn(pack_sequence(sequences, enforce_sorted=False))
    padded, _ = nn.utils.rnn.pad_packed_sequence(output)
    for n, sequence in enumerate(sequences):
        alone, ends = rnn(sequence)
        torch.testing.assert_close(padded[: len(sequence), n], alone)
        pairs = zip(flat((alone, states))[1:], flat((alone, ends))[1:], strict=True)
        for together, end in pairs:
            torch.testing.assert_close(together[:, n], end)


@no_projection
@pytest.mark.parametrize("name", [*OURS, *LEAKY])
def test_two_chunks_are_one_sequence(name: str) -> None:
    rnn = make(name, num_layers=3, residual=True, batch_first=True)
    x = torch.randn(2, 7, I)
    output, states = rnn(x)
    first, carried = rnn(x[:, :4])
    second, ends = rnn(x[:, 4:], carried)
    torch.testing.assert_close(torch.cat([first, second], 1), output)
    torch.testing.assert_close(flat((x, ends)), flat((x, states)))


def test_a_residual_lets_the_gradient_around_layers() -> None:
    norms = []
    for residual in (False, True):
        torch.manual_seed(0)
        rnn = LSTM(I, 16, num_layers=12, residual=residual)
        rnn(torch.randn(5, 8, I))[0].sum().backward()
        norms.append(rnn.weight_hh_l0.grad.norm().item())
    assert norms[1] > 1e4 * norms[0]


def test_one_layer_with_a_residual_is_torchs_own() -> None:
    assert LSTM(I, H, 1, residual=True).runs_fused
    assert not LSTM(I, H, 2, residual=True).runs_fused
    assert not make("prelu").runs_fused


@pytest.mark.parametrize(
    ("name", "kernel"), [("lstm", "lstm"), ("gru", "gru"), ("tanh", "rnn_tanh")]
)
def test_a_residual_takes_one_fused_call_for_each_layer(
    monkeypatch: pytest.MonkeyPatch, name: str, kernel: str
) -> None:
    calls, fused = [], getattr(torch, kernel)
    monkeypatch.setattr(torch, kernel, lambda *a: calls.append(1) or fused(*a))
    rnn = make(name, num_layers=3, residual=True, bidirectional=True)
    rnn(torch.randn(4, 2, I))
    rnn(packed(2, 4))
    assert len(calls) == 6


def test_the_layers_that_run_alone_are_laid_out_alone() -> None:
    rnn = LSTM(I, H, 2, bidirectional=True, proj_size=2, residual=True)
    for layer in (0, 1):
        alone = rnn._alone(layer)
        own = [p for name, p in rnn.named_parameters() if f"_l{layer}" in name]
        assert all(a is b for a, b in zip(alone._flat_weights, own, strict=True))
        assert alone.input_size == own[0].shape[1]


@pytest.mark.parametrize("kind", [LSTM, GRU, RNN])
@pytest.mark.parametrize("features", [1, H, I + 1])
def test_a_packed_input_of_other_features_is_refused(kind: type[nn.Module], features: int) -> None:
    packed = pack_sequence([torch.randn(5, features), torch.randn(3, features)])
    with pytest.raises(RuntimeError, match=f"input_size. Expected {I}, got {features}"):
        kind(I, H)(packed)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lstm", "gru", "tanh", "prelu"])
def test_cuda_runs_without_compacting_the_weights_at_every_call(name: str) -> None:
    rnn = make(name, num_layers=3, residual=True, bidirectional=True)
    x = torch.randn(6, 2, I)
    expected, _ = rnn(x)
    moved = copy.deepcopy(rnn).cuda()
    made = make(name, num_layers=3, residual=True, bidirectional=True, device="cuda")
    made.load_state_dict(rnn.state_dict())
    for there in (moved, made):  # a warning is an error
        with torch.backends.cudnn.flags(allow_tf32=False):
            output, _ = there(x.cuda())
        torch.testing.assert_close(output.cpu(), expected, rtol=1e-4, atol=1e-4)


# initializations


def test_each_initialization_is_applied_and_applied_again() -> None:
    made = [
        (LSTM(I, H, 2, init="orthogonal"), {"name": "orthogonal"}),
        (LSTM(I, H, 2, init="chrono", t_max=20), {"name": "chrono", "t_max": 20}),
        (GRU(I, H, 2, init="uniform"), {"name": "uniform"}),
        (GRU(I, H, 2, init="chrono", t_max=20), {"name": "chrono", "t_max": 20}),
        (RNN(I, H, 2, "relu", init="he"), {"name": "he"}),
        (RNN(I, H, 2, init="xavier"), {"name": "xavier"}),
        (RNN(I, H, 2, "relu", init="identity"), {"name": "identity"}),
        (make("prelu", init="orthogonal"), {"name": "orthogonal"}),
    ]
    for rnn, told in made:
        twin = copy.deepcopy(rnn)
        before = [parameter.clone() for parameter in rnn.parameters()]
        torch.manual_seed(5)
        rnn.reset_parameters()
        torch.manual_seed(5)
        initialize(twin, **told)
        assert all(map(torch.equal, rnn.parameters(), twin.parameters()))
        assert not all(map(torch.equal, rnn.parameters(), before))


def test_the_constructor_initializes() -> None:
    eye = torch.eye(H)
    assert torch.equal(RNN(I, H, 1, "relu", init="identity").weight_hh_l0, eye)
    blocks = GRU(I, H, init="orthogonal").weight_hh_l0.split(H)
    torch.testing.assert_close([b @ b.T for b in blocks], [eye] * 3)
    lstm = LSTM(I, 64, init="chrono", t_max=100)
    forget = (lstm.bias_ih_l0 + lstm.bias_hh_l0)[64:128]
    assert forget.min() >= 0
    assert 3 < forget.max() <= math.log(99)


@pytest.mark.parametrize("init", ["torch", "orthogonal", "he"])
def test_forget_bias(init: Any) -> None:
    lstm = LSTM(I, H, 2, bidirectional=True, init=init, forget_bias=2.0)
    for _ in range(2):
        for way, layer in itertools.product(("", "_reverse"), (0, 1)):
            total = getattr(lstm, f"bias_ih_l{layer}{way}") + getattr(
                lstm, f"bias_hh_l{layer}{way}"
            )
            assert (total[H : 2 * H] == 2.0).all()
            assert not (total[:H] == 2.0).any()
        lstm.reset_parameters()


def test_he_of_a_leaky_relu_is_for_its_own_slope() -> None:
    rnn = RNN(I, 200, nonlinearity="leaky_relu", negative_slope=2.0, init="he")
    assert rnn.weight_hh_l0.std().item() == pytest.approx(math.sqrt(2 / 5 / 200), rel=0.05)


def test_slopes_begin_and_begin_again_at_a_quarter_and_are_learned() -> None:
    rnn = make("prelu", num_layers=2, bidirectional=True)
    slopes = [p for name, p in rnn.named_parameters() if "slope" in name]
    assert [slope.item() for slope in slopes] == [0.25] * 4
    rnn(torch.randn(5, 2, I))[0].sum().backward()
    torch.optim.SGD(rnn.parameters(), lr=0.1).step()
    assert all(slope.item() != 0.25 for slope in slopes)
    rnn.reset_parameters()
    assert [slope.item() for slope in slopes] == [0.25] * 4


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: LSTM(I, H, init="chrono"), "t_max must be given with init='chrono'"),
        (lambda: LSTM(I, H, t_max=9), "t_max must be left out with init='torch', got 9"),
        (lambda: GRU(I, H, init="uniform", t_max=9), "t_max must be left out with init='uniform'"),
        (
            lambda: LSTM(I, H, init="uniform", forget_bias=1.0),
            "forget_bias must be left out with init='uniform', which sets that bias itself, got",
        ),
        (
            lambda: LSTM(I, H, init="chrono", t_max=9, forget_bias=1.0),
            "forget_bias must be left out with init='chrono'",
        ),
        (
            lambda: LSTM(I, H, bias=False, forget_bias=1.0),
            "forget_bias must be left out with bias=False, got 1.0",
        ),
        (lambda: GRU(I, H, bias=False, init="uniform"), "needs biases, got GRU with bias=False"),
        (lambda: LSTM(I, H, bias=False, init="chrono", t_max=9), "needs biases, got LSTM"),
        (lambda: GRU(I, H, init="identity"), "init of a GRU must be one of 'torch'"),
        (lambda: RNN(I, H, init="chrono"), "init of an Elman RNN must be one of 'torch'"),
        (lambda: LSTM(I, H, forget_bias=math.inf), "value must be"),
        (
            lambda: RNN(I, H, nonlinearity="gelu"),
            "nonlinearity must be one of 'tanh', 'relu', 'leaky_relu', 'prelu', got 'gelu'",
        ),
        (
            lambda: RNN(I, H, nonlinearity="prelu", negative_slope=0.1),
            "negative_slope must be left out with nonlinearity='prelu', got 0.1",
        ),
        (
            lambda: RNN(I, H, nonlinearity="leaky_relu", negative_slope=math.nan),
            "negative_slope must be a number > -inf and < inf, got nan",
        ),
        (lambda: LSTM(I, 0), "hidden_size must be greater than zero"),
    ],
)
def test_bad_arguments(make_it: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="residual should be of type bool, got: int"):
        GRU(I, H, residual=1)
    with pytest.raises(TypeError, match="negative_slope must be a number"):
        RNN(I, H, nonlinearity="leaky_relu", negative_slope="0.1")


@pytest.mark.parametrize("name", [*OURS, *LEAKY])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(5, 2, I + 1), "input.size\\(-1\\) must be equal to input_size. Expected 3"),
        (torch.zeros(I), "Expected input to be 2D or 3D, got 1D"),
        (torch.zeros(0, 2, I), "Expected sequence length to be larger than 0 in RNN"),
        (torch.zeros(5, 2, I, dtype=torch.float64), "RNN input dtype"),
    ],
)
@no_projection
def test_bad_input(name: str, x: Tensor, message: str) -> None:
    for residual in (False, True):
        with pytest.raises((RuntimeError, ValueError), match=message):
            make(name, num_layers=2, residual=residual)(x)


def test_bad_states() -> None:
    x = torch.zeros(5, 2, I)
    for residual in (False, True):
        lstm = LSTM(I, H, 2, proj_size=2, residual=residual)
        with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(2, 2, 2\)"):
            lstm(x, (torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)))
        with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(2, 2, 4\)"):
            lstm(x, (torch.zeros(2, 2, 2), torch.zeros(2, 3, 4)))
        with pytest.raises(RuntimeError, match=r"Expected hidden size \(2, 2, 4\)"):
            GRU(I, H, 2, residual=residual)(x, torch.zeros(2, 3, 4))


# as modules


@no_projection
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", [*OURS, *LEAKY])
def test_autocast(name: str, recorded: bool) -> None:
    rnn = make(name, num_layers=2, residual=True)
    x = torch.randn(6, 2, I)
    expected = flat(rnn(x))
    rnn.recording = Trace(lambda *_: None) if recorded else None
    with torch.autocast("cpu", torch.bfloat16):
        found = flat(rnn(x))
    for tensor, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor.float(), exact, rtol=0.1, atol=0.05)
    loss_of([tensor.float() for tensor in found]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rnn.parameters())


@no_projection
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["lstm", "gru", "tanh", "prelu"])
def test_compile(name: str, residual: bool) -> None:
    torch.compiler.reset()
    rnn = make(name, num_layers=2, residual=residual)
    model = nn.ModuleDict({"rnn": rnn, "head": nn.Linear(H, 1)})
    x = torch.randn(4, 2, I)

    def run(x: Tensor) -> Tensor:
        return model["head"](model["rnn"](x)[0])

    expected = torch.autograd.grad(run(x).sum(), list(model.parameters()))
    compiled = torch.compile(run, backend="eager")
    found = torch.autograd.grad(compiled(x).sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("residual", [False, True])
def test_one_graph_where_recurrent_modules_are_compiled(residual: bool) -> None:
    torch.compiler.reset()
    rnn = GRU(I, H, 2, residual=residual)
    x = torch.randn(4, 2, I)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(rnn, backend="eager", fullgraph=True)
        torch.testing.assert_close(flat(compiled(x)), flat(rnn(x)))


def test_the_compiler_is_not_imported_for_those_who_do_not_compile() -> None:
    program = (
        "import sys, torch; from lightning_gradguard.nn.rnn import GRU;"
        "GRU(2, 3, 2, residual=True)(torch.zeros(2, 1, 2)); print('torch._dynamo' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert run.stdout.strip() == "False", run.stderr


@no_projection
@pytest.mark.parametrize("name", [*OURS, *LEAKY])
def test_copies_and_pickles(name: str) -> None:
    rnn = make(name, num_layers=2, residual=True)
    x = torch.randn(4, 2, I)
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert all(map(torch.equal, flat(twin(x)), flat(rnn(x))))
        assert repr(twin) == repr(rnn)
        assert all(a is not b for a, b in zip(twin.parameters(), rnn.parameters(), strict=True))


@pytest.mark.parametrize("name", ["lstm", "gru", "prelu"])
def test_parametrized_weights_are_used(name: str) -> None:
    rnn = make(name, num_layers=2, residual=True)
    nn.utils.parametrizations.weight_norm(rnn, "weight_hh_l1")
    rnn(torch.randn(4, 2, I))[0].sum().backward()
    assert rnn.parametrizations.weight_hh_l1.original0.grad.abs().sum() > 0


def test_moved_modules_run() -> None:
    for name in ("lstm", "prelu"):
        rnn = make(name, num_layers=2, residual=True).double()
        assert rnn(torch.randn(4, 2, I, dtype=torch.float64))[0].dtype == torch.float64


def test_extra_repr_says_what_differs() -> None:
    assert repr(LSTM(3, 4)) == "LSTM(3, 4)"
    assert repr(LSTM(3, 4, 2, forget_bias=1.0, residual=True)) == (
        "LSTM(3, 4, num_layers=2, forget_bias=1.0, residual=True)"
    )
    assert repr(GRU(3, 4, init="chrono", t_max=9)) == "GRU(3, 4, init='chrono', t_max=9)"
    rnn = RNN(3, 4, nonlinearity="leaky_relu", negative_slope=0.1, bias=False)
    assert repr(rnn) == "RNN(3, 4, bias=False, nonlinearity='leaky_relu', negative_slope=0.1)"
