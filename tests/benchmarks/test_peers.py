"""The re-implemented peers follow their published rules."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule

from benchmarks.overhead.peers import AdaptiveGradientClipping, AutoClip


class _Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(3, 2)
        self.head = torch.nn.Linear(2, 1)


@pytest.fixture
def model() -> _Model:
    model = _Model()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def test_agc_brings_each_unit_down_to_its_share_and_leaves_the_head_alone(model) -> None:
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    small = before["body.weight"][1] = model.body.weight.grad[1] = 1e-4 * torch.ones(3)

    AdaptiveGradientClipping().on_before_optimizer_step(None, model, None)

    row = model.body.weight.grad[0]
    torch.testing.assert_close(row.norm(), 0.01 * model.body.weight[0].norm())
    torch.testing.assert_close(
        row / row.norm(), before["body.weight"][0] / before["body.weight"][0].norm()
    )
    assert torch.equal(model.body.weight.grad[1], small)
    torch.testing.assert_close(model.body.bias.grad.norm(), 0.01 * model.body.bias.norm())
    assert torch.equal(model.head.weight.grad, before["head.weight"])


def test_autoclip_clips_to_the_percentile_of_all_norms_so_far(model) -> None:
    clip = AutoClip(percentile=50.0)
    clip.history = [1e-3, 2e-3]

    clip.on_before_optimizer_step(None, model, None)

    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert len(clip.history) == 3
    torch.testing.assert_close(norm.item(), 2e-3, rtol=1e-2, atol=0.0)
