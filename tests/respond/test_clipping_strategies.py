"""Gradients are clipped as the slow and obvious way clips them, on the host and on the device."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.respond import (
    AGC,
    AdaptiveClip,
    NormClip,
    PercentileClip,
    ValueClip,
    ZScoreClip,
)
from lightning_gradguard.respond.clip_coefficients import clip_coefficient, device_coefficients
from tests.measure.dispatch import OperationLog
from tests.respond.clip_twins import (
    SHAPES,
    Clipping,
    Subject,
    agc,
    assert_close,
    clip_norms,
    plan_of,
)

SCOPES = ("global", "group", "layer")
SIZES = st.lists(
    st.one_of(st.none(), st.floats(1e-4, 1e4)), min_size=len(SHAPES), max_size=len(SHAPES)
).filter(any)
WAYS = pytest.mark.parametrize("fused", [False, True], ids=["host", "device"])
# Beyond measuring the norms and what a global clip takes, however many tensors and layers.
MOST_CALLS = 45
# Thresholds that this many norms of 1, 2, 3 teach.
TAUGHT = [[1.0], [2.0], [3.0]] * 10
STRATEGIES: list[Any] = [
    *(cls(scope=scope) for cls in (AdaptiveClip, NormClip, PercentileClip) for scope in SCOPES),
    *(ZScoreClip(scope=scope) for scope in SCOPES),
    *(AGC(scope=scope) for scope in (*SCOPES, "unit")),
    ValueClip(0.1),
]
BY_NAME = pytest.mark.parametrize(
    "strategy", STRATEGIES, ids=lambda s: f"{type(s).__name__}-{getattr(s, 'scope', '')}"
)


def taught(strategy: Any, *, fused: bool) -> Clipping:
    clipping = Clipping(strategy, fused=fused)
    clipping(Subject(fused=fused))  # so that it knows its segments
    count = len(Subject().segments(getattr(strategy, "scope", "global")))
    return clipping.learn(*([norm] * count for (norm,) in TAUGHT))


@WAYS
@pytest.mark.parametrize("scope", SCOPES)
@given(sizes=SIZES, max_norm=st.floats(1e-3, 1e3), seed=st.integers(0, 5))
@settings(max_examples=40)
def test_a_fixed_norm_is_what_torch_clips_to(
    scope: Any, fused: bool, sizes: Any, max_norm: float, seed: int
) -> None:
    ours, theirs = (Subject(sizes, fused=fused, seed=seed) for _ in range(2))
    before = ours.total()
    coefficient = Clipping(NormClip(max_norm, scope=scope), fused=fused)(ours)
    clip_norms(theirs, scope, max_norm)
    assert_close(ours, theirs, tolerance=1e-6 + 1e-6 / max_norm)
    assert coefficient == pytest.approx(ours.total() / before, rel=1e-5)


@WAYS
@pytest.mark.parametrize("scope", ["unit", *SCOPES])
@pytest.mark.parametrize("exclude", [(), ("head.weight", "scale")], ids=["all", "some"])
@given(sizes=SIZES, factor=st.floats(1e-3, 1e3), seed=st.integers(0, 5))
@settings(max_examples=30)
def test_agc_is_what_a_loop_over_units_does(
    scope: Any, fused: bool, exclude: Any, sizes: Any, factor: float, seed: int
) -> None:
    ours, theirs = (Subject(sizes, fused=fused, seed=seed) for _ in range(2))
    before = ours.total()
    strategy = AGC(factor, eps=0.5, scope=scope, exclude=exclude)
    coefficient = Clipping(strategy, fused=fused)(ours)
    agc(theirs, scope, factor, 0.5, exclude)
    assert_close(ours, theirs)
    assert coefficient == pytest.approx(ours.total() / before, rel=1e-5)


@WAYS
@given(sizes=SIZES, max_value=st.floats(1e-3, 1e3), seed=st.integers(0, 5))
@settings(max_examples=40)
def test_a_value_is_what_torch_clips_to(
    fused: bool, sizes: Any, max_value: float, seed: int
) -> None:
    ours, theirs = (Subject(sizes, fused=fused, seed=seed) for _ in range(2))
    before = ours.total()
    coefficient = Clipping(ValueClip(max_value), fused=fused)(ours)
    nn.utils.clip_grad_value_(theirs.named.values(), max_value)
    assert_close(ours, theirs, tolerance=0.0)
    assert coefficient == pytest.approx(ours.total() / before, rel=1e-5)


@WAYS
@pytest.mark.parametrize("scope", SCOPES)
def test_learned_thresholds_clip_each_segment(scope: Any, fused: bool) -> None:
    """The median of the norms is 2, the 10th percentile 1, mean and deviation 2 and sqrt(2/3)."""
    for strategy, expected in (
        (AdaptiveClip(multiple=3.0, scope=scope), lambda norm: 6.0),
        (PercentileClip(10.0, scope=scope), lambda norm: 1.0),
        (ZScoreClip(z=1.0, warmup_steps=30, scope=scope), lambda norm: 2 + (2 / 3) / (norm - 2)),
    ):
        ours, theirs = (Subject((9.0, 20.0, 0.1, 50.0, 7.0), fused=fused) for _ in range(2))
        norms = [math.hypot(*(ours.norms()[n] for n in names)) for names in ours.segments(scope)]
        coefficient = taught(strategy, fused=fused)(ours)
        clip_norms(theirs, scope, [expected(norm) for norm in norms])
        assert_close(ours, theirs, tolerance=2e-6)
        assert 0.0 < coefficient < 1.0


@WAYS
@BY_NAME
def test_where_nothing_is_over_not_a_bit_changes(strategy: Any, fused: bool) -> None:
    clipping = taught(strategy, fused=fused)
    subject = Subject((1e-6,) * len(SHAPES), fused=fused, dtype=torch.float32)
    before = subject.gradients()
    assert clipping(subject) == 1.0
    for name, gradient in subject.gradients().items():
        assert torch.equal(gradient, before[name]), name


@BY_NAME
def test_on_the_host_nothing_is_then_multiplied(strategy: Any) -> None:
    clipping = taught(strategy, fused=False)
    subject = Subject((1e-6,) * len(SHAPES))
    with OperationLog() as log:
        assert clipping(subject) == 1.0
    assert log.count("_foreach_mul_") == log.count("clamp_m") == 0


@pytest.mark.parametrize("scope", ["group", "layer"])
def test_only_the_segment_that_is_over_is_multiplied(scope: Any) -> None:
    subject = Subject((100.0, 0.1, 0.1, 0.1, 0.1))
    before = subject.gradients()
    Clipping(NormClip(1.0, scope=scope))(subject)
    (multiplied, *_) = subject.segments(scope)
    for name, gradient in subject.gradients().items():
        assert torch.equal(gradient, before[name]) == (name not in multiplied), name


@WAYS
@BY_NAME
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_spoils_no_other(
    strategy: Any, fused: bool, value: float
) -> None:
    """Where no rung drops the step: 0 · Inf would be NaN."""
    clipping = taught(strategy, fused=fused)
    subject = Subject((1e3,) * len(SHAPES), fused=fused)
    subject.named["body.weight"].grad[1, 2] = value
    coefficient = clipping(subject)
    assert 0.0 < coefficient <= 1.0
    for name, gradient in subject.gradients().items():
        bad = (~gradient.isfinite()).sum()
        clamped = isinstance(strategy, ValueClip) and value == math.inf
        assert bad == (name == "body.weight" and not clamped), name


@WAYS
@BY_NAME
def test_a_dropped_step_is_dropped_whatever_the_strategy(strategy: Any, fused: bool) -> None:
    clipping = taught(strategy, fused=fused)
    subject = Subject((1e3,) * len(SHAPES), fused=fused)
    plan = replace(plan_of(clipping.thresholds), may_skip=True, skip_limit=10.0)
    assert clipping(subject, plan) == 0.0
    if not fused:
        assert all(gradient is None for gradient in subject.gradients().values())


@given(
    norm=st.floats(1e-3, 1e3),
    threshold=st.one_of(st.floats(1e-3, 1e3), st.just(math.inf)),
    share=st.one_of(st.floats(0.1, 1.0), st.just(-math.inf)),
)
def test_the_device_computes_what_the_host_does(
    norm: float, threshold: float, share: float
) -> None:
    center = share * threshold if threshold < math.inf else -math.inf
    expected = clip_coefficient(norm, threshold, center)
    pair = torch.tensor([norm, norm], dtype=torch.float64)
    one = device_coefficients(pair[0], threshold, center)
    two = device_coefficients(pair, torch.full_like(pair, threshold), torch.full_like(pair, center))
    assert one.item() == pytest.approx(expected, rel=1e-9)
    assert two.tolist() == pytest.approx([expected] * 2, rel=1e-9)


@WAYS
@BY_NAME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_another_dtype(strategy: Any, fused: bool, dtype: torch.dtype) -> None:
    ours, exact = (
        Subject((0.3, 9.0, 5.0, 0.1, 20.0), fused=fused, dtype=d) for d in (dtype, torch.float64)
    )
    coefficients = [taught(strategy, fused=fused)(subject) for subject in (ours, exact)]
    assert coefficients[0] == pytest.approx(coefficients[1], rel=0.02)
    assert all(p.grad.dtype is dtype for p in ours.named.values())


@BY_NAME
def test_complex_and_sparse_gradients(strategy: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = nn.Embedding(6, 3, sparse=True)
    waves = nn.Parameter(torch.randn(4, 2, generator=generator, dtype=torch.complex64))
    embedding(torch.tensor([1, 1, 4])).square().sum().backward()
    (waves.abs().square().sum() * 100).backward()
    subject = Subject()
    subject.optimizer.add_param_group({"params": [embedding.weight, waves]})
    subject.meter = type(subject.meter)(
        [*subject.named.items(), ("embedding.weight", embedding.weight), ("waves", waves)]
    )
    clipping = Clipping(strategy)
    before = waves.grad.abs().max().item()
    clipping(subject)
    if clipping.thresholds is not None:
        count = len(clipping.thresholds.bounds().thresholds)
        clipping.learn(*([0.1] * count for _ in range(30)))
    for _ in range(2):  # the second time the embedding is coalesced
        assert 0.0 < clipping(subject) <= 1.0
    assert embedding.weight.grad.is_sparse
    assert waves.grad.abs().max() < before
    if isinstance(strategy, ValueClip):
        assert embedding.weight.grad.coalesce().values().abs().max() <= 0.1
        assert torch.view_as_real(waves.grad).abs().max() <= 0.1


@pytest.mark.parametrize("scope", ["group", "layer"])
@WAYS
def test_calls_do_not_grow_with_the_number_of_tensors(scope: Any, fused: bool) -> None:
    def calls(layers: int) -> int:
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
        subject = Subject(fused=fused)
        subject.named = dict(model.named_parameters())
        for parameter in subject.named.values():
            parameter.grad = torch.ones_like(parameter)
        subject.optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
        subject.meter = type(subject.meter)(subject.named.items())
        clipping = Clipping(NormClip(0.1, scope=scope), fused=fused)
        with OperationLog() as measuring:
            subject.meter.measure()
        with OperationLog() as log:
            clipping(subject)
        # A fused kernel would divide.
        return sum("div_" not in name for name in log.names) - len(measuring.names)

    few, many = calls(10), calls(40)
    assert few == many
    assert many <= MOST_CALLS
