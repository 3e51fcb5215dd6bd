"""The programs of the detection benchmark: they build, run, and are what they say they are."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.detection import split
from benchmarks.detection.features import FeatureReader
from benchmarks.detection.programs import ALL
from benchmarks.detection.records import Alarm, Program, Setup, StepFeatures
from benchmarks.detection.runner import label, run
from benchmarks.detection.tasks import evaluating
from lightning_gradguard.diagnose import Pathology

BY_NAME = {program.name: program for program in ALL}
FAULTY = [program for program in ALL if program.faulty]


@pytest.mark.parametrize("program", ALL, ids=lambda program: program.name)
def test_every_program_runs(program: Program) -> None:
    result = run(replace(program, steps=3), seed=0)

    assert len(result.observations) == 3
    assert [observation.step for observation in result.observations] == [0, 1, 2]
    assert set(result.seconds) >= {"run", "guard", "features"}


@pytest.mark.parametrize("program", FAULTY, ids=lambda program: program.name)
def test_a_fault_has_a_cause_and_its_place_exists(program: Program) -> None:
    modules = dict(program.build(0).model.named_modules())

    assert program.causes
    assert {Pathology(cause) for cause in program.causes}
    assert set(program.layers) <= set(modules)
    assert 0 <= program.onset < program.steps


def test_names_are_unique() -> None:
    assert Counter(program.name for program in ALL).most_common(1)[0][1] == 1


def test_every_family_is_on_one_side_and_has_a_twin_and_a_fault() -> None:
    families = {program.family for program in ALL}

    assert families == split.DEVELOPMENT | split.HELD_OUT
    assert not split.DEVELOPMENT & split.HELD_OUT
    for family in families:
        assert {p.faulty for p in ALL if p.family == family} == {True, False}, family


@pytest.mark.parametrize("side", [split.development, split.held_out])
def test_every_pathology_is_the_label_of_a_program_on_each_side(side) -> None:
    labels = {program.causes[0] for program in side(ALL) if program.faulty}

    assert labels == {pathology.value for pathology in Pathology}


def test_a_family_of_no_side_is_refused() -> None:
    with pytest.raises(ValueError, match="family"):
        split.side(replace(ALL[0], family="new"))


@pytest.mark.parametrize("name", ["mlp_12_residual", "gru_targets_x1000", "gru_mean_teacher"])
def test_a_seed_decides_everything(name: str) -> None:
    first, again, other = (_losses(BY_NAME[name].build(seed), 5) for seed in (3, 3, 4))

    assert first == again
    assert first != other


@pytest.mark.parametrize("name", ["mlp_tanh", "transformer_4", "recent_3_of_60_tanh", "gru_rows"])
def test_being_watched_changes_nothing(name: str) -> None:
    setup = BY_NAME[name].build(0)
    alone = _losses(setup, 65)  # beyond the second look at the accuracy

    watched = run(replace(BY_NAME[name], steps=65), seed=0)

    assert [observation.loss for observation in watched.observations] == alone
    assert watched.score == setup.score()


def test_evaluation_leaves_modes_and_random_numbers_alone() -> None:
    setup = BY_NAME["mlp_batch_norm_in_eval"].build(0)
    before = [module.training for module in setup.model.modules()]
    state = torch.random.get_rng_state()

    with evaluating(setup.model):
        assert not any(module.training for module in setup.model.modules())
    setup.score()

    assert [module.training for module in setup.model.modules()] == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_run_that_has_become_nan_stops_early_and_has_no_score() -> None:
    result = run(BY_NAME["mlp_nan_in_batch"], seed=0)

    assert math.isnan(result.score)
    assert result.label == "failing"
    assert len(result.observations) < BY_NAME["mlp_nan_in_batch"].steps


@pytest.mark.parametrize(
    ("faulty", "score", "expected"),
    [
        (True, 0.5, "failing"),
        (True, math.nan, "failing"),
        (True, 0.9, "ambiguous"),
        (False, 0.9, "healthy"),
        (False, 0.5, "ambiguous"),
    ],
)
def test_label_is_fault_and_score_together(faulty: bool, score: float, expected: str) -> None:
    program = replace(BY_NAME["mlp_tanh"], faulty=faulty, target=0.85)

    assert label(program, score) == expected


class _Peer:
    name = "peer"

    def __init__(self) -> None:
        self.seen: list[StepFeatures] = []

    def observe(self, features: StepFeatures) -> list[Alarm]:
        self.seen.append(features)
        return [Alarm(features.step)] if features.step == 1 else []

    def finish(self) -> list[Alarm]:
        return [Alarm(len(self.seen), "late")]


def test_a_peer_sees_every_step_and_is_heard() -> None:
    peer = _Peer()

    result = run(replace(BY_NAME["mlp_tanh"], steps=61), 0, [peer])

    assert [features.step for features in peer.seen] == list(range(61))
    assert result.alarms == {"peer": [Alarm(1), Alarm(61, "late")]}
    asked = [features.step for features in peer.seen if features.accuracy is not None]
    assert asked == [0, 60]
    assert "peer" in result.seconds


def test_features_are_of_the_gradient_before_the_user_clips() -> None:
    peer = _Peer()
    result = run(replace(BY_NAME["pixels_tanh_clipped"], steps=3), 0, [peer])

    for features, observation in zip(peer.seen, result.observations, strict=True):
        total = math.sqrt(sum(tensor.grad_norm**2 for tensor in features.tensors))
        assert observation.total_norm == pytest.approx(min(total, 1.0), rel=1e-3)


def _watched(net: nn.Module, inputs: torch.Tensor) -> tuple[FeatureReader, torch.optim.SGD]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reader = FeatureReader(net, optimizer, 10)
    with reader.watching():
        net(inputs).square().sum().backward()
    return reader, optimizer


def test_tensor_features_are_what_they_say() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    inputs = torch.randn(6, 5)
    inputs[:, 0] = 0.0
    reader, optimizer = _watched(net, inputs)

    before = reader.read(0, 1.0, (inputs,), None)
    old = net[0].weight.detach().clone()
    optimizer.step()
    after = reader.read(1, 1.0, (inputs,), 0.5)

    grad = net[0].weight.grad
    assert grad is not None
    first = before.tensors[0]
    assert first.name == "0.weight"
    assert first.is_weight
    assert not before.tensors[1].is_weight
    assert first.mean_abs_grad == pytest.approx(float(grad.abs().mean()))
    assert first.median_abs_grad == pytest.approx(float(grad.abs().median()))
    assert first.max_abs_grad == pytest.approx(float(grad.abs().max()))
    assert first.grad_norm == pytest.approx(float(grad.norm()))
    assert first.zero_share == pytest.approx(float((grad == 0).float().mean()))
    assert first.zero_share > 0.19
    assert first.weight_norm == pytest.approx(float(old.norm()))
    assert first.mean_abs_weight == pytest.approx(float(old.abs().mean()))
    assert math.isnan(first.mean_abs_update)
    update = float((net[0].weight.detach() - old).abs().mean())
    assert after.tensors[0].mean_abs_update == pytest.approx(update)
    assert (after.step, after.steps, after.accuracy, after.lr) == (1, 10, 0.5, 0.1)
    assert after.inputs == pytest.approx((float(inputs.min()), float(inputs.max())))


def test_tensors_come_in_the_order_of_the_forward_pass() -> None:
    class Backward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(3, 1), nn.Linear(3, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(inputs))

    inputs = torch.randn(4, 3)
    reader, _ = _watched(Backward(), inputs)

    names = [tensor.name for tensor in reader.read(0, 1.0, (inputs,), None).tensors]
    assert names == ["first.weight", "first.bias", "last.weight", "last.bias"]


def test_frozen_tensors_are_left_out_and_nan_is_not_finite() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    inputs = torch.full((3, 2), math.nan)
    reader, optimizer = _watched(net, inputs)

    bad = reader.read(0, math.nan, (inputs,), None)
    assert [tensor.name for tensor in bad.tensors] == ["1.weight", "1.bias"]
    assert not any(tensor.finite for tensor in bad.tensors)

    optimizer.zero_grad()
    gone = reader.read(1, 1.0, (inputs,), None).tensors[0]
    assert gone.finite
    assert math.isnan(gone.grad_norm)
    assert gone.weight_norm > 0


def test_activation_features_are_what_they_say() -> None:
    net = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Sigmoid())
    inputs = 8 * torch.randn(200, 4)
    inputs[:, 0] = -1.0
    inputs.requires_grad_()
    reader = FeatureReader(net, torch.optim.SGD([inputs], lr=0.1), 10)
    with reader.watching():
        net(inputs)
    with torch.no_grad():
        net(1e9 * inputs)  # not a forward pass of training
    relu, tanh, sigmoid = reader.read(0, 1.0, (inputs,), None).activations

    values = inputs.detach()
    assert [relu.kind, tanh.kind, sigmoid.kind] == ["relu", "tanh", "sigmoid"]
    assert relu.name == "0"
    assert relu.share_not_above_zero == pytest.approx(float((values <= 0).float().mean()))
    assert relu.units_inactive == pytest.approx(0.25)
    assert relu.units_below_percentile == pytest.approx(0.25)
    assert relu.inputs_beyond_5 == pytest.approx(float((values.abs() > 5).float().mean()))
    limit = float((values.abs() > 9.4999).float().mean())
    assert relu.inputs_beyond_tanh_limit == pytest.approx(limit)
    assert math.isnan(relu.saturation)
    squashed = values.relu().tanh()
    assert tanh.saturation == pytest.approx(float(squashed.mean()))
    assert sigmoid.saturation == pytest.approx(float(2 * (squashed.sigmoid() - 0.5).abs().mean()))


def test_units_of_an_image_are_its_channels() -> None:
    net = nn.Sequential(nn.ReLU())
    images = torch.ones(3, 4, 5, 5)
    images[:, 1:] = -1.0
    reader = FeatureReader(net, torch.optim.SGD([images], lr=0.1), 10)
    with reader.watching():
        net(images)

    assert reader.read(0, 1.0, (images,), None).activations[0].units_inactive == 0.75


def test_a_closed_reader_leaves_no_hook_behind() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    reader, _ = _watched(net, torch.ones(1, 2))

    reader.close()

    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def _losses(setup: Setup, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        loss = setup.loss(setup.batch(step))
        setup.optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        if setup.before_step is not None:
            setup.before_step()
        setup.optimizer.step()
        if setup.after_step is not None:
            setup.after_step(step)
    return losses
