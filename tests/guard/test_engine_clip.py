"""Clipping strategies inside the guard: what a plain loop does, resumed and recorded exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.overhead.counting import OperationCounter
from lightning_gradguard.guard import DEVICE_DELAY, GuardEngine
from lightning_gradguard.respond import (
    AGC,
    AdaptiveClip,
    NormClip,
    PercentileClip,
    SkipBadSteps,
    UpdateCap,
    ValueClip,
    ZScoreClip,
)
from tests.guard.loops import MAKERS, Loop
from tests.guard.test_engine_state import checkpoint
from tests.models import (
    Regression,
    adamw,
    assert_same_bits,
    fixed_cap,
    fused_adamw,
    fused_sgd,
    make_batches,
    sgd,
)

ALONE: dict[str, Any] = {"cap": None, "skip": None, "backoff": None, "rollback": None}
SCOPES = ("global", "group", "layer")
STRATEGIES: list[Any] = [
    *(AdaptiveClip(1.1, scope=scope) for scope in SCOPES),
    *(NormClip(0.5, scope=scope) for scope in SCOPES),
    *(PercentileClip(30.0, window=20, scope=scope) for scope in SCOPES),
    *(ZScoreClip(1.0, alpha=0.8, warmup_steps=6, scope=scope) for scope in SCOPES),
    *(AGC(0.05, scope=scope) for scope in (*SCOPES, "unit")),
    ValueClip(0.2),
]
BY_NAME = pytest.mark.parametrize(
    "clip", STRATEGIES, ids=lambda s: f"{type(s).__name__}-{getattr(s, 'scope', '')}"
)
OPTIMIZERS = pytest.mark.parametrize("make_optimizer", MAKERS.values(), ids=MAKERS)


def two_groups(maker: Any) -> Any:
    """The same optimizer with the biases in a group of their own."""

    def make(parameters: Any) -> Any:
        all_of_them = list(parameters)
        groups = ([p for p in all_of_them if p.dim() > 1], [p for p in all_of_them if p.dim() == 1])
        optimizer = maker(groups[0])
        optimizer.add_param_group({"params": groups[1]})
        return optimizer

    return make


def closed(loop: Loop) -> Loop:
    loop.guard.close()
    assert loop.guard.counts["steps"] == len(loop.guard.history)
    return loop


@OPTIMIZERS
@BY_NAME
def test_every_strategy_clips_some_steps_and_says_how_much(clip: Any, make_optimizer: Any) -> None:
    """The recorded coefficient is the norm that is left divided by that before."""
    loop = Loop(two_groups(make_optimizer), clip=clip, **ALONE)
    left: list[float] = []
    for batch in make_batches(60):
        loop.optimizer.zero_grad()
        loss = loop.model.loss(batch)
        loss.backward()
        loop.guard.before_step(loss)
        scale = float(getattr(loop.optimizer, "grad_scale", 1.0))
        left.append(math.hypot(*(p.grad.norm().item() for p in loop.model.parameters())) / scale)
        loop.optimizer.step()
    history = closed(loop).guard.history
    assert len(history) == 60, "the guard gave up"
    for row, norm in zip(history, left, strict=True):
        assert row.clip_coef * row.total_norm == pytest.approx(norm, rel=1e-5)
        assert norm <= row.clip_threshold * (1 + 1e-5)
    assert loop.guard.counts["clipped_steps"] > 0
    assert any(row.clip_coef < 0.99 for row in history)
    judged_beforehand = not isinstance(clip, (AGC, ValueClip))
    assert math.isfinite(history[-1].clip_threshold) == judged_beforehand


@pytest.mark.parametrize(("host", "device"), [(adamw, fused_adamw), (sgd, fused_sgd)])
@pytest.mark.parametrize(
    "clip", [c for c in STRATEGIES if isinstance(c, (NormClip, ValueClip, AGC))], ids=repr
)
def test_fused_optimizers_are_clipped_alike(clip: Any, host: Any, device: Any) -> None:
    """Of strategies that learn from norms, the device knows those of some steps ago only."""
    one, other = (
        closed(Loop(two_groups(maker), clip=clip, **ALONE).run(make_batches(40)))
        for maker in (host, device)
    )
    for name, weight in one.weights().items():
        torch.testing.assert_close(other.weights()[name], weight, rtol=1e-3, atol=1e-4)
    assert [row.clip_coef for row in other.guard.history] == pytest.approx(
        [row.clip_coef for row in one.guard.history], rel=1e-2
    )


@OPTIMIZERS
@BY_NAME
def test_a_clip_that_never_binds_changes_no_bit(clip: Any, make_optimizer: Any) -> None:
    loose: dict[type, dict[str, float]] = {
        NormClip: {"max_norm": 1e6},
        ValueClip: {"max_value": 1e6},
        AGC: {"clip_factor": 1e6},
        AdaptiveClip: {"multiple": 1e6},
        ZScoreClip: {"z": 1e6},
        PercentileClip: {"percentile": 100.0},
    }
    settings = type(clip)(**{**vars(clip), **loose[type(clip)]})
    batches = make_batches(30)
    if isinstance(clip, PercentileClip):
        batches = batches[:1]  # later norms may exceed the largest so far
    plain, guarded = (
        closed(Loop(make_optimizer, clip=c, **ALONE).run(batches)) for c in (None, settings)
    )
    assert_same_bits(guarded.model.state_dict(), plain.model.state_dict())
    assert_same_bits(guarded.optimizer.state_dict(), plain.optimizer.state_dict())
    assert {row.clip_coef for row in guarded.guard.history} == {1.0}


@pytest.mark.parametrize("make_optimizer", [sgd, fused_adamw])
@BY_NAME
@pytest.mark.parametrize("at", [3, 23])
def test_a_resumed_run_is_the_uninterrupted_one(clip: Any, make_optimizer: Any, at: int) -> None:
    data = make_batches(45, poisoned=(21, 22))
    data[18] = (data[18][0] * 100.0, data[18][1])
    arguments = {**ALONE, "skip": SkipBadSteps(), "cap": fixed_cap(0.02), "clip": clip}
    maker = two_groups(make_optimizer)
    whole = closed(Loop(maker, **arguments).run(data))
    first = Loop(maker, **arguments).run(data[:at])
    state = checkpoint(first)
    second = Loop(maker, **arguments)
    second.model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["optimizer"])
    second.guard.load_state_dict(state["guard"])
    second.run(data[at:]).guard.close()
    assert_same_bits(second.model.state_dict(), whole.model.state_dict())
    seen = first.guard.history + second.guard.history
    assert repr(seen) == repr(whole.guard.history)
    assert_same_bits(second.guard.state_dict(), whole.guard.state_dict())


@BY_NAME
def test_a_state_of_another_strategy_starts_afresh(clip: Any) -> None:
    for maker in (adamw, fused_adamw):
        state = checkpoint(Loop(maker, clip=clip, **ALONE).run(make_batches(20)))["guard"]
        for other in (*STRATEGIES[::4], None):
            second = Loop(maker, clip=other, **ALONE)
            second.guard.load_state_dict(state)
            second.run(make_batches(3)).guard.close()
            assert second.guard.history[-1].step == 22, f"the guard gave up with {other}"


@OPTIMIZERS
@BY_NAME
def test_poisoned_steps_are_dropped_and_enter_no_threshold(clip: Any, make_optimizer: Any) -> None:
    arguments = {**ALONE, "skip": SkipBadSteps(), "clip": clip}
    bad = (0, 9, 10, 31)
    data = make_batches(40)
    poisoned = make_batches(40, poisoned=bad)
    loop = closed(Loop(make_optimizer, **arguments).run(poisoned))
    assert [row.step for row in loop.guard.history if row.skipped] == list(bad)
    assert all(torch.isfinite(w).all() for w in loop.weights().values())
    if "fused" in make_optimizer.__name__:
        return
    without = closed(
        Loop(make_optimizer, **arguments).run([b for n, b in enumerate(data) if n not in bad])
    )
    kept = [row.clip_coef for row in loop.guard.history if not row.skipped]
    if isinstance(clip, AGC) and clip.scope != "unit":
        return  # weights are measured every 16 steps, dropped ones too
    assert kept == [row.clip_coef for row in without.guard.history]
    saved = [one.guard.state_dict()["pipeline"]["ladder"] for one in (loop, without)]
    assert saved[0].get("clip") == saved[1].get("clip")


@OPTIMIZERS
@BY_NAME
def test_groups_can_be_added(clip: Any, make_optimizer: Any) -> None:
    loop = Loop(two_groups(make_optimizer), **{**ALONE, "cap": fixed_cap(0.5), "clip": clip})
    extra = nn.Parameter(torch.ones(3))
    loop.model.register_parameter("extra", extra)
    original = loop.model.forward
    loop.model.forward = lambda inputs: original(inputs) + loop.model.extra.sum() * 0.01
    batches = make_batches(40)
    loop.run(batches[:20])
    loop.optimizer.add_param_group({"params": [extra]})
    loop.run(batches[20:])
    loop.guard.close()
    assert len(loop.guard.history) == 40, "the guard gave up"
    assert not torch.equal(extra, torch.ones(3))
    if isinstance(clip, PercentileClip) and clip.scope != "global":
        after = loop.guard.state_dict()["pipeline"]["ladder"]["clip"]
        assert after["members"].popitem() in {("group 2", 1), ("extra", 1)}
        assert [len(level["norms"]) for level in after["levels"]] == [20] * 3


@pytest.mark.parametrize("scope", ["group", "layer"])
def test_norms_of_steps_before_a_group_was_added_do_not_enter_the_new_segments(
    scope: Any,
) -> None:
    """On a fused optimizer they are read some steps later."""
    loop = Loop(fused_sgd, **{**ALONE, "clip": PercentileClip(50.0, scope=scope)})
    batches = make_batches(20)
    loop.run(batches[:10])
    loop.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    loop.run(batches[10:])
    assert loop.guard.active
    state = loop.guard.state_dict()["pipeline"]["ladder"]["clip"]
    loop.guard.close()
    entered = [len(level["norms"]) for level in state["levels"]]
    # The last two are still on their way, and two were when the group came.
    assert entered[:-1] == [20 - 2 * DEVICE_DELAY] * (len(entered) - 1)
    assert entered[-1] == 0, "it never has a gradient"


@OPTIMIZERS
@BY_NAME
def test_the_cap_holds_whatever_is_clipped(clip: Any, make_optimizer: Any) -> None:
    ratio = 0.005
    loop = Loop(make_optimizer, **{**ALONE, "clip": clip, "cap": fixed_cap(ratio)})
    for group in loop.optimizer.param_groups:
        group["lr"] *= 20
    for batch in make_batches(30):
        before = loop.weights()
        loop.step(batch)
        for name, weight in loop.weights().items():
            size = max(before[name].norm().item(), 1e-3 * math.sqrt(weight.numel()))
            moved = (weight - before[name]).norm().item()
            assert moved <= ratio * size * 1.03, name
    loop.guard.close()
    assert loop.guard.counts["capped_steps"] > 0


@pytest.mark.parametrize("fused", [False, True])
@BY_NAME
def test_under_a_gradient_scaler(clip: Any, fused: bool) -> None:
    """Of a fused optimizer the gradients are still scaled when they are clipped."""

    def train(scaled: bool) -> tuple[dict[str, torch.Tensor], GuardEngine]:
        model = Regression(sgd)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused and scaled)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        guard = GuardEngine(model, optimizer, clip=clip, **ALONE)
        for number, batch in enumerate(make_batches(40)):
            optimizer.zero_grad()
            loss = model.loss(batch) * (math.inf if scaled and number == 5 else 1.0)
            if number == 5 and not scaled:
                continue
            scaler.scale(loss).backward()
            if not fused and scaled:
                scaler.unscale_(optimizer)
            guard.before_step(loss, scaler=scaler if scaled else None)
            scaler.step(optimizer)
            scaler.update()
        guard.close()
        assert guard.counts["steps"] == (40 if scaled else 39), "the guard gave up"
        return {n: p.detach() for n, p in model.named_parameters()}, guard

    ours, guard = train(scaled=True)
    plain, _ = train(scaled=False)
    if not (isinstance(clip, AGC) and clip.scope != "unit"):  # when weights are measured differs
        for name, weight in plain.items():
            torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)
    assert guard.counts["clipped_steps"] > 0
    assert guard.counts["skipped_steps"] == 1


@pytest.mark.parametrize("clip", [None, *STRATEGIES], ids=repr)
@pytest.mark.parametrize(("make_optimizer", "most"), [(adamw, 1), (fused_adamw, 0)])
def test_host_reads_of_a_healthy_step(clip: Any, make_optimizer: Any, most: int) -> None:
    loop = Loop(make_optimizer, clip=clip, **ALONE)
    counter = OperationCounter()
    with counter.patched():  # all the time: copies that are on their way are no reads
        for number, batch in enumerate(make_batches(40)):
            loop.optimizer.zero_grad()
            loss = loop.model.loss(batch) * (1e-6 if number == 39 else 1.0)
            loss.backward()
            counter.take()
            with counter:
                loop.guard.before_step(loss)
            reads = counter.take().host_reads
            loop.optimizer.step()
    loop.guard.close()
    assert len(loop.guard.history) == 40, "the guard gave up"
    assert loop.guard.history[-1].clip_coef == 1.0
    assert reads == most


def test_patterns_that_match_nothing_are_told(caplog: pytest.LogCaptureFixture) -> None:
    Loop(clip=AGC(exclude=("head.*",)))
    assert not caplog.records
    Loop(clip=AGC(exclude=("classifier.*", "head.*")))
    assert "classifier" in caplog.text
    assert "head" not in caplog.text


def test_excluded_parameters_keep_their_gradient() -> None:
    for scope in (*SCOPES, "unit"):
        loop = Loop(sgd, **{**ALONE, "clip": AGC(1e-6, scope=scope, exclude=("head.*",))})
        before = loop.weights()
        loop.run(make_batches(10))
        moved = {n: (w - before[n]).norm() for n, w in loop.weights().items()}
        assert all(m > 1e-2 for n, m in moved.items() if n.startswith("head")), scope
        assert all(m < 1e-4 for n, m in moved.items() if n.startswith("body")), scope
        loop.guard.close()


def test_who_observes_asks_for_no_strategy() -> None:
    for clip in STRATEGIES:
        if clip != AdaptiveClip():
            with pytest.raises(ValueError, match="clip must be left out with mode='observe'"):
                Loop(mode="observe", clip=clip)


def test_the_default_cap_bears_every_strategy() -> None:
    for clip in STRATEGIES[2::3]:
        loop = closed(Loop(fused_sgd, clip=clip, cap=UpdateCap()).run(make_batches(80)))
        losses = [row.loss for row in loop.guard.history]
        assert sum(losses[-20:]) < sum(losses[:20]), clip
