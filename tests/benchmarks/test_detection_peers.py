"""Every rule of the re-implemented peers fires beyond its documented default, and not within it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest

from benchmarks.detection.peers import all_peers
from benchmarks.detection.peers.autotrainer import AutoTrainer, largest_rise, oscillates
from benchmarks.detection.peers.bttackler import BTTackler
from benchmarks.detection.peers.deepchecker import TheDeepChecker
from benchmarks.detection.peers.deepdiagnosis import DeepDiagnosis
from benchmarks.detection.peers.pulsegrad import PulseGrad, depth_slope
from benchmarks.detection.peers.rules import Firing, RulePeer
from benchmarks.detection.peers.sagemaker import SageMakerDebugger
from benchmarks.detection.peers.simple import LossDidNotFall, NaNOnly
from benchmarks.detection.peers.spikes import KillLossSpike, OLMoSkipStep, SpikeDetection, ZClip
from benchmarks.detection.records import (
    ActivationFeatures,
    Alarm,
    Peer,
    StepFeatures,
    TensorFeatures,
)
from lightning_gradguard.diagnose import Pathology

STEPS = 600
# All that a rule looks at is ordinary here.
TENSOR = TensorFeatures(
    name="net.0.weight",
    mean_abs_grad=1e-3,
    median_abs_grad=1e-3,
    max_abs_grad=1e-2,
    grad_norm=0.1,
    zero_share=0.0,
    finite=True,
    weight_norm=1.0,
    mean_abs_weight=0.1,
    mean_abs_update=1e-4,
    is_weight=True,
)
LAST = replace(TENSOR, name="net.2.weight")
NO_GRADIENT = replace(
    TENSOR,
    name="net.1.weight",
    mean_abs_grad=math.nan,
    median_abs_grad=math.nan,
    max_abs_grad=math.nan,
    grad_norm=math.nan,
    zero_share=math.nan,
)
RELU = ActivationFeatures("act", "relu", 0.5, 0.0, 0.0, 0.0, 0.0, math.nan)
TANH = ActivationFeatures("act", "tanh", 0.5, 0.0, 0.0, 0.0, 0.0, 0.5)


def at(
    step: int,
    loss: float | None = None,
    tensors: Iterable[TensorFeatures] = (TENSOR, NO_GRADIENT, LAST),
    activations: Iterable[ActivationFeatures] = (RELU, TANH),
    accuracy: float | None = None,
    lr: float = 1e-3,
) -> StepFeatures:
    """One step; the loss falls by itself."""
    loss = math.exp(-step / 60) if loss is None else loss
    return StepFeatures(step, STEPS, loss, tuple(tensors), tuple(activations), accuracy, lr)


def watch(peer: Peer, steps: Iterable[StepFeatures]) -> list[Alarm]:
    alarms = [alarm for features in steps for alarm in peer.observe(features)]
    return alarms + peer.finish()


def named(peer: Peer, steps: Iterable[StepFeatures]) -> set[tuple[str, str]]:
    return {(alarm.cause, alarm.layer) for alarm in watch(peer, steps)}


def with_first(**changes: float) -> tuple[TensorFeatures, ...]:
    return replace(TENSOR, **changes), NO_GRADIENT, LAST


class Blinking(RulePeer):
    name = "blinking"

    def __init__(self, on: set[int], every: int = 1) -> None:
        super().__init__(every)
        self.on = on

    def check(self, features):
        return [Firing("rule", Pathology.EXPLODING)] if features.step in self.on else []


def test_a_rule_that_keeps_firing_is_one_alarm_and_counts_anew_after_sixteen_quiet_steps() -> None:
    assert [a.step for a in watch(Blinking({3, 4, 20, 36, 53}), map(at, range(60)))] == [3, 53]


def test_a_rule_that_is_checked_seldom_is_quiet_if_it_is_quiet_on_a_check() -> None:
    peer = Blinking({0, 100, 150, 300}, every=100)
    assert [a.step for a in watch(peer, map(at, range(400)))] == [0, 300]


def test_no_peer_has_anything_to_say_of_an_ordinary_run() -> None:
    for peer in all_peers(STEPS):
        accuracies = (min(0.1 + s / 500, 0.9) if s % 60 == 0 else None for s in range(STEPS))
        steps = (at(s, accuracy=a) for s, a in enumerate(accuracies))
        assert watch(peer, steps) == [], peer.name


def test_names_are_unique_and_every_alarm_names_a_pathology() -> None:
    peers = all_peers(STEPS)
    assert len({peer.name for peer in peers}) == len(peers)
    broken = [replace(TENSOR, finite=False, grad_norm=math.nan, mean_abs_grad=math.nan)]
    for peer in peers:
        for alarm in watch(peer, [at(s, math.nan, broken) for s in range(STEPS)]):
            assert Pathology(alarm.cause)


@pytest.mark.parametrize(
    "peer",
    [
        SageMakerDebugger(),
        AutoTrainer(STEPS, gate=True),
        TheDeepChecker(STEPS),
        DeepDiagnosis(),
        BTTackler(),
        PulseGrad(),
    ],
    ids=lambda peer: peer.name,
)
def test_a_gradient_that_is_not_finite_is_found_at_its_tensor(peer) -> None:
    broken = replace(TENSOR, finite=False, grad_norm=math.nan, mean_abs_grad=math.nan)
    steps = [at(s, tensors=[LAST, broken]) for s in range(61)]
    assert ("non_finite", TENSOR.name) in named(peer, steps)


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ({"mean_abs_grad": 0.9e-7}, {("vanishing_in_depth", TENSOR.name)}),
        ({"mean_abs_grad": 1.1e-7}, set()),
        ({"mean_abs_update": 1.01}, {("update_out_of_range", TENSOR.name)}),
        ({"mean_abs_update": 0.99}, set()),
        ({"mean_abs_update": 0.9e-9}, {("update_out_of_range", TENSOR.name)}),
        ({"mean_abs_update": math.nan}, set()),
    ],
)
def test_sagemaker_judges_tensors(first, expected) -> None:
    assert named(SageMakerDebugger(), [at(0, tensors=with_first(**first))]) == expected


def test_sagemaker_judges_activations() -> None:
    def found(activation: ActivationFeatures) -> set[tuple[str, str]]:
        return named(SageMakerDebugger(), [at(0, activations=[activation])])

    assert found(replace(RELU, units_inactive=0.51)) == {("dead_units", "act")}
    assert found(replace(RELU, units_inactive=0.5)) == set()
    assert found(replace(TANH, inputs_beyond_tanh_limit=0.51)) == {("saturated", "act")}
    assert found(replace(TANH, units_inactive=0.9)) == set()


def test_sagemaker_asks_for_any_decrease_of_the_loss_in_ten_steps() -> None:
    flat, falling = [1.0] * 25, [1.0 - 1e-6 * s for s in range(25)]
    assert [a.step for a in watch(SageMakerDebugger(), map(at, range(25), flat))] == [10]
    assert watch(SageMakerDebugger(), map(at, range(25), falling)) == []


def test_sagemaker_as_shipped_sees_every_500th_step() -> None:
    peer = SageMakerDebugger(every=500)
    tiny = with_first(mean_abs_grad=0.0)
    assert watch(peer, [at(s, tensors=tiny) for s in range(1, 500)]) == []
    assert [a.step for a in watch(peer, [at(500, tensors=tiny)])] == [500]


def test_a_recurrent_weight_vanishes_through_time() -> None:
    first = with_first(name="rnn.weight_hh_l0", mean_abs_grad=0.0)
    alarms = named(SageMakerDebugger(), [at(0, tensors=first)])
    assert alarms == {("vanishing_in_time", "rnn.weight_hh_l0")}


def _learning(accuracies: list[float], **features) -> list[StepFeatures]:
    """One check after the other."""
    return [at(60 * n, accuracy=a, **features) for n, a in enumerate(accuracies)]


STUCK = [0.1] * 6
LEARNS = [0.1, 0.4, 0.7, 0.8, 0.9, 0.9]
STEEP = with_first(grad_norm=0.9e-4)
STEEP = (*STEEP[:-1], replace(LAST, grad_norm=1.0))


def test_autotrainer_reports_gradients_only_where_the_accuracy_is_low_or_flat() -> None:
    expected = ("vanishing_in_depth", TENSOR.name)
    assert expected in named(AutoTrainer(STEPS, gate=True), _learning(STUCK, tensors=STEEP))
    assert named(AutoTrainer(STEPS, gate=True), _learning(LEARNS, tensors=STEEP)) == set()
    assert expected in named(AutoTrainer(STEPS, gate=False), _learning(LEARNS, tensors=STEEP))


def test_autotrainer_waits_for_three_tenths_of_the_budget() -> None:
    alarms = watch(AutoTrainer(STEPS, gate=True), _learning(STUCK, tensors=STEEP))
    assert [a.step for a in alarms] == [180]


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ((replace(TENSOR, grad_norm=7.1), LAST), {("exploding", TENSOR.name)}),
        ((replace(TENSOR, grad_norm=6.9), LAST), set()),
        ((replace(TENSOR, zero_share=0.7), replace(LAST, zero_share=0.71)), {("dead_units", "")}),
        ((replace(TENSOR, zero_share=0.7), replace(LAST, zero_share=0.69)), set()),
        # a small ratio alone is not enough: the first gradient has to be small as well
        ((replace(TENSOR, grad_norm=1.1e-4), replace(LAST, grad_norm=1.0)), set()),
    ],
)
def test_autotrainer_compares_the_first_layer_with_the_last(tensors, expected) -> None:
    assert named(AutoTrainer(STEPS, gate=False), [at(0, tensors=tensors)]) == expected


def test_autotrainer_finds_slow_and_oscillating_learning() -> None:
    peer = AutoTrainer(STEPS, gate=True)
    assert named(peer, _learning(STUCK)) == {("stagnating", "")}
    swings = [0.7, 0.8, 0.7, 0.8, 0.7, 0.8, 0.7]
    assert named(AutoTrainer(STEPS, gate=True), _learning(swings)) == {("oscillating", "")}
    assert largest_rise([0.1, 0.3, 0.2]) == pytest.approx(0.2)
    assert not oscillates([0.1, 0.2, 0.3, 0.4])


def test_autotrainer_takes_the_loss_where_there_is_no_accuracy() -> None:
    flat = [at(60 * n, 1.0, tensors=STEEP) for n in range(6)]
    falling = [at(60 * n, 0.9**n, tensors=STEEP) for n in range(6)]
    assert named(AutoTrainer(STEPS, gate=True), flat) == {("vanishing_in_depth", TENSOR.name)}
    assert named(AutoTrainer(STEPS, gate=True), falling) == set()
    assert named(AutoTrainer(STEPS, gate=True), [at(0, 1e3)]) == {("exploding", "")}


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ({"mean_abs_grad": 0.9e-6}, {("vanishing_in_depth", TENSOR.name)}),
        ({"mean_abs_grad": 1.1e-6}, set()),
        ({"mean_abs_grad": 1.1e6}, {("exploding", TENSOR.name)}),
        ({"mean_abs_update": 0.9e-5}, {("update_out_of_range", TENSOR.name)}),
        ({"mean_abs_update": 1.1e-2}, {("update_out_of_range", TENSOR.name)}),
        ({"mean_abs_update": 0.0}, {("update_out_of_range", TENSOR.name)}),
        ({"mean_abs_update": 0.9e-5, "is_weight": False}, set()),
    ],
)
def test_deepchecker_judges_tensors(first, expected) -> None:
    assert named(TheDeepChecker(STEPS), [at(0, tensors=with_first(**first))]) == expected


@pytest.mark.parametrize(
    ("factor", "cause"), [(0.5, "vanishing_in_depth"), (2.0, "exploding"), (0.6, None), (1.9, None)]
)
def test_deepchecker_wants_four_halvings_or_doublings_running(factor, cause) -> None:
    steps = [at(s, tensors=with_first(mean_abs_grad=1e-2 * factor**s)) for s in range(5)]
    assert watch(TheDeepChecker(STEPS), steps[:4]) == []
    assert named(TheDeepChecker(STEPS), steps) == ({(cause, TENSOR.name)} if cause else set())


def test_deepchecker_judges_activations_and_the_fall_of_the_loss() -> None:
    def found(activation: ActivationFeatures) -> set[tuple[str, str]]:
        return named(TheDeepChecker(STEPS), [at(0, activations=[activation])])

    assert found(replace(RELU, units_below_percentile=0.51)) == {("dead_units", "act")}
    assert found(replace(RELU, units_below_percentile=0.5)) == set()
    assert found(replace(TANH, saturation=0.86)) == {("saturated", "act")}
    assert found(replace(TANH, saturation=0.85)) == set()
    slow = [at(s, 0.96 ** (s // 60)) for s in range(120)]
    fast = [at(s, 0.94 ** (s // 60)) for s in range(120)]
    assert [a.step for a in watch(TheDeepChecker(STEPS), slow)] == [119]
    assert watch(TheDeepChecker(STEPS), fast) == []


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ({"mean_abs_grad": 0.9e-7}, {("vanishing_in_depth", TENSOR.name)}),
        ({"grad_norm": 0.9e-2}, {("update_out_of_range", TENSOR.name)}),
        ({"grad_norm": 1.1e-2}, set()),
        ({"grad_norm": 101.0}, {("update_out_of_range", TENSOR.name)}),
        ({"grad_norm": 101.0, "is_weight": False}, set()),
    ],
)
def test_deepdiagnosis_judges_tensors(first, expected) -> None:
    assert named(DeepDiagnosis(), [at(0, tensors=with_first(**first))]) == expected


def test_deepdiagnosis_judges_activations() -> None:
    def found(activation: ActivationFeatures) -> set[tuple[str, str]]:
        return named(DeepDiagnosis(), [at(0, activations=[activation])])

    assert found(replace(RELU, share_not_above_zero=0.7)) == {("dead_units", "act")}
    assert found(replace(RELU, share_not_above_zero=0.69)) == set()
    assert found(replace(TANH, inputs_beyond_5=0.51)) == {("saturated", "act")}
    assert found(replace(RELU, inputs_beyond_5=0.51)) == set()


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ({"median_abs_grad": 0.9e-5}, {("vanishing_in_depth", TENSOR.name)}),
        ({"median_abs_grad": 1.1e-5}, set()),
        ({"median_abs_grad": 1.1}, {("exploding", TENSOR.name)}),
        ({"median_abs_grad": 0.9}, set()),
        ({"zero_share": 0.51}, {("dead_units", TENSOR.name)}),
        ({"zero_share": 0.5}, set()),
    ],
)
def test_bttackler_judges_weights_alone_and_beside_the_next(first, expected) -> None:
    assert named(BTTackler(), [at(0, tensors=with_first(**first))]) == expected


def test_bttackler_compares_with_the_next_layer() -> None:
    tensors = replace(TENSOR, median_abs_grad=2e-5), replace(LAST, median_abs_grad=0.3)
    assert named(BTTackler(), [at(0, tensors=tensors)]) == {("vanishing_in_depth", TENSOR.name)}
    huge = (replace(TENSOR, median_abs_grad=1.1e4),)
    assert named(BTTackler(), [at(0, tensors=huge)]) == {("exploding", TENSOR.name)}


def _falling(slope: float) -> list[TensorFeatures]:
    """From the output back, the norm changes by a factor per layer."""
    return [
        replace(TENSOR, name=f"net.{n}.weight", grad_norm=math.exp(slope * (5 - n)))
        for n in range(6)
    ]


def test_pulsegrad_wants_twenty_steep_samples_running() -> None:
    assert depth_slope(_falling(-0.2)) == pytest.approx(-0.2)
    assert math.isnan(depth_slope(_falling(-0.2)[:2]))
    steep = [at(s, tensors=_falling(-0.16)) for s in range(20)]
    assert watch(PulseGrad(), steep[:19]) == []
    assert named(PulseGrad(), steep) == {("vanishing_in_depth", "net.0.weight")}
    assert watch(PulseGrad(), [at(s, tensors=_falling(-0.14)) for s in range(40)]) == []


def test_pulsegrad_compares_with_its_moving_average() -> None:
    usual = [at(s) for s in range(10)]
    peer = PulseGrad()
    assert watch(peer, usual) == []
    assert named(peer, [at(10, tensors=with_first(grad_norm=2.1))]) == {("exploding", TENSOR.name)}
    peer = PulseGrad()
    assert watch(peer, [*usual, at(10, tensors=with_first(grad_norm=1.9))]) == []


def test_pulsegrad_finds_dead_modules_and_updates_out_of_range() -> None:
    dead = [at(s, tensors=with_first(grad_norm=0.0)) for s in range(20)]
    assert named(PulseGrad(), dead) == {("dead_units", TENSOR.name)}
    assert watch(PulseGrad(), dead[:19]) == []
    for update, found in ((1.1e-3, True), (0.9e-3, False), (0.9e-6, True), (1.1e-6, False)):
        alarms = watch(PulseGrad(), [at(0, tensors=with_first(mean_abs_update=update))])
        assert bool(alarms) == found


def _noisy(step: int) -> float:
    return 1.0 + 0.1 * (-1) ** step


def test_olmo_waits_for_64_steps_and_then_for_six_sigmas() -> None:
    usual = [at(s, _noisy(s)) for s in range(64)]
    for loss, expected in (
        (1.7, [("loss_spike", "")]),
        (1.5, []),
        (math.nan, [("non_finite", "")]),
    ):
        assert sorted(named(OLMoSkipStep(), [*usual, at(64, loss)])) == expected
    early = [*usual[:63], at(63, 100.0)]
    assert watch(OLMoSkipStep(), early) == []
    jump = [*usual, at(64, 1.0, with_first(grad_norm=10.0))]
    assert named(OLMoSkipStep(), jump) == {("exploding", "")}


def test_olmo_calls_every_step_a_spike_while_a_nan_is_in_its_window() -> None:
    peer = OLMoSkipStep()
    steps = [at(s, math.nan if s == 70 else _noisy(s)) for s in range(220)]
    assert [s.step for s in steps if list(peer.check(s))] == list(range(70, 199))


def test_llm_foundry_wants_five_high_losses_running_in_a_full_window() -> None:
    def found(high: int, loss: float = 2.5) -> list[Alarm]:
        losses = [1.0] * 100 + [loss] * high + [1.0] * 20
        return watch(KillLossSpike(STEPS), map(at, range(len(losses)), losses))

    assert found(4) == []
    assert [(a.step, a.cause) for a in found(5)] == [(104, "loss_spike")]
    assert found(20, loss=1.9) == []
    high = watch(KillLossSpike(STEPS), map(at, range(100), [11.0] * 100))
    assert [(a.step, a.cause) for a in high] == [(99, "diverging")]
    assert watch(KillLossSpike(STEPS), map(at, range(99), [11.0] * 99)) == []


def test_lightning_compares_with_the_mean_of_ten() -> None:
    def found(*losses: float) -> set[tuple[str, str]]:
        return named(SpikeDetection(), map(at, range(len(losses)), losses))

    assert found(1.0, 1.0, 3.0) == {("loss_spike", "")}
    assert found(1.0, 1.0, 2.9) == set()
    assert found(1.0, math.inf) == {("non_finite", "")}
    # a value that is better than the last one is no spike
    assert found(-1.0, -1.0, -5.0) == set()


def test_a_spike_does_not_enter_lightnings_mean() -> None:
    losses = [1.0] * 10 + [100.0] * 20 + [1.0] * 20 + [3.1]
    assert [a.step for a in watch(SpikeDetection(), map(at, range(51), losses))] == [10, 50]


def _norms(*norms: float) -> list[StepFeatures]:
    return [at(s, tensors=[replace(TENSOR, grad_norm=norm)]) for s, norm in enumerate(norms)]


def test_zclip_fires_beyond_two_and_a_half_deviations_after_its_warm_up() -> None:
    usual = [_noisy(s) for s in range(26)]  # mean 1, deviation 0.1
    assert watch(ZClip(), _norms(*usual, 1.24)) == []
    assert [(a.step, a.cause) for a in watch(ZClip(), _norms(*usual, 1.27))] == [(26, "exploding")]
    assert watch(ZClip(), _norms(*usual[:24], 50.0)) == []


def test_zclip_is_blind_after_a_nan() -> None:
    steps = _norms(*[1.0, 1.1] * 15)
    broken = at(30, tensors=[replace(TENSOR, finite=False, grad_norm=math.nan)])
    later = [at(31 + s, tensors=[replace(TENSOR, grad_norm=1e6)]) for s in range(5)]
    assert watch(ZClip(), [*steps, broken, *later]) == []
    assert len(watch(ZClip(), [*steps, *later])) == 1


def test_nan_only_says_it_once() -> None:
    broken = [replace(TENSOR, finite=False), replace(LAST, finite=False)]
    alarms = watch(NaNOnly(), [at(0), at(1, math.inf, broken), at(2, math.nan, broken)])
    assert alarms == [Alarm(1, "non_finite")]


def test_the_loss_has_to_fall_between_the_first_and_the_last_tenth() -> None:
    flat, falling = [1.0] * 100, [1.0 - 1e-3 * s for s in range(100)]
    assert watch(LossDidNotFall(), map(at, range(100), flat)) == [Alarm(100, "stagnating")]
    assert watch(LossDidNotFall(), map(at, range(100), falling)) == []
    lost = [*falling[:95], *[math.nan] * 5]
    assert watch(LossDidNotFall(), map(at, range(100), lost)) == [Alarm(100, "stagnating")]
