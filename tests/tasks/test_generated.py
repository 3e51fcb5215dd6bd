"""Sequences that are drawn obey their definitions, and baselines are what guessing costs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.tasks import (
    AddingProblem,
    CopyMemory,
    FrequencyDiscrimination,
    TemporalOrder,
)

MANY = 20_000
seeds = st.integers(0, 2**32 - 1)
lengths = st.integers(10, 80)


def batch_of(task, name="test"):
    return task.split(name).batch()


# -- adding ---------------------------------------------------------------------------------------

PLACES = {
    "anywhere": lambda T: (range(T), range(T)),
    "halves": lambda T: (range(T // 2), range(T // 2, T)),
    "first_tenth": lambda T: (range(T // 10), range(T // 2, T)),
    "first_half": lambda T: (range(T // 10), range(T // 10, T // 2)),
}


@given(
    length=lengths, seed=seeds, variant=st.sampled_from(sorted(PLACES)), low=st.floats(-5, 5),
    width=st.floats(0.1, 10),
)  # fmt: skip
def test_adding_marks_two_steps_where_the_variant_says_and_sums_them(
    length, seed, variant, low, width
):
    task = AddingProblem(length, variant, low, low + width, seed=seed, test_size=50)
    inputs_BTI, targets_B = batch_of(task)
    values_BT, markers_BT = inputs_BTI.unbind(-1)

    assert set(markers_BT.unique().tolist()) == {0.0, 1.0}
    assert (markers_BT.sum(1) == 2).all()
    first_allowed, second_allowed = PLACES[variant](length)
    steps_B2 = markers_BT.nonzero()[:, 1].view(-1, 2)
    assert all(step in first_allowed for step in steps_B2[:, 0].tolist())
    assert all(step in second_allowed for step in steps_B2[:, 1].tolist())
    torch.testing.assert_close((values_BT * markers_BT).sum(1), targets_B)
    assert float(values_BT.min()) >= low - 1e-5
    assert float(values_BT.max()) <= low + width + 1e-5


@pytest.mark.parametrize("variant", sorted(PLACES))
def test_adding_marks_every_step_that_is_allowed(variant):
    inputs_BTI, _ = batch_of(AddingProblem(20, variant, test_size=MANY))

    counts_T = inputs_BTI[..., 1].sum(0)

    first, second = PLACES[variant](20)
    assert (counts_T > 0).tolist() == [step in {*first, *second} for step in range(20)]
    # Evenly: within five standard deviations of what is expected.
    for allowed in (first, second):
        alike = 2 if variant == "anywhere" else 1
        expected = alike * MANY / len(allowed)
        assert (counts_T[allowed.start : allowed.stop] - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.5, 0.5), (-1.0, 3.0)])
def test_adding_baseline_is_the_error_of_the_mean(low, high):
    task = AddingProblem(20, low=low, high=high, test_size=MANY)
    _, targets = batch_of(task)

    error = float(task.loss(torch.full_like(targets, low + high), targets))

    # The fourth moment of a sum of two uniforms gives a standard deviation of 1.18 variances.
    assert error == pytest.approx(task.baseline, rel=5 * 1.18 / MANY**0.5)
    assert AddingProblem(low=0, high=1).baseline == pytest.approx(1 / 6)


# -- copying --------------------------------------------------------------------------------------

copies = st.fixed_dictionaries(
    {
        "delay": st.integers(1, 40),
        "symbols": st.integers(2, 12),
        "copy_length": st.integers(1, 12),
        "variant": st.sampled_from(["fixed", "variable", "selective"]),
        "seed": seeds,
    }
)


@given(arguments=copies)
def test_copy_asks_for_the_symbols_in_their_order_after_the_signal(arguments):
    task = CopyMemory(**arguments, one_hot=False, test_size=30)
    inputs_BT, targets_BT = batch_of(task)
    symbols, copied, delay = task.symbols, task.copy_length, task.delay

    assert inputs_BT.shape == targets_BT.shape == (30, delay + 2 * copied)
    for inputs, targets in zip(inputs_BT.tolist(), targets_BT.tolist(), strict=True):
        shown = [symbol for symbol in inputs if 0 < symbol <= symbols]
        assert len(shown) == copied
        assert inputs.count(symbols + 1) == 1
        signal = inputs.index(symbols + 1)
        assert targets[signal + 1 : signal + 1 + copied] == shown
        assert sum(targets) == sum(shown)  # and nothing else is asked for
        last = max(step for step, symbol in enumerate(inputs) if 0 < symbol <= symbols)
        if task.variant == "selective":
            assert signal == copied - 1 + delay
            assert last < signal
        else:
            assert inputs[:copied] == shown
            assert 1 <= signal - last <= delay
            assert task.variant == "variable" or signal - last == delay


def test_copy_varies_what_its_variant_names():
    signals = {
        variant: batch_of(CopyMemory(9, variant, one_hot=False, test_size=2000))[0]
        for variant in ("variable", "selective")
    }

    assert set((signals["variable"] == 9).nonzero()[:, 1].tolist()) == set(range(10, 19))
    shown = (signals["selective"] > 0) & (signals["selective"] < 9)
    assert (shown.sum(0) > 0).tolist() == [True] * 18 + [False] * 11


@given(arguments=copies)
def test_copy_baseline_is_the_loss_of_who_sees_the_signal_only(arguments):
    task = CopyMemory(**arguments, one_hot=False, test_size=20)
    inputs_BT, targets_BT = batch_of(task)
    since_BT = torch.arange(task.length) - (inputs_BT == task.symbols + 1).int().argmax(
        1, keepdim=True
    )
    recalling_BT = (since_BT >= 1) & (since_BT <= task.copy_length)

    blank = torch.full((task.symbols + 1,), -1e4)
    blank[0] = 0.0
    guess = torch.zeros(task.symbols + 1)
    guess[0] = -1e4
    outputs = torch.where(recalling_BT.unsqueeze(-1), guess, blank)

    assert float(task.loss(outputs, targets_BT)) == pytest.approx(task.baseline, rel=1e-4)


def test_copy_baseline_is_the_published_one():
    assert CopyMemory(delay=1000).baseline == pytest.approx(10 * math.log(8) / 1020)


def test_copy_score_counts_the_steps_to_be_recalled_only():
    task = CopyMemory(5, symbols=4, copy_length=2, test_size=MANY)
    _, targets_BT = batch_of(task)
    right = torch.nn.functional.one_hot(targets_BT, 5).float()
    guessed = torch.rand(*targets_BT.shape, 5)
    guessed[..., 0] = 0.0

    assert float(task.score(right, targets_BT)) == 1.0
    assert float(task.score(torch.eye(5)[0].expand_as(right), targets_BT)) == 0.0
    assert float(task.score(guessed, targets_BT)) == pytest.approx(0.25, abs=0.02)


# -- temporal order -------------------------------------------------------------------------------


@given(length=lengths, symbols=st.sampled_from([2, 3]), seed=seeds)
def test_order_shows_symbols_in_their_windows_and_names_them_by_class(length, symbols, seed):
    task = TemporalOrder(length, symbols, one_hot=False, seed=seed, test_size=50)
    inputs_BT, targets_B = batch_of(task)
    starts = {2: [10, 50], 3: [10, 33, 66]}[symbols]

    for inputs, target in zip(inputs_BT.tolist(), targets_B.tolist(), strict=True):
        steps = [step for step, symbol in enumerate(inputs) if symbol < 2]
        assert len(steps) == symbols
        for step, percent in zip(steps, starts, strict=True):
            start = length * percent // 100
            assert start <= step < start + length // 10
        assert target == int("".join(str(inputs[step]) for step in steps), 2)
        assert set(inputs) <= set(range(6))


@pytest.mark.parametrize(("symbols", "classes"), [(2, 4), (3, 8)])
def test_order_baseline_is_the_entropy_of_its_classes(symbols, classes):
    task = TemporalOrder(20, symbols, test_size=MANY)
    _, targets = batch_of(task)
    shares = torch.bincount(targets, minlength=classes) / MANY

    assert task.classes == classes
    assert float(-(shares * shares.log()).sum()) == pytest.approx(task.baseline, abs=1e-3)
    assert float(task.loss(torch.zeros(MANY, classes), targets)) == pytest.approx(task.baseline)
    assert task.baseline == pytest.approx(math.log(classes))


def test_one_hot_inputs_are_the_indices():
    for make in (TemporalOrder, CopyMemory):
        hot = batch_of(make(test_size=20))[0]
        indices = batch_of(make(test_size=20, one_hot=False))[0]

        assert indices.dtype == torch.int64
        assert torch.equal(hot.argmax(-1), indices)
        assert (hot.sum(-1) == 1).all()


# -- frequency ------------------------------------------------------------------------------------


@given(seed=seeds, sampling_period=st.sampled_from([0.5, 1.0]))
def test_frequency_signals_are_sines_whose_period_fits_their_class(seed, sampling_period):
    task = FrequencyDiscrimination(200, sampling_period, seed=seed, test_size=40)
    inputs_BTI, targets_B = batch_of(task)
    x_BT = inputs_BTI.squeeze(-1).double()

    # x_(t-1) + x_(t+1) = 2 cos(2π Δ/P) x_t for a sine, which gives its period back.
    middle = x_BT[:, 1:-1]
    cosine_B = ((x_BT[:, :-2] + x_BT[:, 2:]) * middle).sum(1) / (2 * middle.square().sum(1))
    fit = 2 * cosine_B.unsqueeze(1) * middle - x_BT[:, :-2] - x_BT[:, 2:]
    assert float(fit.abs().max()) < 1e-5
    found_B = 2 * math.pi * sampling_period / cosine_B.clamp(-1, 1).arccos()

    assert targets_B.tolist() == [0, 1] * 20
    inside_B = (found_B > 5) & (found_B < 6)
    assert inside_B[1::2].all()
    # Sampled every 1 ms, a period between 1.2 and 1.25 ms looks the same as one between 5 and 6.
    assert sampling_period == 1.0 or not inside_B[::2].any()
    assert float(found_B.max()) < 101


def test_frequency_draws_periods_and_phases_evenly():
    task = FrequencyDiscrimination(100, test_size=MANY)
    inputs_BTI, targets_B = batch_of(task)

    # Of the other class 4/98 are shorter than 5 ms: those turn more than 20 times in 100 ms.
    others = inputs_BTI[targets_B == 0].squeeze(-1)
    ups = ((others[:, :-1] < 0) & (others[:, 1:] >= 0)).sum(1)
    assert float((ups > 18).float().mean()) == pytest.approx(4 / 98, abs=0.015)
    # A sine of even phase is at its start above sin(π/6) in a third of all cases.
    assert float((inputs_BTI[:, 0] > 0.5).float().mean()) == pytest.approx(1 / 3, abs=0.02)


def test_frequency_baseline_is_that_of_guessing():
    task = FrequencyDiscrimination(20, test_size=100)
    _, targets = batch_of(task)

    assert float(task.loss(torch.zeros(100, 2), targets)) == pytest.approx(task.baseline)
    assert int(targets.sum()) == 50


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddingProblem(1), "length must be an integer >= 2, got 1"),
        (lambda: AddingProblem(9, "first_tenth"), "length must be an integer >= 10, got 9"),
        (lambda: AddingProblem(variant="thirds"), "variant must be one of 'anywhere', 'halves', "),
        (lambda: AddingProblem(low=1.0), "high must be a number > 1 and < inf, got 1.0"),
        (lambda: AddingProblem(low=float("-inf")), "low must be a number > -inf and < inf, got "),
        (lambda: CopyMemory(0), "delay must be an integer >= 1, got 0"),
        (lambda: CopyMemory(variant="x"), "variant must be one of 'fixed', 'variable', "),
        (lambda: CopyMemory(symbols=1), "symbols must be an integer >= 2, got 1"),
        (lambda: CopyMemory(copy_length=0), "copy_length must be an integer >= 1, got 0"),
        (lambda: TemporalOrder(9), "length must be an integer >= 10, got 9"),
        (lambda: TemporalOrder(symbols=4), "symbols must be an integer >= 2 and <= 3, got 4"),
        (lambda: FrequencyDiscrimination(0), "length must be an integer >= 1, got 0"),
        (
            lambda: FrequencyDiscrimination(sampling_period=0.0),
            "sampling_period must be a number > 0 and < inf, got 0.0",
        ),
    ],
)
def test_bad_arguments_say_what_is_allowed(make, message):
    with pytest.raises(ValueError, match="must") as raised:
        make()

    assert str(raised.value).startswith(message)


def test_one_hot_must_be_a_truth_value():
    with pytest.raises(TypeError, match="one_hot must be True or False, got 'yes'"):
        CopyMemory(one_hot="yes")
