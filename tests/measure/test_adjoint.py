"""Exact gradients through time, against autograd on modules written out by their equations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.testing import assert_close

from lightning_gradguard.measure import _way_back
from lightning_gradguard.measure.adjoint import recurrent_adjoint
from tests.measure.recurrent_cases import KINDS, Built, Case, cases
from tests.measure.recurrent_reference import (
    lengths_of,
    time_major,
)
from tests.measure.recurrent_twin import TENSORS, adjoint_of, assert_near, assert_twin, reference_of

# torch says so once per process of any LSTM with a projection in float32 on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
CAUSE = {
    "lstm": "forget_gate",
    "gru": "update_gate",
    "tanh": "activation_slope",
    "relu": "activation_slope",
}


@settings(max_examples=200, derandomize=True)
@given(cases())
def test_every_configuration_equals_autograd(case: Case) -> None:
    built = case.build()
    output = built.rnn(built.input, built.hx)[0]
    ours = adjoint_of(built, output=output)
    theirs = reference_of(built)
    assert_twin(ours, theirs, TOLERANCE[case.dtype])
    assert ours.hidden.dtype == ours.input.dtype == case.dtype
    assert ours.lengths.tolist() == lengths_of(built.rnn, built.input)
    assert (ours.lengths.dtype, ours.lengths.device.type) == (torch.int64, "cpu")
    for causes, expected in zip(ours.causes, theirs.causes, strict=True):
        assert causes[CAUSE[case.kind]].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed unsorted"])
@pytest.mark.parametrize("elements", [1, 4 * 15, 10 * 15])
@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences_are_computed_in_chunks(
    kind: str, elements: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1, 4 and 10 timesteps."""
    given = ("grad_output", "grad_hn", "grad_cn") if kind == "lstm" else ("grad_output", "grad_hn")
    lengths = (11, 11, 11) if layout == "padded" else (3, 11, 5)
    case = Case(kind=kind, layout=layout, lengths=lengths, given=given, hx=True, num_layers=2)
    built = replace(case, bidirectional=True).build()
    monkeypatch.setattr(_way_back, "_CHUNK_ELEMENTS", elements)
    ours = adjoint_of(built, output=built.rnn(built.input, built.hx)[0])
    theirs = reference_of(built)
    assert_twin(ours, theirs, 1e-10)
    for causes, expected in zip(ours.causes, theirs.causes, strict=True):
        assert causes[CAUSE[kind]].item() == pytest.approx(expected)


@settings(max_examples=25, derandomize=True)
@given(cases())
def test_beyond_the_end_of_a_sequence_is_nothing(case: Case) -> None:
    built = replace(case, layout="packed unsorted").build()
    ours = adjoint_of(built)
    for b, length in enumerate(ours.lengths.tolist()):
        for name in ("hidden", "cell", "input_norms"):
            value = getattr(ours, name)
            assert value is None or not value[:, length:, b].any()
        assert not ours.input[length:, b].any()
        assert not ours.arriving[:, length - 1 :, b].any()
        assert not ours.transported[:, length - 1 :, b].any()


