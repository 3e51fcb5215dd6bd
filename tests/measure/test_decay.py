"""Rates of decay against closed forms, simulations and autograd through real networks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_gradguard.measure.decay import (
    Decay,
    bin_profile,
    float_floor,
    lag_decay,
    recency,
    transport_decay,
)
from lightning_gradguard.measure.student_t import student_t

FLOOR = 1e-30
SHAPES = st.tuples(st.integers(2, 40), st.integers(1, 12))


def entering_at(last_B: Tensor, timesteps: int) -> Tensor:
    entry_TB = torch.zeros(timesteps, len(last_B))
    entry_TB[last_B, torch.arange(len(last_B))] = torch.rand(len(last_B)) + 0.5
    return entry_TB


def decaying(last_B: Tensor, timesteps: int, factor: float) -> Tensor:
    """Norms that shrink by ``factor`` per step back from each sequence's own last step."""
    back_TB = last_B - torch.arange(timesteps).unsqueeze(1)
    loudness_B = torch.rand(len(last_B), dtype=torch.float64) + 0.5
    return torch.where(back_TB >= 0, factor ** back_TB.double() * loudness_B, 0.0)


def noisy(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of an uneven decay, the entry at the end, and the gains as arriving/transported."""
    generator = torch.Generator().manual_seed(seed)
    gain_TB = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2 - 0.3
    norms_TB = gain_TB.flip(0).cumsum(0).flip(0).exp()
    return norms_TB, entering_at(torch.full(shape[1:], shape[0] - 1), shape[0]), norms_TB


def both(norms_TB: Tensor, entry_TB: Tensor, floor: float = FLOOR) -> tuple[Decay, Decay]:
    return transport_decay(norms_TB[1:], norms_TB[:-1], floor), lag_decay(
        norms_TB, entry_TB, floor
    )[0]


@given(
    shape=SHAPES,
    factor=st.sampled_from([0.5, 0.8, 1.0, 1.2]),
    floor=st.sampled_from([0.0, FLOOR]),
)
def test_constant_gain_is_its_logarithm(
    shape: tuple[int, int], factor: float, floor: float
) -> None:
    last_B = torch.randint(1, shape[0], (shape[1],))
    last_B[0] = shape[0] - 1
    norms_TB = decaying(last_B, shape[0], factor)
    arriving_SB = torch.where(torch.arange(1, shape[0]).unsqueeze(1) <= last_B, norms_TB[1:], 0.0)
    transported_SB = torch.where(arriving_SB > 0, norms_TB[:-1], 0.0)
    exact = transport_decay(arriving_SB, transported_SB, floor)
    cheap, single = lag_decay(norms_TB, entering_at(last_B, shape[0]), floor)
    for decay in (exact, cheap):
        assert decay.rate.item() == pytest.approx(math.log(factor), abs=1e-12)
        assert int(decay.steps) == shape[0] - 1
        if shape[1] > 1:
            assert decay.error.item() == pytest.approx(0.0, abs=1e-12)
    assert bool(single)


@given(shape=SHAPES, seed=st.integers(0, 99), scale=st.sampled_from([1e-12, 7.0, 1e9]))
def test_scale_and_order_of_the_sequences_change_nothing(
    shape: tuple[int, int], seed: int, scale: float
) -> None:
    norms_TB, entry_TB, _ = noisy(shape, seed)
    order = torch.randperm(shape[1])
    for one, other in zip(
        both(norms_TB, entry_TB), both(scale * norms_TB[:, order], entry_TB[:, order]), strict=True
    ):
        assert one.rate.item() == pytest.approx(other.rate.item(), rel=1e-9, abs=1e-12)
        assert one.steps == other.steps


@given(shape=SHAPES, seed=st.integers(0, 99))
def test_reverse_is_the_same_in_a_mirror(shape: tuple[int, int], seed: int) -> None:
    norms_TB, entry_TB, _ = noisy(shape, seed)
    forward, _ = lag_decay(norms_TB, entry_TB, FLOOR)
    padded = torch.cat([norms_TB.flip(0), torch.zeros(3, shape[1])])
    entry = torch.cat([entry_TB.flip(0), torch.zeros(3, shape[1])])
    backward, single = lag_decay(padded, entry, FLOOR, reverse=True)
    assert bool(single)
    assert backward.rate.item() == pytest.approx(forward.rate.item(), rel=1e-12)
    assert backward.steps == forward.steps


def test_sequences_that_start_later_do_not_bend_the_slope() -> None:
    # The short ones are a thousand times louder: their end must not look like a drop.
    last_B = torch.tensor([39, 39, 9, 9])
    norms_TB = decaying(last_B, 40, 0.9) * torch.tensor([1.0, 1.0, 1e3, 1e3])
    arriving_SB = torch.where(torch.arange(1, 40).unsqueeze(1) <= last_B, norms_TB[1:], 0.0)
    transported_SB = torch.where(arriving_SB > 0, norms_TB[:-1], 0.0)
    cheap, _ = lag_decay(norms_TB, entering_at(last_B, 40), FLOOR)
    exact = transport_decay(arriving_SB, transported_SB, FLOOR)
    assert cheap.rate.item() == pytest.approx(math.log(0.9), abs=1e-12)
    assert exact.rate.item() == pytest.approx(math.log(0.9), abs=1e-12)


def test_reverse_takes_zeros_for_padding() -> None:
    lengths = torch.tensor([40, 10])
    time_TB = torch.arange(40).unsqueeze(1)
    norms_TB = torch.where(time_TB < lengths, 0.9**time_TB * torch.tensor([1.0, 1e3]), 0.0)
    decay, _ = lag_decay(norms_TB, entering_at(torch.zeros(2).long(), 40), FLOOR, reverse=True)
    assert decay.rate.item() == pytest.approx(math.log(0.9), abs=1e-6)


def test_one_odd_norm_at_the_far_end_hardly_matters() -> None:
    norms_TB = decaying(torch.full((4,), 39), 40, 0.8)
    norms_TB[0] *= 1e-3
    decay, _ = lag_decay(norms_TB, entering_at(torch.full((4,), 39), 40), FLOOR)
    # The mean of the differences would be off by ln 1000 / 39 = 0.18.
    assert decay.rate.item() == pytest.approx(math.log(0.8), abs=0.02)


@pytest.mark.parametrize("blocks", [2, 5, 8])
def test_confidence_interval_covers_the_true_rate(blocks: int) -> None:
    trials, sigma = 2000, 0.1
    gain = torch.randn(trials, 1, blocks, dtype=torch.float64) * sigma - 0.5
    # The pooled gain of many sequences: half the log of E exp(2 gain).
    truth = -0.5 + sigma**2
    arriving = torch.ones(1, blocks)
    covered = 0
    for trial in gain:
        decay = transport_decay(arriving, trial.exp(), FLOOR)
        covered += bool((decay.rate - truth).abs() <= decay.error)
    assert 0.93 <= covered / trials <= 0.97


def test_more_sequences_than_blocks_narrow_the_interval() -> None:
    gain = torch.randn(200, 50, 512, dtype=torch.float64) * 0.1 - 0.5
    decays = [transport_decay(torch.ones(50, 512), each.exp(), FLOOR) for each in gain]
    errors = torch.stack([decay.error for decay in decays])
    spread = torch.stack([decay.rate for decay in decays]).std()
    assert errors.mean().item() == pytest.approx(student_t(7) * spread.item(), rel=0.1)


@pytest.mark.parametrize("factor", [0.5, 0.2])
@pytest.mark.parametrize("sequences", [1, 6])
def test_points_at_the_float_floor_are_dropped(factor: float, sequences: int) -> None:
    start = torch.randn(sequences, 64)
    back = torch.arange(399, -1, -1, dtype=torch.float64).view(-1, 1, 1)
    true = start * factor**back
    entry_TB = entering_at(torch.full((sequences,), 399), 400)
    stored = true.to(torch.float32)
    assert (stored[0] == 0).all()  # underflowed, and subnormal on the way there
    scale = true.abs().amax(dim=2, keepdim=True)  # their squares underflow in float64 too
    norms_TB = (true / scale).norm(dim=2) * scale.squeeze(2)
    wide = both(norms_TB, entry_TB, float_floor(torch.float64, 64))
    narrow = both(stored.double().norm(dim=2), entry_TB, float_floor(torch.float32, 64))
    for one, other in zip(narrow, wide, strict=True):
        assert one.rate.item() == pytest.approx(other.rate.item(), rel=1e-4)
        assert 0 < int(one.steps) < int(other.steps)
    # Without the floor it is another slope: the test can fail.
    flat = both(stored.double().norm(dim=2).clamp(min=1e-40), entry_TB, 0.0)
    assert all(decay.rate.item() > 0.9 * math.log(factor) for decay in flat)


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (5, 0)])
def test_too_short_for_a_step(shape: tuple[int, int]) -> None:
    norms_TB = torch.ones(shape)
    exact, cheap = both(norms_TB, norms_TB)
    for decay in (exact, cheap):
        assert math.isnan(decay.rate.item())
        assert math.isnan(decay.error.item())
        assert int(decay.steps) == 0


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_nothing_but_zero_or_non_finite(value: float) -> None:
    norms_TB = torch.full((10, 4), value)
    for decay in both(norms_TB, entering_at(torch.full((4,), 9), 10)):
        assert math.isnan(decay.rate.item())
        assert int(decay.steps) == 0
    assert math.isnan(recency(norms_TB, torch.full((4,), 10)).item())


def test_non_finite_steps_are_left_out() -> None:
    norms_TB = decaying(torch.full((4,), 19), 20, 0.7)
    norms_TB[8, 2] = math.nan
    exact, cheap = both(norms_TB, entering_at(torch.full((4,), 19), 20))
    for decay, steps in ((exact, 17), (cheap, 10)):
        assert decay.rate.item() == pytest.approx(math.log(0.7), abs=1e-12)
        assert int(decay.steps) == steps


def test_one_sequence_has_a_rate_but_no_interval() -> None:
    norms_TB = decaying(torch.full((4,), 19), 20, 0.7)
    norms_TB[:, 1:] = 0.0  # a mask in the loss: the same as if they were not there
    for columns in (norms_TB, norms_TB[:, :1]):
        entry_TB = torch.zeros_like(columns)
        entry_TB[-1, 0] = 1.0
        for decay in both(columns, entry_TB):
            assert decay.rate.item() == pytest.approx(math.log(0.7), abs=1e-12)
            assert math.isnan(decay.error.item())


def test_loss_at_several_timesteps_has_no_lag() -> None:
    norms_TB, entry_TB, _ = noisy((20, 10), 0)
    entry_TB[3, 0] = 5.0
    decay, single = lag_decay(norms_TB, entry_TB, FLOOR)
    without, _ = lag_decay(norms_TB[:, 1:], entry_TB[:, 1:], FLOOR)
    assert bool(single)  # nine of ten are enough, and the tenth is left out
    assert decay.rate.item() == pytest.approx(without.rate.item(), rel=1e-12)
    entry_TB[4, 1] = math.nan
    for entered in (entry_TB, torch.ones(20, 10), torch.zeros(20, 10)):
        decay, single = lag_decay(norms_TB, entered, FLOOR)
        assert not bool(single)
        assert math.isnan(decay.rate.item())
        assert math.isnan(decay.error.item())
        assert int(decay.steps) == 0


def test_recency_of_ragged_sequences() -> None:
    norms_TB = torch.rand(37, 5)
    lengths = [37, 20, 11, 10, 1]
    squares = norms_TB.double().square()
    near = sum(squares[n - math.ceil(n / 10) : n, b].sum().item() for b, n in enumerate(lengths))
    first = sum(squares[: math.ceil(n / 10), b].sum().item() for b, n in enumerate(lengths))
    total = sum(squares[:n, b].sum().item() for b, n in enumerate(lengths))
    norms_TB[-1, 1:] = math.nan  # padding, whatever it holds
    lengths_B = torch.tensor(lengths)
    assert recency(norms_TB, lengths_B).item() == pytest.approx(near / total, rel=1e-12)
    backward = recency(norms_TB, lengths_B, reverse=True).item()
    assert backward == pytest.approx(first / total, rel=1e-12)
    assert recency(norms_TB * 1e-38, lengths_B).item() == pytest.approx(near / total, rel=1e-5)
    assert math.isnan(recency(torch.ones(0, 3), torch.zeros(3)).item())


@pytest.mark.parametrize("timesteps", [0, 1, 255, 256, 257, 1000, 100_000])
def test_bins_against_a_plain_loop(timesteps: int) -> None:
    norms_TB = torch.rand(timesteps, 3)
    lengths_B = torch.tensor([timesteps, timesteps // 2, 0])
    profile = bin_profile(norms_TB, lengths_B)
    assert profile.shape == (min(timesteps, 256),)
    alive_TB = torch.arange(timesteps).unsqueeze(1) < lengths_B
    square_T = (norms_TB.double().square() * alive_TB).sum(1) / alive_TB.sum(1)
    number = max(len(profile), 1)
    bin_T = torch.arange(timesteps) * number // max(timesteps, 1)
    sums = torch.zeros(number, dtype=torch.float64).index_add_(0, bin_T, square_T)
    counts = torch.bincount(bin_T, minlength=number)
    torch.testing.assert_close(profile, (sums / counts).sqrt()[: len(profile)])
    torch.testing.assert_close(bin_profile(norms_TB, alive_TB), profile, rtol=0, atol=0)


def test_profiles_of_tiny_and_missing_norms() -> None:
    tiny_TB = torch.full((1000, 4), 1e-200, dtype=torch.float64)
    assert bin_profile(tiny_TB, torch.full((4,), 1000)).tolist() == pytest.approx([1e-200] * 256)
    profile = bin_profile(tiny_TB, torch.full((4,), 500))
    assert profile.isnan().tolist() == [False] * 128 + [True] * 128
    tiny_TB[0, 0] = math.nan
    assert bin_profile(tiny_TB, torch.full((4,), 1000)).isnan().sum() == 1


@pytest.mark.parametrize(
    ("dtype", "floor"),
    [(torch.float16, 6.1e-5), (torch.bfloat16, 1.2e-35), (torch.float64, 2.2e-305)],
)
def test_float_floor(dtype: torch.dtype, floor: float) -> None:
    assert float_floor(dtype, 1) == pytest.approx(floor, rel=0.05)
    assert float_floor(dtype, 100) == pytest.approx(10 * float_floor(dtype, 1))


def test_float_floor_refuses_what_has_none() -> None:
    with pytest.raises(ValueError, match=r"dtype must be a floating dtype, got torch\.int64"):
        float_floor(torch.int64, 4)
    with pytest.raises(ValueError, match="width must be an integer >= 1, got 0"):
        float_floor(torch.float32, 0)


def unrolled_gains(module: nn.RNNBase, input_TBI: Tensor, ends: Tensor, weight: Tensor) -> Decay:
    """The exact rate from autograd through a loop of cells, loss at each sequence's end."""
    kind = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}[type(module)]
    options = {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
    cell = kind(module.input_size, module.hidden_size, **options)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in module.state_dict().items()})
    hidden = torch.zeros(input_TBI.shape[1], module.hidden_size, requires_grad=True)
    state: tuple[Tensor, ...] = (hidden, hidden) if kind is nn.LSTMCell else (hidden,)
    entering, leaving = [], []
    for step in input_TBI:
        # Separate nodes: what reaches a state from the future only.
        state = tuple(part * 1 for part in state)
        entering.append(state)
        following = cell(step, state if len(state) > 1 else state[0])
        state = following if len(state) > 1 else (following,)
        leaving.append(state)
    for part in (part for parts in (*entering, *leaving) for part in parts):
        part.retain_grad()
    outputs = torch.stack([parts[0] for parts in leaving])
    (outputs[ends, torch.arange(len(ends))] * weight).sum().backward()
    return gains(entering, leaving)


