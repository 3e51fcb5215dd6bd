"""LayerNormLSTM and LayerNormGRU, against the equations of the paper."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_gradguard.nn.init import forget_bias_
from lightning_gradguard.nn.normalized import LayerNormGRU, LayerNormLSTM
from tests.nn.plain_layers import FORMS, Parameters, assert_as_plain, called, drawn, lengths_of

MODULES = (LayerNormLSTM, LayerNormGRU)
EPS = 1e-5


def norm(vector: Tensor, gain: Tensor) -> Tensor:
    """LN of one vector, without shift."""
    mean = sum(vector) / len(vector)
    variance = sum((unit - mean) ** 2 for unit in vector) / len(vector)
    return torch.stack([(unit - mean) / (variance + EPS).sqrt() for unit in vector]) * gain


def zero_if_none(p: Parameters, name: str, size: int) -> Tensor:
    return p[name] if name in p else torch.zeros(size, dtype=torch.float64)


def lstm_step(p, time, rows, states, zoneout=(0.0, 0.0)):
    H = states[0].shape[1]
    made = []
    for x, h, c in zip(rows, *states, strict=True):
        gates = norm(p["weight_hh"] @ h, p["gain_hh"]) + norm(p["weight_ih"] @ x, p["gain_ih"])
        gates = gates + zero_if_none(p, "bias_ih", 4 * H) + zero_if_none(p, "bias_hh", 4 * H)
        i, f, g, o = gates.view(4, H)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        read = new_c
        if "gain_c" in p:
            read = norm(new_c, p["gain_c"]) + zero_if_none(p, "bias_c", H)
        new_h = o.sigmoid() * read.tanh()
        keep_h, keep_c = zoneout
        made.append((keep_h * h + (1 - keep_h) * new_h, keep_c * c + (1 - keep_c) * new_c))
    return tuple(torch.stack(kind) for kind in zip(*made, strict=True))


def gru_step(p, time, rows, states, zoneout=0.0):
    H = states[0].shape[1]
    b_ih, b_hh = zero_if_none(p, "bias_ih", 3 * H), zero_if_none(p, "bias_hh", 3 * H)
    made = []
    for x, h in zip(rows, *states, strict=True):
        gates, candidates = [], []
        for W, gain, bias, v in (
            (p["weight_ih"], p["gain_ih"], b_ih, x),
            (p["weight_hh"], p["gain_hh"], b_hh, h),
        ):
            gates.append(norm(W[: 2 * H] @ v, gain[: 2 * H]) + bias[: 2 * H])
            candidates.append(norm(W[2 * H :] @ v, gain[2 * H :]) + bias[2 * H :])
        r, z = (gates[0] + gates[1]).sigmoid().view(2, H)
        n = (candidates[0] + r * candidates[1]).tanh()
        new = (1 - z) * n + z * h
        made.append((zoneout * h + (1 - zoneout) * new,))
    return tuple(torch.stack(kind) for kind in zip(*made, strict=True))


STEPS = {LayerNormLSTM: lstm_step, LayerNormGRU: gru_step}


def make(kind, input_size=3, hidden_size=4, **arguments):
    """A module in which no gain is 1 and no bias 0."""
    torch.manual_seed(0)
    module = kind(input_size, hidden_size, **{"dtype": torch.float64, **arguments})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", MODULES)
def test_follows_the_equations_forward_and_backward(kind, num_layers, bidirectional, form, bias):
    module = make(
        kind, num_layers=num_layers, bidirectional=bidirectional, bias=bias,
        batch_first=form == "batch_first",
    )  # fmt: skip
    assert_as_plain(module, form, STEPS[kind], lengths_of(form))


@pytest.mark.parametrize("form", ["batched", "packed"])
def test_can_leave_the_cell_as_it_is(form):
    module = make(LayerNormLSTM, normalize_cell=False, num_layers=2, residual=True)
    assert not [name for name, _ in module.named_parameters() if name.endswith("_c_l0")]
    assert_as_plain(module, form, lstm_step, lengths_of(form))


@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from(MODULES),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    zoneout=st.floats(0, 0.9),
)
def test_takes_the_expectation_of_zoneout_and_no_dropout_out_of_training(kind, lengths, zoneout):
    module = make(kind, zoneout=zoneout, recurrent_dropout=0.5, bidirectional=True).eval()

    def step(p, time, rows, states):
        pair = (zoneout, zoneout) if kind is LayerNormLSTM else zoneout
        return STEPS[kind](p, time, rows, states, zoneout=pair)

    assert_as_plain(module, "packed", step, lengths)


def test_zones_out_hidden_state_and_cell_by_themselves():
    module = make(LayerNormLSTM, zoneout=(0.2, 0.7)).eval()

    def step(p, time, rows, states):
        return lstm_step(p, time, rows, states, zoneout=(0.2, 0.7))

    assert_as_plain(module, "batched", step, [4, 4])


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("packed", [False, True])
def test_zoneout_in_training_keeps_units_exactly_and_as_often_as_asked(kind, packed):
    module = make(kind, hidden_size=16, zoneout=0.3)
    sequences, states = drawn(module, [40] * 20)
    outputs, _ = called(module, "packed" if packed else "batched", sequences, states)

    h = torch.stack(outputs, 1)
    before = torch.cat([states[0], h[:-1]])
    share = (h == before).double().mean().item()

    assert share == pytest.approx(0.3, abs=0.02)  # 12800 units: five standard deviations


def test_the_pair_of_zoneouts_is_of_the_hidden_state_and_of_the_cell():
    module = make(LayerNormLSTM, hidden_size=16, zoneout=(0.0, 0.5))
    sequences, states = drawn(module, [1] * 50)
    _, (h, c) = called(module, "batched", sequences, states)

    assert not (h == states[0]).any()
    assert 0.4 < (c == states[1]).double().mean().item() < 0.6


@pytest.mark.parametrize("kind", MODULES)
def test_recurrent_dropout_has_a_mask_per_timestep_and_keeps_the_mean(kind):
    """With h_0 = c_0 = 0 the first state is in proportion to the candidate."""
    module = make(kind, hidden_size=8, recurrent_dropout=0.25, **(
        {"normalize_cell": False} if kind is LayerNormLSTM else {}
    ))  # fmt: skip
    x = torch.randn(1, 3, dtype=torch.float64).expand(1, 4000, 3)
    state = 1 if kind is LayerNormLSTM else 0

    def first_states():
        last = module(x)[1]
        return (last[state] if kind is LayerNormLSTM else last)[0].detach()

    with_dropout = first_states()
    without = module.eval() and first_states()

    dropped = with_dropout == 0
    assert 0.23 < dropped.double().mean().item() < 0.27
    torch.testing.assert_close(with_dropout[~dropped], (without / 0.75)[~dropped])


def test_recurrent_dropout_never_drops_the_memory():
    module = make(LayerNormLSTM, hidden_size=8, recurrent_dropout=0.9)
    with torch.no_grad():  # only the forget gate is open
        module.bias_ih_l0.copy_(torch.tensor([-60.0, 60.0, 0.0, 0.0]).repeat_interleave(8))
    c = torch.ones(1, 2, 8, dtype=torch.float64)
    _, (_, last) = module(torch.randn(30, 2, 3, dtype=torch.float64), (torch.zeros_like(c), c))

    torch.testing.assert_close(last, c)


@pytest.mark.parametrize("kind", MODULES)
def test_masks_differ_from_timestep_to_timestep(kind):
    module = make(kind, hidden_size=32, zoneout=0.5)
    h = module(torch.randn(2, 1, 3, dtype=torch.float64))[0][:, 0]

    kept = [h[0] == 0, h[1] == h[0]]

    assert not torch.equal(*kept)


@pytest.mark.parametrize("kind", MODULES)
def test_draws_nothing_where_there_is_no_noise(kind):
    module, x = make(kind, zoneout=0.0), torch.randn(3, 2, 3, dtype=torch.float64)
    noisy = make(kind, zoneout=0.4, recurrent_dropout=0.4).eval()
    state = torch.get_rng_state()
    module(x), noisy(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", MODULES)
def test_noise_can_be_drawn_again(kind):
    module, x = make(kind, zoneout=0.3, recurrent_dropout=0.3), torch.randn(3, 2, 3).double()
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(module(x)[0])
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], module(x)[0])


@pytest.mark.parametrize("kind", MODULES)
def test_padding_never_changes_a_result(kind):
    module = make(kind, num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    lengths = torch.tensor([5, 2, 3])
    results = []
    for padding in (0.0, 1e6):
        filled = x.clone()
        for b, length in enumerate(lengths):
            filled[length:, b] = padding
        packed = pack_padded_sequence(filled, lengths, enforce_sorted=False)
        output, last = module(packed)
        results.append([output.data, *(last if isinstance(last, tuple) else (last,))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", MODULES)
def test_a_state_carried_across_chunks_is_one_run(kind):
    module = make(kind, num_layers=2, zoneout=0.2).eval()
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    whole, last = module(x)
    first, state = module(x[:2])
    second, end = module(x[2:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(end, last, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", MODULES)
def test_gradients_agree_with_finite_differences(kind):
    module = make(kind, zoneout=0.2).eval()
    sequences, states = drawn(module, [3, 3])
    x = torch.stack([s.detach() for s in sequences], 1).requires_grad_()

    def outputs(x, *hx):
        output, last = module(x, hx if len(hx) > 1 else hx[0])
        return (output, *last) if isinstance(last, tuple) else (output, last)

    assert torch.autograd.gradcheck(outputs, (x, *states))


@pytest.mark.parametrize("kind", MODULES)
def test_the_scale_of_the_matrices_does_not_matter(kind):
    """What the norms are for; not exactly so, because of eps."""
    module, x = make(kind, num_layers=2, eps=1e-12), torch.randn(4, 2, 3, dtype=torch.float64)
    hx = torch.ones(2, 2, 4, dtype=torch.float64)
    hx = (hx, hx) if kind is LayerNormLSTM else hx
    before = module(x, hx)[0]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("weight"):
                parameter.mul_(7.0)
    torch.testing.assert_close(module(x, hx)[0], before, rtol=1e-6, atol=1e-8)


def test_begins_with_gains_of_one_and_an_open_forget_gate():
    module = LayerNormLSTM(3, 4, num_layers=2, bidirectional=True)
    for name, parameter in module.named_parameters():
        expected = torch.ones_like(parameter) if name.startswith("gain") else None
        if name.startswith("bias"):
            expected = torch.zeros_like(parameter)
            if name.startswith("bias_ih"):
                expected[4:8] = 1.0
        if expected is None:
            assert 0.2 < parameter.abs().max() <= 0.5
        else:
            assert torch.equal(parameter, expected)
    gru = LayerNormGRU(3, 4)
    assert not gru.bias_ih_l0.any()
    assert not gru.bias_hh_l0.any()


@pytest.mark.parametrize("kind", MODULES)
def test_takes_the_weights_of_torchs_own_module(kind):
    module = kind(3, 4, num_layers=2, bidirectional=True)
    theirs = (nn.LSTM if kind is LayerNormLSTM else nn.GRU)(3, 4, num_layers=2, bidirectional=True)
    keys = module.load_state_dict(theirs.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all("gain" in key or "bias_c" in key for key in keys.missing_keys)
    assert torch.equal(module.weight_hh_l1_reverse, theirs.weight_hh_l1_reverse)


def test_takes_the_initializers():
    module = forget_bias_(LayerNormLSTM(3, 4), 5.0)
    assert (module.bias_ih_l0 + module.bias_hh_l0)[4:8].tolist() == [5.0] * 4


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "words"),
    [
        (
            LayerNormLSTM,
            {"recurrent_dropout": 1.0},
            ValueError,
            "recurrent_dropout must be a number",
        ),
        (LayerNormLSTM, {"zoneout": (0.1, 1.0)}, ValueError, "zoneout must be a number"),
        (LayerNormLSTM, {"zoneout": (0.1,)}, ValueError, "or a pair of them, for h and for c"),
        (LayerNormLSTM, {"zoneout": "0.1"}, TypeError, "zoneout must be a number"),
        (LayerNormLSTM, {"normalize_cell": 1}, TypeError, "normalize_cell must be True or False"),
        (LayerNormLSTM, {"eps": 0.0}, ValueError, "eps must be a number > 0, got 0"),
        (LayerNormLSTM, {"hidden_size": 1}, ValueError, "hidden_size must be >= 2"),
        (LayerNormLSTM, {"hidden_size": 0}, ValueError, "hidden_size must be greater than zero"),
        (LayerNormGRU, {"hidden_size": 1}, ValueError, "hidden_size must be >= 2"),
        (LayerNormGRU, {"zoneout": -0.1}, ValueError, "zoneout must be a number"),
        (LayerNormGRU, {"zoneout": (0.1, 0.1)}, TypeError, "zoneout must be a number"),
        (LayerNormGRU, {"eps": "1"}, TypeError, "eps must be a number"),
    ],
)
def test_refuses_bad_arguments(kind, arguments, error, words):
    with pytest.raises(error, match=words):
        kind(**{"input_size": 3, "hidden_size": 4, **arguments})


@pytest.mark.parametrize("kind", MODULES)
def test_refuses_inputs_that_do_not_fit(kind):
    module = kind(3, 4)
    with pytest.raises(RuntimeError, match="Expected 3, got 5"):
        module(torch.randn(2, 2, 5))
    with pytest.raises(ValueError, match=r"dtype \(torch.float64\) does not match"):
        module(torch.randn(2, 2, 3).double())


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_trains_under_autocast(kind, dtype, training):
    module = make(kind, num_layers=2, bidirectional=True, zoneout=0.1, recurrent_dropout=0.1,
                  dtype=torch.float32).train(training)  # fmt: skip
    packed = pack_padded_sequence(torch.randn(5, 3, 3, dtype=dtype), torch.tensor([5, 3, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(packed)
    output.data.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("kind", MODULES)
def test_compiles(kind):
    module = make(kind, zoneout=0.1).eval()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("kind", MODULES)
def test_can_be_copied_and_pickled(kind):
    module, x = make(kind, zoneout=0.1).eval(), torch.randn(4, 2, 3, dtype=torch.float64)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[0], module(x)[0])


def test_says_what_it_is():
    module = LayerNormLSTM(3, 4, num_layers=2, zoneout=(0.05, 0.5), normalize_cell=False)
    assert repr(module) == (
        "LayerNormLSTM(3, 4, num_layers=2, zoneout=(0.05, 0.5), normalize_cell=False)"
    )
    assert repr(LayerNormGRU(3, 4, recurrent_dropout=0.1)) == (
        "LayerNormGRU(3, 4, recurrent_dropout=0.1)"
    )
