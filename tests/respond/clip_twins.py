"""Every clipping strategy the slow and obvious way, and gradients to try it on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_gradguard.diagnose import RobustBaseline
from lightning_gradguard.measure import NormMeter
from lightning_gradguard.respond import ClipStrategy
from lightning_gradguard.respond.apply import FusedControls, apply_on_host
from lightning_gradguard.respond.clip_thresholds import ClipThresholds, make_thresholds
from lightning_gradguard.respond.clippers import make_clipper
from lightning_gradguard.respond.ladder import StepPlan

# Two layers, one of which has parameters in both groups, and a parameter of the root.
SHAPES = {
    "body.weight": (7, 5),
    "body.bias": (7,),
    "head.weight": (3, 2, 2),
    "head.bias": (3,),
    "scale": (),
}
GROUPS = (("body.weight", "head.weight"), ("body.bias", "head.bias", "scale"))


class Subject:
    """Parameters in two groups with gradients, in double precision.

    Args:
        sizes: Norm of each gradient; ``None`` for none at all.
        dtype: Of parameters and gradients.
        seed: Of their directions.
    """

    def __init__(
        self,
        sizes: Sequence[float | None] = (1.0,) * len(SHAPES),
        *,
        fused: bool = False,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.named: dict[str, nn.Parameter] = {}
        for (name, shape), size in zip(SHAPES.items(), sizes, strict=True):
            values = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
            parameter = nn.Parameter(values[0].to(dtype))
            if size is not None:
                parameter.grad = (values[1] * (size / values[1].norm())).to(dtype)
            self.named[name] = parameter
        groups = [{"params": [self.named[name] for name in names]} for names in GROUPS]
        self.optimizer = torch.optim.SGD(groups, lr=1.0, fused=fused)
        names = [name for group in GROUPS for name in group]
        self.meter = NormMeter((name, self.named[name]) for name in names)

    def gradients(self) -> dict[str, Tensor | None]:
        return {n: None if p.grad is None else p.grad.clone() for n, p in self.named.items()}

    def norms(self) -> dict[str, float]:
        return {n: 0.0 if g is None else g.norm().item() for n, g in self.gradients().items()}

    def total(self) -> float:
        return math.hypot(*self.norms().values())

    def segments(self, scope: str) -> list[list[str]]:
        if scope == "global":
            return [list(SHAPES)]
        if scope == "group":
            return [list(names) for names in GROUPS]
        return [["body.weight", "body.bias"], ["head.weight", "head.bias"], ["scale"]]


def plan_of(thresholds: ClipThresholds | None) -> StepPlan:
    """As the ladder makes it."""
    if thresholds is None:
        return StepPlan()
    bounds = thresholds.bounds()
    if thresholds.by_segment:
        return StepPlan(clip_segments=bounds)
    return StepPlan(clip_threshold=bounds.thresholds[0], clip_center=bounds.centers[0])


class Clipping:
    """A strategy at work on subjects, on the host or on the device as a fused optimizer wants."""

    def __init__(self, strategy: ClipStrategy, *, fused: bool = False) -> None:
        self.strategy = strategy
        self.fused = fused
        self.baseline = RobustBaseline()  # the ladder feeds it
        self.thresholds = make_thresholds(strategy, self.baseline)

    def learn(self, *norms: Sequence[float]) -> Clipping:
        """Feed norms of segments."""
        if self.thresholds is not None:
            for entry in norms:
                self.baseline.update(math.log(math.hypot(*entry)))
                self.thresholds.observe(entry)
        return self

    def __call__(self, subject: Subject, plan: StepPlan | None = None) -> float:
        """Clip the gradients; where a fused kernel would, by what it divides by."""
        clipper, segments = make_clipper(
            self.strategy, subject.optimizer, subject.meter, on_device=self.fused
        )
        if self.thresholds is not None:
            self.thresholds.follow(segments)
        plan = plan_of(self.thresholds) if plan is None else plan
        norms = subject.meter.measure()
        signal = clipper.signal(norms) if clipper is not None else None
        if not self.fused:
            seen = [] if signal is None else signal.tolist()
            parameters = subject.meter.parameters
            return apply_on_host(plan, norms.total.item(), parameters, clipper, seen)
        controls = FusedControls(subject.optimizer)
        coefficient = controls.apply(plan, norms.total, clipper, signal)
        for parameter in subject.named.values():
            if parameter.grad is not None:
                parameter.grad /= subject.optimizer.grad_scale.to(parameter.grad)
        controls.restore()
        return coefficient.item()


def assert_close(actual: Subject, expected: Subject, tolerance: float = 1e-6) -> None:
    for name, gradient in expected.gradients().items():
        found = actual.gradients()[name]
        if gradient is None:
            assert found is None
        else:
            torch.testing.assert_close(found, gradient, rtol=tolerance, atol=1e-12, msg=name)


# -- the strategies -------------------------------------------------------------------------------


def clip_norms(subject: Subject, scope: str, max_norm: float | Iterable[float]) -> None:
    """torch's own function on each segment (it adds 1e-6 to the norm)."""
    segments = subject.segments(scope)
    limits = [max_norm] * len(segments) if isinstance(max_norm, float) else list(max_norm)
    for names, limit in zip(segments, limits, strict=True):
        parameters = [subject.named[name] for name in names]
        norm = math.hypot(*(p.grad.norm().item() for p in parameters if p.grad is not None))
        if norm > limit:
            nn.utils.clip_grad_norm_(parameters, limit)


def agc(subject: Subject, scope: str, factor: float, eps: float, exclude: Iterable[str]) -> None:
    """Unit by unit, or segment by segment."""
    if scope != "unit":
        for names in subject.segments(scope):
            parameters = [subject.named[name] for name in names if name not in set(exclude)]
            weight = math.hypot(*(p.detach().norm().item() for p in parameters))
            gradients = [p.grad for p in parameters if p.grad is not None]
            scale_to(gradients, factor * max(weight, eps))
        return
    for name, parameter in subject.named.items():
        if name in set(exclude) or parameter.grad is None:
            continue
        weight, gradient = parameter.detach(), parameter.grad
        if weight.dim() <= 1:
            scale_to([gradient], factor * max(weight.norm().item(), eps))
        else:
            for row, slope in zip(weight, gradient, strict=True):
                scale_to([slope], factor * max(row.norm().item(), eps))


def scale_to(gradients: Sequence[Tensor], limit: float) -> None:
    norm = math.hypot(*(g.norm().item() for g in gradients))
    if norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / norm)


class ZClip:
    """The published algorithm without its fixed clip: what each norm is clipped to."""

    def __init__(self, z: float = 2.5, alpha: float = 0.97, warmup_steps: int = 25) -> None:
        self.z, self.alpha, self.warmup_steps = z, alpha, warmup_steps
        self.buffer: list[float] = []
        self.mean: float | None = None
        self.var = 0.0

    def step(self, norm: float) -> float:
        if self.mean is None:
            self.buffer.append(norm)
            if len(self.buffer) >= self.warmup_steps:
                self.mean = sum(self.buffer) / len(self.buffer)
                self.var = sum((x - self.mean) ** 2 for x in self.buffer) / len(self.buffer)
            return norm
        std = self.var**0.5
        z = (norm - self.mean) / std if std > 0.0 else math.copysign(math.inf, norm - self.mean)
        clipped = norm
        if z > self.z:
            clipped = self.mean + (self.z * std) / (z / self.z)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * clipped
        self.var = self.alpha * self.var + (1 - self.alpha) * (clipped - self.mean) ** 2
        return clipped