def gains(entering: list[tuple[Tensor, ...]], leaving: list[tuple[Tensor, ...]]) -> Decay:
    def norm(*parts: Tensor | None) -> Tensor:
        present = [part.double().square().sum(1) for part in parts if part is not None]
        return sum(present, torch.zeros(len(leaving[0][0]))).sqrt()

    arriving, transported = [], []
    for step in range(1, len(entering)):
        later = entering[step + 1][1:] if step + 1 < len(entering) else ()
        arriving.append(norm(leaving[step][0].grad, *(part.grad for part in later)))
        transported.append(norm(*(part.grad for part in entering[step])))
    floor = float_floor(torch.float32, leaving[0][0].shape[1])
    return transport_decay(torch.stack(arriving), torch.stack(transported), floor)


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize(
    ("timesteps", "inputs", "hidden"),
    [(120, 28, 110), (120, 1, 110), (50, 8, 32), (40, 16, 64), (200, 4, 20)],
)
@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.LSTM, {}), (nn.GRU, {}), (nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu"})],
    ids=["lstm", "gru", "tanh", "relu"],
)
def test_cheap_rate_is_near_the_exact_rate(
    kind: type[nn.RNNBase],
    options: dict[str, str],
    timesteps: int,
    inputs: int,
    hidden: int,
    ragged: bool,
) -> None:
    module = kind(inputs, hidden, **options)
    input_TBI = torch.randn(timesteps, 32, inputs)
    lengths = torch.full((32,), timesteps)
    if ragged:
        lengths[1:] = torch.randint(max(30, timesteps // 2), timesteps + 1, (31,))
    weight = torch.randn(32, hidden)
    exact = unrolled_gains(module, input_TBI, lengths - 1, weight)
    taken = input_TBI.clone().requires_grad_()
    packed = pack_padded_sequence(taken, lengths, enforce_sorted=False)
    last = module(packed)[1]
    last = last[0] if kind is nn.LSTM else last
    (last[0] * weight).sum().backward()
    entry_TB = entering_at(lengths - 1, timesteps)
    floor = float_floor(torch.float32, inputs)
    cheap, single = lag_decay(taken.grad.double().norm(dim=2), entry_TB, floor)
    assert bool(single)
    assert cheap.rate.item() == pytest.approx(exact.rate.item(), rel=0.05)
    if kind is nn.LSTM and hidden == 110 and inputs > 1 and not ragged:
        assert -0.50 < exact.rate.item() < -0.42


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_on_cuda_without_host_reads() -> None:
    norms_TB, entry_TB, _ = noisy((600, 20), 0)
    lengths_B = torch.full((20,), 600)
    here = [decay.rate for decay in both(norms_TB, entry_TB)]
    here += [recency(norms_TB, lengths_B), bin_profile(norms_TB, lengths_B)]
    norms, entry, lengths = (part.cuda() for part in (norms_TB, entry_TB, lengths_B))
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = [decay.rate for decay in both(norms, entry)]
        there += [recency(norms, lengths), bin_profile(norms, lengths)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other.cpu())