@pytest.mark.parametrize("layout", ["packed", "packed unsorted"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_gradient_may_be_padded(layout: str, batch_first: bool) -> None:
    lengths = (6, 4, 1) if layout == "packed" else (4, 1, 6)
    built = Case(
        layout=layout, lengths=lengths, batch_first=batch_first, bidirectional=True
    ).build()
    padded = time_major(built.rnn, built.grads["grad_output"])
    # Behind a sequence's end there is no output whose gradient this could be.
    for b, length in enumerate(lengths):
        padded[length:, b] = 1e3
    if batch_first:
        padded = padded.transpose(0, 1)
    ours = recurrent_adjoint(built.rnn, built.input, grad_output=padded)
    assert_twin(ours, reference_of(built), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_spectral_radius_is_that_of_the_recurrent_weights(kind: str) -> None:
    built = Case(kind=kind, num_layers=2, bidirectional=True).build()
    for causes, name in zip(
        adjoint_of(built).causes, ["l0", "l0_reverse", "l1", "l1_reverse"], strict=True
    ):
        if kind not in {"tanh", "relu"}:
            assert set(causes) == {CAUSE[kind]}
            continue
        assert set(causes) == {"activation_slope", "spectral_radius"}
        weight = getattr(built.rnn, f"weight_hh_{name}").detach()
        radius = torch.linalg.eigvals(weight).abs().max().item()
        assert causes["spectral_radius"].item() == pytest.approx(radius, rel=0.03)
        assert causes["spectral_radius"].dim() == 0


def test_gain_pools_the_sequences() -> None:
    ours = adjoint_of(Case(bidirectional=True, layout="packed", lengths=(7, 3, 1)).build())
    pooled = ours.transported.square().sum(-1).sqrt() / ours.arriving.square().sum(-1).sqrt()
    assert_close(ours.gain, pooled)
    alone = adjoint_of(Case(lengths=(7,)).build())
    assert_close(alone.gain, (alone.transported / alone.arriving).squeeze(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    case = Case(kind=kind, num_layers=2, bidirectional=True, hx=True, given=("grad_output",))
    built = replace(case, dtype=dtype).build()
    ours = adjoint_of(built)
    wide = replace(case, dtype=torch.float32).module()
    wide.load_state_dict(built.rnn.state_dict())
    hx = tuple(part.float() for part in built.hx) if kind == "lstm" else built.hx.float()
    theirs = recurrent_adjoint(
        wide, built.input.float(), hx, grad_output=built.grads["grad_output"].float()
    )
    assert ours.hidden.dtype == ours.input.dtype == torch.float32
    for name in TENSORS:
        if getattr(ours, name) is not None:
            assert_near(getattr(ours, name), getattr(theirs, name).double(), 1e-5, name)
    # The states that were there, rounded to half precision, explain as much of the difference.
    rounded = adjoint_of(built, output=built.rnn(built.input, built.hx)[0])
    assert_near(rounded.input, theirs.input.double(), torch.finfo(dtype).eps, "input")


def dropout_masks(built: Built, state: Tensor) -> list[Tensor]:
    """The factors that the module's own dropout, from this RNG state, puts between its layers."""
    torch.set_rng_state(state)
    rnn, case = built.rnn, built.case
    width = (1 + case.bidirectional) * (case.proj_size or case.hidden_size)
    packed = isinstance(built.input, PackedSequence)
    rows = built.input.data.shape[:1] if packed else (max(case.lengths), len(case.lengths))
    masks = []
    for _ in range(rnn.num_layers - 1):
        mask = nn.functional.dropout(torch.ones(*rows, width, dtype=case.dtype), rnn.dropout)
        if packed:
            mask = time_major(rnn, built.input._replace(data=mask))
        masks.append(mask)
    return masks


@settings(max_examples=60, derandomize=True)
@given(cases())
def test_dropout_between_layers_is_replayed(case: Case) -> None:
    built = replace(case, dropout=0.4, num_layers=max(case.num_layers, 2)).build()
    state = torch.get_rng_state()
    output = built.rnn(built.input, built.hx)[0]
    ours = adjoint_of(built, output=output, rng_state=state)
    theirs = reference_of(built, masks=dropout_masks(built, state))
    assert_near(
        time_major(built.rnn, output.detach())
        if torch.is_tensor(output)
        else time_major(built.rnn, output).detach(),
        theirs.output,
        1e-5,
        "the masks",
    )
    assert_twin(ours, theirs, TOLERANCE[case.dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_gives_the_gradient_of_the_module_itself(kind: str, batch_first: bool) -> None:
    case = Case(kind=kind, num_layers=3, dropout=0.5, batch_first=batch_first, bidirectional=True)
    built = case.build()
    x = built.input.clone().requires_grad_()
    state = torch.get_rng_state()
    output = built.rnn(x)[0]
    (theirs,) = torch.autograd.grad(output, x, built.grads["grad_output"])
    ours = adjoint_of(built, output=output.detach(), rng_state=state)
    assert_near(ours.input, time_major(built.rnn, theirs), 1e-10, "input")


def test_dropout_does_nothing_in_eval_mode_or_to_one_layer() -> None:
    built = Case(num_layers=2, dropout=0.5).build()
    built.rnn.eval()
    for rng_state in (None, torch.get_rng_state()):
        assert_twin(adjoint_of(built, rng_state=rng_state), reference_of(built), 1e-10)
    with pytest.warns(UserWarning, match="dropout"):
        single = Case(dropout=0.5).build()
    assert_twin(adjoint_of(single), reference_of(single), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_as_autograd_hands_them_out(kind: str) -> None:
    """Expanded, and of a forward that went on to autograd."""
    built = Case(kind=kind, num_layers=2).build()
    x = built.input.clone().requires_grad_()
    output, state = built.rnn(x)
    seen: dict[str, Tensor] = {}
    output.register_hook(lambda grad: seen.update(grad_output=grad))
    hidden = state[0] if kind == "lstm" else state
    hidden.register_hook(lambda grad: seen.update(grad_hn=grad))
    (output.sum() + hidden.sum()).backward()
    assert seen["grad_output"].stride() == (0, 0, 0)
    ours = recurrent_adjoint(built.rnn, x, **seen, output=output)
    assert_near(ours.input, x.grad, 1e-10, "input")


def test_a_sequence_of_one_step_has_no_transport() -> None:
    for kind in KINDS:
        built = Case(kind=kind, lengths=(1, 1), bidirectional=True).build()
        ours = adjoint_of(built)
        assert ours.gain.shape == (2, 0)
        assert ours.arriving.shape == ours.transported.shape == (2, 0, 2)
        assert_twin(ours, reference_of(built), 1e-10)


def test_no_signal_has_no_gain() -> None:
    built = Case().build()
    ours = recurrent_adjoint(built.rnn, built.input, grad_output=torch.zeros(7, 3, 5).double())
    assert not ours.hidden.any()
    assert ours.gain.isnan().all()


def test_parametrized_weights_are_those_of_the_forward() -> None:
    built = Case(num_layers=2).build()
    rnn = nn.utils.parametrizations.weight_norm(built.rnn, "weight_hh_l0")
    with torch.no_grad():
        rnn.parametrizations.weight_hh_l0.original0.mul_(1.5)
    x = built.input.clone().requires_grad_()
    output = rnn(x)[0]
    (theirs,) = torch.autograd.grad(output, x, built.grads["grad_output"])
    assert_near(adjoint_of(built, output=output).input, theirs, 1e-10, "input")


@settings(max_examples=40, derandomize=True)
@given(cases())
def test_the_last_gradient_to_enter_is_followed_alone(case: Case) -> None:
    """``followed`` is the adjoint of the same call if nothing else had entered."""
    simple = replace(case, layout="padded", num_layers=1, bidirectional=False, dtype=torch.float64)
    built = replace(simple, given=tuple({*case.given, "grad_output"})).build()
    time = 1 if simple.batch_first else 0
    grads, everywhere = dict(built.grads), built.grads["grad_output"]
    last = grads["grad_output"] = torch.zeros_like(everywhere)
    last.select(time, -1).copy_(everywhere.select(time, -1))
    ours = adjoint_of(built)
    alone = recurrent_adjoint(built.rnn, built.input, built.hx, **grads)
    assert_close(ours.followed[0, 1:], alone.arriving[0])
    assert_close(ours.followed[0, :-1], alone.transported[0])
    assert_close(alone.followed, ours.followed)


@pytest.mark.parametrize("kind", KINDS)
def test_each_sequence_is_followed_from_its_own_last_gradient(kind: str) -> None:
    """Packed, in reverse, and with a loss that ends before the sequence does."""
    case = Case(kind=kind, layout="packed unsorted", lengths=(4, 9, 6), bidirectional=True)
    built = case.build()
    padded = pad_packed_sequence(built.grads["grad_output"])[0]
    width = padded.shape[-1] // 2
    padded[5:, 1, :width] = 0.0  # forward: the last gradient of the longest enters at step 4
    ours = recurrent_adjoint(built.rnn, built.input, grad_output=padded)
    ends = torch.zeros_like(padded)
    for b, (forward, reverse) in enumerate(((3, 0), (4, 0), (5, 0))):
        ends[forward, b, :width] = padded[forward, b, :width]
        ends[reverse, b, width:] = padded[reverse, b, width:]
    alone = recurrent_adjoint(built.rnn, built.input, grad_output=ends)
    assert_close(ours.followed, alone.followed)
    for k, followed in enumerate((alone.followed[0, :-1], alone.followed[1, 1:])):
        on_its_way = alone.transported[k] > 0
        assert on_its_way.any()
        assert_close(followed[on_its_way], alone.transported[k][on_its_way])
    assert not ours.followed[0, 5:, 1].any()
