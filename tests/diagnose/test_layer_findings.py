"""Whole runs of inspections: what stays silent, and what is found when."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_gradguard.diagnose import Finding, Pathology, Severity, Thresholds
from lightning_gradguard.readings import Inspection, ModelFacts, ParameterReading
from tests.diagnose.layer_runs import (
    Loss,
    bias,
    diagnose,
    layer,
    learning,
    looking,
    network,
    relu,
    run,
    spoiled,
    stuck,
    tanh,
    weight,
)

NAN = math.nan
INFO, WARNING = Severity.INFO, Severity.WARNING
FP16 = ModelFacts(precision="16-mixed")
CUT: dict[str, Any] = {"grad_norm": NAN, "zero_share": NAN, "tiny_share": NAN, "dead_rows": NAN}


def found(look: Any, loss: Loss, n: int = 400, **options: Any) -> list[Finding]:
    findings: list[Finding] = diagnose(run(look, loss, n, **options))
    return findings


def said(findings: list[Finding]) -> list[tuple[str, Severity, str, int]]:
    return [(f.pathology.value, f.severity, f.where, f.step) for f in findings]


# ---- layer not training: facts ------------------------------------------------------------------

FACTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "in no optimizer": ({"in_optimizer": False, "update_ratio": NAN}, 1, "no optimizer"),
    "detached": ({**CUT, "update_ratio": 0.0}, 2, "cuts the way back"),
    "detached, no update": ({**CUT, "update_ratio": NAN}, 2, "cuts the way back"),
    "only without gradients": ({**CUT, "used": False, "used_without_grad": True}, 2, "turned off"),
    "learning rate 0": ({"update_ratio": 0.0, "lr": 0.0}, 50, "learning rate of exactly 0"),
    "lost in rounding": ({"update_ratio": 0.0}, 50, "lost in rounding"),
}


AMBIGUOUS = ("detached", "detached, no update", "only without gradients")


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_output_that_the_loss_does_without_is_no_fault(name: str) -> None:
    """As a pooler, an auxiliary head or a teacher: what comes before it is trained."""
    look = looking(network({2: FACTS[name][0]}))
    for loss, severity in ((learning, INFO), (lambda _: None, INFO), (stuck(), WARNING)):
        assert max(f.severity for f in found(look, loss)) is severity


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("loss", [stuck(), learning, lambda _: None], ids=["stuck", "good", "no"])
def test_a_fact_needs_no_loss(name: str, loss: Loss) -> None:
    odd, step, words = FACTS[name]
    # What cuts a module off cuts off all before it.
    places = (0, 1, 2) if name in AMBIGUOUS else (2,)
    (finding,) = found(looking(network(dict.fromkeys(places, odd))), loss)
    assert said([finding]) == [("layer_not_training", WARNING, f"net.{places[0]}", step)]
    assert finding.fact
    assert finding.certainty == "certain"
    assert finding.since == 0
    assert words in finding.message


def test_modules_with_one_reason_make_one_finding_at_the_first() -> None:
    odd = dict.fromkeys((0, 1, 2), FACTS["detached"][0])
    (finding,) = found(looking(network(odd)), learning)
    assert finding.where == "net.0"
    assert finding.evidence["modules"] == 3
    assert "`net.0` and 2 more modules run but get" in finding.message


def test_two_reasons_are_two_findings() -> None:
    odd = {1: FACTS["detached"][0], 4: FACTS["learning rate 0"][0]}
    assert [f.where for f in found(looking(network(odd)), learning)] == ["net.1", "net.4"]


def test_updates_that_are_lost_as_the_gradient_vanished_are_no_matter_of_precision() -> None:
    look = looking(network({0: {"grad_norm": 1e-12, "update_ratio": 0.0}}))
    assert found(look, learning) == []


def test_all_updates_lost_in_rounding_are_a_fact_of_the_whole_model() -> None:
    (finding,) = found(looking(network(update_ratio=0.0)), learning)
    assert (finding.severity, finding.evidence["modules"]) == (WARNING, 6)


def test_a_layer_that_is_cut_off_later_is_found() -> None:
    odd = network({2: FACTS["detached"][0]})
    (finding,) = found(lambda s: odd if s >= 150 else network(), learning)
    assert (finding.where, finding.since, finding.step) == ("net.2", 150, 250)


@pytest.mark.parametrize("first", [0, 1])
def test_two_optimizers_that_take_turns_are_in_good_order(first: int) -> None:
    """After steps 0, 1 and 2, all inspections are at even steps: one of two never has its turn."""
    waits = {**CUT, "update_ratio": NAN}
    one = network(dict.fromkeys(range(3), waits))
    two = network(dict.fromkeys(range(3, 6), waits))
    assert found(lambda s: one if s % 2 == first else two, learning) == []


NOT_EVEN_NOTED: dict[str, dict[str, Any]] = {
    "a teacher without gradients": {**CUT, "in_optimizer": False, "used_without_grad": True},
    "a target network": {**CUT, "in_optimizer": False, "used": True},
    "of another optimizer": {**CUT, "update_ratio": NAN, "lr": NAN, "used": None},
    "an embedding with few rows in use": {"update_ratio": 0.0, "zero_share": 0.98},
    "an update that was not measured": {"update_ratio": NAN},
}


@pytest.mark.parametrize("name", NOT_EVEN_NOTED)
def test_layers_that_are_left_alone_on_purpose(name: str) -> None:
    assert found(looking(network({2: NOT_EVEN_NOTED[name]})), stuck()) == []


def test_a_learning_rate_of_zero_for_all_is_a_schedule() -> None:
    assert found(looking(network(update_ratio=0.0, lr=0.0)), learning) == []


def test_a_warm_up_from_zero_is_not_a_fact() -> None:
    still, moving = network({1: {"update_ratio": 0.0, "lr": 0.0}}), network()
    assert found(lambda s: moving if s else still, learning) == []


JUST_INFO: dict[str, list[ParameterReading]] = {
    "frozen": network({i: {**CUT, "requires_grad": False} for i in (1, 2)}),
    "frozen outside the optimizer": network(
        {1: {**CUT, "requires_grad": False, "in_optimizer": False}}
    ),
    "a head that never ran": [*network(), *layer("head", **CUT, used=False)],
    "not known to have run": [*network(), *layer("head", **CUT, used=None)],
    "a bias without gradient": [*network(), weight("a.weight"), bias("a.bias", **CUT)],
    "a token that is not used": [*network(), weight("net.token", **CUT)],
    "scales in bf16": [*network(), bias("norm.weight", update_ratio=0.0)],
}


@pytest.mark.parametrize("name", JUST_INFO)
def test_what_may_be_meant_is_noted_once(name: str) -> None:
    findings = found(looking(JUST_INFO[name]), stuck(), 1000)
    assert [(f.pathology, f.severity) for f in findings] == [(Pathology.LAYER_NOT_TRAINING, INFO)]
    assert not findings[0].fact
    assert "harmless" in findings[0].message


def test_frozen_layers_are_told_at_their_common_path() -> None:
    (finding,) = found(looking(JUST_INFO["frozen"]), learning)
    assert (finding.where, finding.evidence["modules"]) == ("net", 2)
    mixed = network({0: {"requires_grad": False}}) + layer("head", requires_grad=False)
    assert [f.where for f in found(looking(mixed), learning)] == ["model"]


def test_a_large_frozen_model_does_not_hide_what_is_wrong_elsewhere() -> None:
    frozen = network({}, 1000, requires_grad=False, **CUT)
    look = looking([*frozen, *layer("adapter", **CUT)])
    assert {f.where for f in found(look, learning, 51)} == {"net", "adapter"}


# ---- layer not training: a gradient of exactly zero ---------------------------------------------

ZERO = {"grad_norm": 0.0, "zero_share": 1.0, "update_ratio": 0.0}


def test_a_gradient_of_zero_is_judged_by_the_loss() -> None:
    look = looking(network({1: ZERO}))
    assert said(found(look, stuck())) == [("layer_not_training", WARNING, "net.1", 200)]
    assert said(found(look, learning)) == [("layer_not_training", INFO, "net.1", 200)]
    assert not found(look, stuck())[0].fact


def test_a_zero_initialized_branch_needs_some_steps() -> None:
    assert found(lambda s: network({1: ZERO}) if s < 150 else network(), stuck()) == []


def test_a_model_without_any_gradient_is_not_about_single_layers() -> None:
    assert found(looking(network(grad_norm=0.0, update_ratio=0.0)), stuck()) == []


# ---- vanishing in depth -------------------------------------------------------------------------

STEEP: dict[str, Any] = {"depth_slope": -1.6, "depth_error": 0.1, "depth_layers": 6}


def fading(rate: float, layers: int = 6) -> list[ParameterReading]:
    last = layers - 1
    return network(
        {i: {"grad_norm": 0.1 * math.exp(rate * (last - i))} for i in range(layers)}, layers
    )


def test_vanishing_in_depth_beside_a_stuck_loss_is_a_warning() -> None:
    (finding,) = found(looking(fading(-1.6), **STEEP), stuck())
    assert said([finding]) == [("vanishing_in_depth", WARNING, "net.0", 50)]
    assert finding.evidence["attenuation"] == pytest.approx(1.5 * 5)
    assert finding.evidence["first_to_last"] == pytest.approx(math.exp(-1.6 * 5))
    assert "no better than early" in finding.message
    assert not finding.fact


def test_beside_a_falling_loss_it_is_noted_and_a_warning_once_the_loss_is_spoiled() -> None:
    look = looking(fading(-1.6), **STEEP)
    assert [f.severity for f in found(look, learning)] == [INFO]
    findings = found(look, spoiled, 500)
    assert [f.severity for f in findings] == [INFO, WARNING]
    assert "getting worse" in findings[1].message


@pytest.mark.parametrize("loss", [None, NAN, math.inf], ids=["unknown", "NaN", "Inf"])
def test_without_a_loss_nothing_but_a_fact_is_above_info(loss: float | None) -> None:
    look = looking(fading(-1.6), **STEEP)
    assert [f.severity for f in found(look, lambda _: loss)] == [INFO]


def test_early_in_a_long_run_a_flat_loss_is_no_evidence() -> None:
    """A warm-up of a few thousand steps is flat by design."""
    look = looking(fading(-1.6), **STEEP)
    findings = found(look, stuck(), 1000, model=ModelFacts(planned_steps=20_000))
    assert [(f.severity, f.step) for f in findings] == [(INFO, 50), (WARNING, 500)]


@pytest.mark.parametrize(
    "depth",
    [
        {**STEEP, "depth_error": 0.3},
        {**STEEP, "depth_slope": 1.6},
        {**STEEP, "depth_layers": 3},
        {**STEEP, "depth_error": NAN},
        {},
    ],
    ids=["within its error", "growing", "too few layers", "unknown error", "unknown"],
)
def test_slopes_that_prove_nothing(depth: dict[str, Any]) -> None:
    assert found(looking(fading(-1.0), **depth), stuck()) == []


def test_vanishing_that_recovers_by_itself_is_not_even_noted() -> None:
    def look(step: int) -> Inspection:
        slope = -2.4 * math.exp(-step / 200)
        return Inspection(step, tuple(fading(slope)), (), slope, 0.02, 6)

    assert found(look, stuck(), 300) == []


def test_layers_in_the_middle_that_get_next_to_nothing_are_found() -> None:
    """No straight line shows it: the first layers get their gradient through a skip connection."""
    odd = {i: {"grad_norm": 1e-6} for i in (3, 4, 5)}
    (finding,) = found(looking(network(odd, 12)), stuck())
    assert said([finding]) == [("vanishing_in_depth", WARNING, "net.3", 50)]


def test_gradients_that_end_at_exactly_zero_have_vanished() -> None:
    odd = {i: {"grad_norm": 0.0} for i in range(5)}
    findings = found(looking(network(odd, 12)), stuck())
    assert (Pathology.VANISHING_IN_DEPTH, "net.0") in [(f.pathology, f.where) for f in findings]
    assert "gets nothing of" in findings[0].message


def test_a_single_small_layer_has_not_vanished() -> None:
    assert found(looking(network({0: {"grad_norm": 1e-6}})), stuck()) == []


# ---- dead units ---------------------------------------------------------------------------------


def test_dead_units_beside_a_bad_loss_are_a_warning_per_layer() -> None:
    look = looking(None, relu(0.1, "a"), relu(0.8, "b"), relu(1.0, "c"))
    findings = found(look, stuck())
    assert said(findings) == [("dead_units", WARNING, "b", 50), ("dead_units", WARNING, "c", 50)]
    assert "80% are dead" in findings[0].message


def test_dead_units_beside_a_good_loss_are_noted_only_if_they_died_or_nearly_all_are() -> None:
    assert found(looking(None, relu(0.8)), learning) == []
    assert [f.severity for f in found(looking(None, relu(0.97)), learning)] == [INFO]

    def dying(step: int) -> Inspection:
        return Inspection(step, tuple(network()), (relu(0.2 if step < 60 else 0.8),))

    assert [f.severity for f in found(dying, learning)] == [INFO]


def test_a_layer_that_is_nearly_all_dead_needs_a_bad_loss_only_now() -> None:
    nearly, half = (looking(None, relu(share)) for share in (0.97, 0.8))
    steps = [
        [f.step for f in found(s, spoiled, 500) if f.severity is WARNING] for s in (nearly, half)
    ]
    assert 200 < steps[0][0] < steps[1][0]


@pytest.mark.parametrize(
    "activation",
    [relu(1.0, examples=255), relu(NAN), relu(0.0, inactive=0.95), relu(0.74)],
    ids=["too few examples", "unknown", "sparse", "below the bound"],
)
def test_activations_that_are_not_dead(activation: Any) -> None:
    assert found(looking(None, activation), stuck()) == []


def test_rows_without_gradient_count_only_where_no_activation_is_watched() -> None:
    odd = network({2: {"dead_rows": 0.8}})
    assert said(found(looking(odd), stuck())) == [("dead_units", WARNING, "net.2", 50)]
    assert found(looking(odd, relu(0.0)), stuck()) == []
    assert found(looking(odd, relu(0.0, examples=1)), stuck()) == []


def test_rows_of_unused_classes_and_experts_are_not_dead() -> None:
    assert found(looking(network({5: {"dead_rows": 0.99}})), learning) == []


def test_of_layers_without_any_gradient_the_last_one_is_to_blame() -> None:
    odd = network({i: {"dead_rows": 1.0} for i in (0, 1, 2)})
    assert said(found(looking(odd), stuck())) == [("dead_units", WARNING, "net.2", 50)]


# ---- saturation ---------------------------------------------------------------------------------


def test_saturation_says_whether_it_began_so() -> None:
    (finding,) = found(looking(None, tanh(0.6)), stuck())
    assert said([finding]) == [("saturated", WARNING, "net.act", 50)]
    assert "nearly as many as at first" in finding.message

    def saturating(step: int) -> Inspection:
        return Inspection(step, tuple(network()), (tanh(0.1 if step < 60 else 0.7),))

    (finding,) = found(saturating, stuck())
    assert finding.since == 100
    assert "up from 10% at first" in finding.message


def test_gates_saturate_by_design() -> None:
    assert found(looking(None, tanh(0.9)), learning) == []
    assert found(looking(None, tanh(0.29)), stuck()) == []


def test_saturation_that_grew_is_noted() -> None:
    def saturating(step: int) -> Inspection:
        return Inspection(step, tuple(network()), (tanh(0.1 if step < 60 else 0.7),))

    assert [f.severity for f in found(saturating, learning)] == [INFO]


# ---- updates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "side"), [(1e-7, "less"), (2.0, "more")])
def test_a_weight_far_from_the_median(ratio: float, side: str) -> None:
    look = looking(network({3: {"update_ratio": ratio}}))
    (finding,) = found(look, stuck())
    assert said([finding]) == [("update_out_of_range", WARNING, "net.3", 50)]
    assert side in finding.message
    assert [f.severity for f in found(look, learning)] == [INFO]


@pytest.mark.parametrize("ratio", [2e-6, 0.5, NAN, math.inf])
def test_a_weight_that_is_only_slower_or_not_known(ratio: float) -> None:
    assert found(looking(network({3: {"update_ratio": ratio}})), stuck()) == []


def test_biases_and_small_models_have_no_standard() -> None:
    assert found(looking([*network(), bias("a.bias", update_ratio=2.0)]), stuck()) == []
    assert found(looking(network({1: {"update_ratio": 1e-8}}, 3)), stuck()) == []


def test_updates_that_replace_the_weights_are_found_in_the_first_steps() -> None:
    look = looking(network(update_ratio=0.4))
    assert said(found(look, stuck())) == [("update_out_of_range", WARNING, "model", 32)]
    assert said(found(look, learning)) == [("update_out_of_range", INFO, "model", 32)]


def test_weights_that_grow_do_not_hide_how_fast_they_were_replaced() -> None:
    """Under Adam with a learning rate of 1 the ratio falls as the weights grow."""

    def look(step: int) -> list[ParameterReading]:
        return network(update_ratio=8.0 / (1 + step) ** 2)

    (finding,) = found(look, stuck())
    assert said([finding]) == [("update_out_of_range", WARNING, "model", 32)]
    assert "up to 8 times their size" in finding.message
    assert found(look, learning) == []
    assert found(lambda s: network(update_ratio=1.0 if s < 2 else 1e-3), stuck()) == []


def test_a_loss_that_blew_up_at_first_is_no_measure_of_the_early_level() -> None:
    """It falls from its own explosion, and is no better than the very first loss."""
    quiet = stuck()

    def loss(step: int) -> float:
        return quiet(step) * (1.0 + 1e4 * math.exp(-step / 3) * (step > 0))

    assert [f.severity for f in found(looking(None, relu(0.99)), loss)] == [WARNING]
    assert [f.severity for f in found(looking(network(update_ratio=0.4)), loss)] == [WARNING]


def test_updates_that_lead_nowhere_beside_a_stuck_loss() -> None:
    (finding,) = found(looking(network(update_ratio=1e-7)), stuck())
    assert said([finding]) == [("update_out_of_range", WARNING, "model", 100)]
    assert found(looking(network(update_ratio=1e-5)), stuck()) == []
    assert found(looking(network(update_ratio=1e-7)), learning) == []
    assert found(looking(network(update_ratio=1e-7)), spoiled, 1000) == []


def test_the_planned_length_says_how_far_small_updates_can_get() -> None:
    look = looking(network(update_ratio=5e-6))
    for planned, number in ((1000, 1), (5000, 0)):
        facts = ModelFacts(planned_steps=planned)
        assert len(found(look, stuck(), model=facts)) == number


def test_a_group_that_a_rate_of_zero_holds_still_makes_no_model_too_slow() -> None:
    still = {number: {"update_ratio": 0.0, "lr": 0.0} for number in range(4)}
    (finding,) = found(looking(network(still)), stuck())
    assert said([finding]) == [("layer_not_training", WARNING, "net.0", 50)]


def test_a_warm_up_and_the_end_of_a_schedule_are_not_too_slow() -> None:
    rising = found(lambda s: network(update_ratio=1e-9 * (s + 1), lr=1e-9 * (s + 1)), stuck(), 990)
    assert rising == []
    ending = found(lambda s: network(update_ratio=1e-3 if s < 500 else 1e-8), stuck(), 1000)
    assert ending == []


def test_a_learning_rate_of_zero_beside_a_stuck_loss_leads_nowhere() -> None:
    (finding,) = found(looking(network(update_ratio=0.0, lr=0.0)), stuck())
    assert said([finding]) == [("update_out_of_range", WARNING, "model", 100)]


# ---- underflow ----------------------------------------------------------------------------------


def test_gradients_below_the_working_precision() -> None:
    odd = {1: {"zero_share": 0.4, "tiny_share": 0.3}, 3: {"zero_share": 0.8, "tiny_share": 0.15}}
    look = looking(network(odd))
    (finding,) = found(look, stuck())
    assert said([finding]) == [("underflow", WARNING, "net.3", 50)]
    assert finding.evidence["weights_concerned"] == 2
    assert "in 2 of 6 weights" in finding.message
    assert [f.severity for f in found(look, learning)] == [INFO]


def test_a_finding_that_turns_worse_is_at_the_worst_place_by_then() -> None:
    lost = {"zero_share": 0.4, "tiny_share": 0.3}
    one, two = network({1: lost}), network({4: lost})
    findings = found(lambda s: one if s < 200 else two, spoiled, 600)
    assert [(f.severity, f.where) for f in findings] == [(INFO, "net.1"), (WARNING, "net.4")]


@pytest.mark.parametrize(
    "odd",
    [
        {"zero_share": 0.9, "tiny_share": 0.0},
        {"zero_share": 0.9, "tiny_share": 0.02},
        {"zero_share": 0.1, "tiny_share": 0.3},
        {"zero_share": 0.3, "tiny_share": 0.6, "grad_norm": 1e-36},
        {"zero_share": NAN, "tiny_share": 0.9},
    ],
    ids=["sparse", "sparse, a few tiny", "the tail of fp16", "vanished in float32", "unknown"],
)
def test_small_gradients_that_precision_is_not_to_blame_for(odd: dict[str, Any]) -> None:
    findings = found(looking(network(dict.fromkeys(range(6), odd))), stuck(), model=FP16)
    assert [f for f in findings if f.pathology is Pathology.UNDERFLOW] == []


def test_no_gradient_at_all_in_16_bit_is_a_warning_whatever_the_loss_does() -> None:
    look = looking(network(grad_norm=0.0, zero_share=1.0, update_ratio=0.0, dead_rows=1.0))
    for loss in (stuck(), learning):
        assert said(found(look, loss, model=FP16)) == [("underflow", WARNING, "model", 50)]
    assert found(look, stuck()) == []
    assert found(look, stuck(), model=ModelFacts(precision="bf16-mixed")) == []
    assert found(look, lambda _: 0.0, model=FP16) == []


# ---- all together -------------------------------------------------------------------------------


def test_three_inspections_in_the_first_steps_are_no_persistence() -> None:
    look = looking(network({3: {"update_ratio": 1e-7}}), relu(0.9), tanh(0.9), **STEEP)
    assert found(look, stuck(), 33) == []
    assert len(found(look, stuck(), 51)) == 4


@pytest.mark.parametrize("every", [5, 10, 50, 100])
def test_how_often_is_inspected_matters_little(every: int) -> None:
    findings = found(looking(None, relu(0.8)), stuck(), every=every)
    least = Thresholds().layer_span
    assert [f.severity for f in findings] == [WARNING]
    assert least <= findings[0].step <= max(least + every, 3 * every)
