"""Boosts of layers that get too little: when, how much, and what they do to an update."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.diagnose import Finding, Pathology, Severity
from lightning_gradguard.readings import Inspection, ParameterReading
from lightning_gradguard.respond import ActionKind, LayerBoost, vanishing_response
from lightning_gradguard.respond.boost_enforcement import UpdateEnlarger
from lightning_gradguard.respond.layer_boost import LayerBoostState, lacking
from lightning_gradguard.respond.vanishing_response import VanishingResponse
from tests.respond.optimizers import SignMomentum

TROUBLE = (
    Pathology.NON_FINITE,
    Pathology.EXPLODING,
    Pathology.DIVERGING,
    Pathology.LOSS_SPIKE,
)


def finding(
    pathology: Pathology = Pathology.VANISHING_IN_DEPTH,
    severity: Severity = Severity.WARNING,
    **rest: Any,
) -> Finding:
    return Finding(pathology, severity, "0", 0, {}, "words", **rest)


def look(ratios: dict[str, float], step: int = 0) -> Inspection:
    readings = [
        ParameterReading(name, dims=1 if name.endswith("bias") else 2, update_ratio=ratio)
        for name, ratio in ratios.items()
    ]
    return Inspection(step, tuple(readings))


STARVED = look(
    {"0.weight": 1e-6, "0.bias": 3e-3, "1.weight": 5e-4, "2.weight": 1e-3, "3.weight": 1}
)


def follow(state: LayerBoostState, steps: Sequence[tuple[list[Finding], Inspection | None]]) -> Any:
    return [state.observe(n, *step) for n, step in enumerate(steps, start=1)]


@pytest.mark.parametrize("name", ["max_boost", "max_change"])
@pytest.mark.parametrize("value", [1.0, -2.0, math.inf, math.nan])
def test_bounds_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number > 1"):
        LayerBoost(**{name: value})


def test_a_layer_lacks_what_separates_it_from_the_median_and_its_bias_follows() -> None:
    assert lacking(STARVED, {}, 4.0) == pytest.approx(
        {"0.weight": 4.0, "0.bias": 4.0, "1.weight": 1.5, "2.weight": 1.0, "3.weight": 1.0}
    )


def test_boosts_in_force_are_not_taken_for_the_layers_own() -> None:
    seen = look({"0.weight": 5e-4, "1.weight": 1e-3, "2.weight": 1e-3})
    assert lacking(seen, {"0.weight": 2.0}, 8.0)["0.weight"] == pytest.approx(4.0)


def test_nothing_lacks_where_nothing_moves_or_nothing_is_known() -> None:
    assert lacking(look({"a.weight": 0.0, "b.weight": 0.0}), {}, 4.0) == {}
    assert lacking(look({"a.weight": math.nan}), {}, 4.0) == {}
    assert lacking(Inspection(0), {}, 4.0) == {}
    assert lacking(look({"a.weight": 0.0, "b.weight": 1.0, "c.weight": 1.0}), {}, 4.0) == {
        "a.weight": 4.0,
        "b.weight": 1.0,
        "c.weight": 1.0,
    }


def test_boosts_grow_while_the_finding_is_open_and_fade_once_it_has_healed() -> None:
    state = LayerBoostState(LayerBoost(max_boost=3.0))
    seen = []
    for findings in [[finding()]] * 4 + [[]] * 4:
        state.observe(len(seen), findings, STARVED)
        seen.append(round(state.boosts.get("0.weight", 1.0), 4))
    assert seen == [1.5, 2.25, 3.0, 3.0, 2.0, 1.3333, 1.0, 1.0]
    assert state.boosts == {}


def test_one_sentence_when_boosts_begin_grow_and_end() -> None:
    state = LayerBoostState(LayerBoost())
    steps = [([finding()], STARVED)] * 6 + [([], STARVED)] * 6
    actions = [action for told in follow(state, steps) for action in told]
    assert {action.kind for action in actions} == {ActionKind.BOOST}
    assert [round(a.numbers["largest_boost"], 2) for a in actions] == [1.5, 2.25, 3.38, 1.0]
    assert "'0.weight' 1.5 times, because the gradient vanishes through depth" in actions[0].message
    assert "no longer vanishes" in actions[-1].message


def test_a_symptom_that_does_no_harm_and_other_findings_boost_nothing() -> None:
    state = LayerBoostState(LayerBoost())
    for one in (finding(severity=Severity.INFO), finding(Pathology.STAGNATING)):
        assert state.observe(1, [one], STARVED) == []
        assert state.boosts == {}


@pytest.mark.parametrize("pathology", TROUBLE)
def test_trouble_takes_all_boosts_back_at_once_and_forbids_new_ones(pathology: Pathology) -> None:
    state = LayerBoostState(LayerBoost())
    follow(state, [([finding()], STARVED)] * 3)
    assert state.boosts
    both = [finding(), finding(pathology)]
    (action,) = state.observe(4, both, None)  # also without a look at the layers
    assert state.boosts == {}
    assert "Updates of no layer are enlarged any more, because the run" in action.message
    assert state.observe(5, both, STARVED) == []
    assert state.boosts == {}
    state.observe(6, [finding()], STARVED)
    assert max(state.boosts.values()) == 1.5


def test_trouble_that_does_no_harm_takes_nothing_back() -> None:
    state = LayerBoostState(LayerBoost())
    state.observe(1, [finding()], STARVED)
    state.observe(2, [finding(), finding(Pathology.LOSS_SPIKE, Severity.INFO)], None)
    assert state.boosts


def test_what_only_one_process_sees_is_no_trouble_where_there_are_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = [finding(local=True), finding(Pathology.EXPLODING, local=True)]
    for processes, boosted in ((1, False), (2, True)):
        monkeypatch.setattr(vanishing_response, "_processes", lambda n=processes: n)
        response = VanishingResponse(torch.nn.Linear(2, 2), None, LayerBoost())
        assert bool(response.observe(1, local, STARVED)) == boosted
    response.follow(["0.weight"], [torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(RuntimeError, match="can no longer be looked at"):
        response.before_step(inspecting=False)


ratios = st.floats(0.0, 1.0) | st.just(math.nan)
looks = st.lists(
    st.tuples(st.lists(ratios, min_size=4, max_size=4), st.booleans(), st.booleans()), max_size=12
)


@given(looks, st.floats(1.01, 10.0), st.floats(1.01, 3.0))
def test_boosts_stay_in_bounds_and_change_by_steps(
    sequence: list[tuple[list[float], bool, bool]], max_boost: float, max_change: float
) -> None:
    state = LayerBoostState(LayerBoost(max_boost=max_boost, max_change=max_change))
    for n, (values, wanted, trouble) in enumerate(sequence):
        before = dict(state.boosts)
        found = [finding()] * wanted + [finding(Pathology.DIVERGING)] * trouble
        state.observe(n, found, look({f"{i}.weight": v for i, v in enumerate(values)}, n))
        assert not (trouble and state.boosts)
        for name in {*before, *state.boosts}:
            old, new = before.get(name, 1.0), state.boosts.get(name, 1.0)
            assert 1.0 <= new <= max_boost
            assert trouble or new <= old * max_change * (1 + 1e-9)
            # A boost below 1.01 is over.
            assert trouble or new >= min(old / max_change, 1.01) / 1.01


@given(looks, st.integers(0, 12))
def test_a_resumed_state_goes_on_as_the_uninterrupted_one(
    sequence: list[tuple[list[float], bool, bool]], at: int
) -> None:
    whole, state = LayerBoostState(LayerBoost()), LayerBoostState(LayerBoost())
    for n, (values, wanted, trouble) in enumerate(sequence):
        if n == at:
            saved = json.loads(json.dumps(state.state_dict()))
            state = LayerBoostState(LayerBoost())
            state.load_state_dict(saved)
        found = [finding()] * wanted + [finding(Pathology.DIVERGING)] * trouble
        # As from a device: two steps late.
        seen = look({f"{i}.weight": v for i, v in enumerate(values)}, n - 2)
        assert whole.observe(n, found, seen) == state.observe(n, found, seen)
        assert whole.boosts == state.boosts
    assert whole.state_dict() == state.state_dict()


def test_a_late_inspection_is_judged_by_the_boosts_of_its_step() -> None:
    state = LayerBoostState(LayerBoost(max_boost=8.0))
    ratios = {"0.weight": 5e-4, "1.weight": 1e-3, "2.weight": 1e-3}
    state.observe(5, [finding()], look(ratios, 2))  # lacks 2
    state.observe(6, [finding()], look(ratios, 3))  # still without a boost: lacks 2
    assert state.boosts == {"0.weight": 2.0}


OPTIMIZERS = [
    lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9),
    lambda ps: torch.optim.AdamW(ps, lr=1e-3),
    lambda ps: torch.optim.AdamW(ps, lr=1e-3, fused=True),
    lambda ps: SignMomentum(ps, lr=1e-3),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_the_update_of_any_optimizer_is_enlarged_by_the_factor(make: Any) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(6, 5).requires_grad_() for _ in range(3)]
    optimizer, enlarger = make(weights), UpdateEnlarger(weights)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(6, 5)
        before = [w.detach().clone() for w in weights]
        enlarger.begin({0: 3.0, 2: 1.5})
        optimizer.step()
        after = [w.detach().clone() for w in weights]
        enlarger.enlarge(max_ratio=1e9)
        for weight, old, new, factor in zip(weights, before, after, (3.0, 1, 1.5), strict=True):
            torch.testing.assert_close(
                weight.detach() - old, factor * (new - old), atol=1e-6, rtol=1e-3
            )
    assert torch.equal(weights[1].detach(), after[1])


@given(st.floats(1.0, 8.0), st.floats(1e-4, 1.0), st.floats(1e-6, 1.0))
def test_no_update_is_enlarged_beyond_the_cap_or_made_smaller(
    factor: float, max_ratio: float, size: float
) -> None:
    weight = torch.ones(50, dtype=torch.float64)
    enlarger = UpdateEnlarger([weight])
    enlarger.begin({0: factor})
    weight.mul_(1.0 - size)
    enlarger.enlarge(max_ratio)
    moved = (1.0 - weight).norm().item() / math.sqrt(50)
    assert moved == pytest.approx(max(size, min(factor * size, max_ratio)), rel=1e-5)


def test_a_step_that_moves_nothing_stays_one() -> None:
    weight = torch.randn(7)
    before = weight.clone()
    enlarger = UpdateEnlarger([weight])
    enlarger.begin({0: 4.0})
    enlarger.enlarge(0.1)
    assert torch.equal(weight, before)


def test_without_a_boost_no_copy_is_held() -> None:
    weights = [torch.randn(7), torch.randn(3)]
    enlarger = UpdateEnlarger(weights)
    enlarger.begin({})
    assert not enlarger._copies
    enlarger.begin({0: 2.0})
    assert len(enlarger._copies) == 1
    enlarger.begin({})
    assert not enlarger._copies
    before = [w.clone() for w in weights]
    enlarger.enlarge(0.1)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
