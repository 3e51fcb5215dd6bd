"""BatchNormLSTM, against the equations of the paper."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_gradguard.nn.batch_norm import BatchNormLSTM
from tests.nn.plain_layers import (
    FORMS,
    Parameters,
    assert_as_plain,
    called,
    drawn,
    lengths_of,
    plain_layers,
    weighted_sum,
)

EPS, MOMENTUM = 1e-5, 0.25


def norm(p: Parameters, name: str, time: int, rows: Tensor, *, training: bool) -> Tensor:
    """BN of the rows that are alive, without shift; notes its statistics in the buffers."""
    means, variances, tracked = p[f"running_mean_{name}"], p[f"running_var_{name}"], p["tracked"]
    count = len(rows)
    if training and count > 1:
        mean = sum(rows) / count
        variance = sum((row - mean) ** 2 for row in rows) / count
        if time < len(means):
            unbiased = variance.detach() * count / (count - 1)
            means[time] = (1 - MOMENTUM) * means[time] + MOMENTUM * mean.detach()
            variances[time] = (1 - MOMENTUM) * variances[time] + MOMENTUM * unbiased
            tracked[0] = max(int(tracked), time + 1)
    else:
        known = min(time, max(int(tracked) - 1, 0))
        mean, variance = means[known].clone(), variances[known].clone()
    return (rows - mean) / (variance + EPS).sqrt() * p[f"gain_{name}"]


def step_in(*, training: bool):
    def step(p, time, rows, states):
        h, c = states
        gates = norm(p, "ih", time, rows @ p["weight_ih"].T, training=training)
        gates = gates + norm(p, "hh", time, h @ p["weight_hh"].T, training=training)
        if "bias_ih" in p:
            gates = gates + p["bias_ih"] + p["bias_hh"]
        i, f, g, o = gates.view(len(h), 4, -1).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        read = norm(p, "c", time, c, training=training) + (p.get("bias_c", 0.0))
        return o.sigmoid() * read.tanh(), c

    return step


def make(input_size=3, hidden_size=4, tracked=0, **arguments):
    """A module with parameters as after some training, and statistics of that many timesteps."""
    torch.manual_seed(0)
    arguments = {"dtype": torch.float64, "max_length": 3, "momentum": MOMENTUM, **arguments}
    module = BatchNormLSTM(input_size, hidden_size, **arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    for name, buffer in module.named_buffers():
        if name.startswith("tracked"):
            buffer.fill_(tracked)
        elif name.startswith("running_mean"):
            buffer[:tracked].normal_()
        else:
            buffer[:tracked].uniform_(0.5, 2.0)
    return module


def buffers_of(module: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in module.buffers()]


@pytest.mark.parametrize(("max_length", "tracked"), [(3, 2), (10, 2), (10, 8)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["batched", "batch_first", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_follows_the_equations_in_training(
    num_layers, bidirectional, form, bias, max_length, tracked
):
    module = make(
        num_layers=num_layers, bidirectional=bidirectional, bias=bias, tracked=tracked,
        batch_first=form == "batch_first", max_length=max_length,
    )  # fmt: skip
    sequences, states = drawn(module, lengths_of(form))
    leaves = [*sequences, *states, *module.parameters()]
    before, results = buffers_of(module), []
    for run in (
        lambda: plain_layers(module, sequences, states, step_in(training=True)),
        lambda: called(module, form, sequences, states),
    ):
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.copy_(value)
        outputs, last = run()
        gradients = torch.autograd.grad(weighted_sum(outputs, last), leaves)
        results.append([*outputs, *last, *gradients, *buffers_of(module)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tracked", [0, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_follows_the_equations_out_of_training(bidirectional, form, bias, tracked):
    """Sequences are longer than ``max_length``, and than what was tracked."""
    module = make(
        num_layers=2, bidirectional=bidirectional, bias=bias, tracked=tracked, residual=True,
        batch_first=form == "batch_first",
    ).eval()  # fmt: skip
    before = buffers_of(module)
    assert_as_plain(module, form, step_in(training=False), lengths_of(form))
    assert all(torch.equal(a, b) for a, b in zip(before, module.buffers(), strict=True))


def test_a_packed_batch_is_each_of_its_sequences_alone_out_of_training():
    module = make(num_layers=2, bidirectional=True, tracked=3).eval()
    sequences, states = drawn(module, [2, 6, 4])
    together, last = called(module, "packed", sequences, states)
    for b, sequence in enumerate(sequences):
        own = [state[:, b : b + 1] for state in states]
        (alone,), end = called(module, "unbatched", [sequence], own)
        torch.testing.assert_close(together[b], alone, rtol=0, atol=1e-14)
        for one, other in zip(last, end, strict=True):
            torch.testing.assert_close(one[:, b : b + 1], other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("training", [True, False])
def test_padding_never_changes_a_result(training):
    lengths, results = torch.tensor([5, 2, 3]), []
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    for padding in (0.0, 1e6):
        module = make(num_layers=2, bidirectional=True, tracked=3).train(training)
        filled = x.clone()
        for b, length in enumerate(lengths):
            filled[length:, b] = padding
        output, last = module(pack_padded_sequence(filled, lengths, enforce_sorted=False))
        results.append([output.data, *last, *module.buffers()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_normalizes_every_timestep_of_the_batch():
    """With gates of one bias, what h reads has the spread of gain_c at every timestep."""
    module = BatchNormLSTM(3, 4, max_length=6, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("weight"):
                parameter.mul_(1e3)
            if name.startswith("gain_hh"):
                parameter.zero_()
        module.bias_ih_l0.view(4, 4)[3] = 60.0  # output gates fully open
    x = torch.randn(6, 500, 3, dtype=torch.float64)
    read = module(x)[0].atanh()
    torch.testing.assert_close(
        read.std(1, correction=0), torch.full((6, 4), 0.1).double(), rtol=0.01, atol=0
    )
    torch.testing.assert_close(read.mean(1), torch.zeros(6, 4).double(), rtol=0, atol=1e-10)


def test_running_statistics_approach_those_of_the_data():
    module, x = make(momentum=0.5, max_length=4), torch.randn(4, 2000, 3).double()
    hx = (torch.randn(1, 2000, 4).double(), torch.randn(1, 2000, 4).double())
    for _ in range(30):
        trained = module(x, hx)[0]
    torch.testing.assert_close(module.eval()(x, hx)[0], trained, rtol=0.02, atol=1e-3)


def test_more_timesteps_than_training_ever_reaches_do_no_harm():
    """They would otherwise have mean 0 and variance 1, which nothing was ever measured to have."""
    x = torch.randn(5, 20, 3, dtype=torch.float64)
    results = []
    for max_length in (5, 50):
        module = make(max_length=max_length)
        module(x)
        results.append(module.eval()(torch.cat([x, x]))[0])
    assert torch.equal(*results)


def test_longer_sequences_than_max_length_train():
    module = make(num_layers=2, bidirectional=True, max_length=2)
    output, _ = module(torch.randn(6, 4, 3, dtype=torch.float64))
    output.square().sum().backward()
    assert module.tracked_l0.tolist() == [2]
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_a_batch_of_one_sequence_cannot_train():
    module = make()
    for x in (torch.randn(4, 3).double(), torch.randn(4, 1, 3).double()):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            module(x)
    assert module.eval()(torch.randn(4, 3).double())[0].shape == (4, 4)


def test_two_passes_before_one_backward():
    module, x = make(), torch.randn(4, 3, 3, dtype=torch.float64)
    (module(x)[0].sum() + module(2 * x)[0].sum()).backward()
    assert module.weight_hh_l0.grad.isfinite().all()


def test_gradients_agree_with_finite_differences():
    module = make(bidirectional=True, momentum=1e-12)  # statistics stay, call after call
    sequences, states = drawn(module, [4, 4, 4])
    x = torch.stack([s.detach() for s in sequences], 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, h, c: module(x, (h, c))[0], (x, *states))


def test_begins_as_the_authors_do():
    module = BatchNormLSTM(3, 4, max_length=5, bidirectional=True)
    for name, parameter in module.named_parameters():
        if name.startswith("gain"):
            assert torch.equal(parameter, torch.full_like(parameter, 0.1))
        elif name.startswith("bias"):
            expected = torch.zeros_like(parameter)
            if name.startswith("bias_ih"):
                expected[4:8] = 1.0
            assert torch.equal(parameter, expected)
    shapes = {name: tuple(buffer.shape) for name, buffer in module.named_buffers()}
    assert shapes["running_mean_hh_l0"] == shapes["running_var_ih_l0_reverse"] == (5, 16)
    assert shapes["running_var_c_l0"] == (5, 4)


def test_starting_anew_forgets_the_statistics():
    module = make()
    module(torch.randn(3, 4, 3, dtype=torch.float64))
    assert module.tracked_l0.item() == 3
    module.reset_parameters()
    fresh = BatchNormLSTM(3, 4, max_length=3, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), fresh.buffers(), strict=True))


def test_statistics_are_saved_and_loaded(tmp_path):
    module, x = make(num_layers=2), torch.randn(3, 4, 3, dtype=torch.float64)
    module(x)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    twin = BatchNormLSTM(3, 4, 2, max_length=3, dtype=torch.float64)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(twin.eval()(x)[0], module.eval()(x)[0])


def test_takes_the_weights_of_torchs_own_module():
    module, theirs = BatchNormLSTM(3, 4, 2, max_length=3), nn.LSTM(3, 4, 2)
    keys = module.load_state_dict(theirs.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert torch.equal(module.bias_hh_l1, theirs.bias_hh_l1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"max_length": 0}, ValueError, "max_length must be an integer >= 1, got 0"),
        ({"max_length": 2.0}, TypeError, "max_length must be an integer"),
        ({"momentum": 0.0}, ValueError, "momentum must be a number > 0 and <= 1, got 0"),
        ({"eps": -1.0}, ValueError, "eps must be a number > 0"),
        ({"dropout": 2.0}, ValueError, "dropout should be a number in range"),
    ],
)
def test_refuses_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        BatchNormLSTM(3, 4, **{"max_length": 3, **arguments})


def test_refuses_inputs_that_do_not_fit():
    module = BatchNormLSTM(3, 4, max_length=3)
    with pytest.raises(RuntimeError, match="Expected 3, got 5"):
        module(torch.randn(2, 2, 5))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 2, 4\)"):
        module(torch.randn(2, 2, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_trains_under_autocast(dtype, training):
    module = make(num_layers=2, bidirectional=True, dtype=torch.float32).train(training)
    packed = pack_padded_sequence(torch.randn(5, 3, 3, dtype=dtype), torch.tensor([5, 3, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(packed)
    output.data.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_compiles(training):
    module = make(tracked=2).train(training)
    twin = copy.deepcopy(module)
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twin(x))
    for one, other in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_can_be_copied_and_pickled():
    module, x = make(tracked=3).eval(), torch.randn(4, 2, 3, dtype=torch.float64)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[0], module(x)[0])


def test_says_what_it_is():
    module = BatchNormLSTM(3, 4, num_layers=2, max_length=7, eps=1e-3)
    assert repr(module) == "BatchNormLSTM(3, 4, num_layers=2, max_length=7, eps=0.001)"
