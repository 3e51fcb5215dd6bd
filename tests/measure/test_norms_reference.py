"""Norms of any set of gradients equal their definition in double precision."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_gradguard.measure import NormMeter, grad_norms
from tests.measure import reference

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
SHAPES = [(), (3,), (2, 3), (0,), (3, 1, 2), (5, 4)]
KINDS = ["dense", "dense", "none", "coo", "hybrid", "transposed", "conjugate"]
MODULES = ["", "head.", "encoder.rnn.", "encoder.attention.query.", "encoder.rnn_2."]


@dataclass
class Case:
    named: list[tuple[str, nn.Parameter]]
    rounds: list[list[str]]  # the kind of gradient of each parameter, backward after backward
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    # Few shapes and dtypes in a case, so that some are many of a kind and take the stacked path.
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    named: list[tuple[str, nn.Parameter]] = []
    for i in range(draw(st.integers(0, 24))):
        name = f"{draw(st.sampled_from(MODULES))}weight_{i}"
        if named and draw(st.integers(0, 5)) == 0:
            named.append((name, draw(st.sampled_from(named))[1]))
        else:
            shape, dtype = draw(st.sampled_from(shapes)), draw(st.sampled_from(dtypes))
            named.append((name, nn.Parameter(torch.zeros(shape, dtype=dtype))))
    kinds = st.lists(st.sampled_from(KINDS), min_size=len(named), max_size=len(named))
    plain = st.just(["dense"] * len(named))
    rounds = draw(st.lists(st.one_of(plain, kinds), min_size=1, max_size=3))
    return Case(named, rounds, draw(st.integers(0, 2**31)))


def gradient(parameter: Tensor, kind: str, generator: torch.Generator) -> Tensor | None:
    # Small whole numbers: their sums are exact in every dtype, also where duplicates are added.
    def whole(*shape: int) -> Tensor:
        real = torch.randint(-8, 9, shape, generator=generator).to(torch.float64)
        imaginary = torch.randint(-8, 9, shape, generator=generator).to(torch.float64)
        value = torch.complex(real, imaginary) if parameter.is_complex() else real
        return value.to(parameter.dtype)

    shape = tuple(parameter.shape)
    if kind == "none":
        return None
    if kind in ("coo", "hybrid") and len(shape) >= 1 and parameter.numel():
        sparse_dims = 1 if kind == "hybrid" else len(shape)
        entries = 7  # more than there are rows, so that some occur twice
        indices = torch.stack(
            [
                torch.randint(0, size, (entries,), generator=generator)
                for size in shape[:sparse_dims]
            ]
        )
        values = whole(entries, *shape[sparse_dims:])
        return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)
    if kind == "transposed" and len(shape) == 2:
        return whole(*shape[::-1]).T
    grad = whole(*shape)
    if grad.is_floating_point() and grad.numel() and grad.dtype is not torch.float16:
        grad *= 10.0 ** torch.randint(-15, 16, (), generator=generator).item()
    return grad.conj() if kind == "conjugate" and grad.is_complex() else grad


def fingerprint(grad: Tensor | None) -> object:
    if grad is None:
        return None
    return (
        grad.layout,
        grad.data_ptr() if grad.layout is torch.strided else None,
        str(reference.elements(grad)),
    )


# torch 2.11 warns once of its default for every sparse tensor that an operation makes.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
@given(case=cases(), depth=st.sampled_from([None, 1, 2, 3, 9]))
def test_any_set_of_gradients(case: Case, depth: int | None) -> None:
    meter = NormMeter(case.named)
    first_names = {id(p): name for name, p in reversed(case.named)}
    distinct = [(name, p) for name, p in case.named if first_names[id(p)] == name]
    assert meter.names == tuple(name for name, _ in distinct)
    generator = torch.Generator().manual_seed(case.seed)
    for kinds in case.rounds:
        for (_, parameter), kind in zip(case.named, kinds, strict=True):
            parameter.grad = gradient(parameter, kind, generator)
        before = [fingerprint(p.grad) for _, p in distinct]
        norms = meter.measure()
        assert [fingerprint(p.grad) for _, p in distinct] == before

        # Elements reach 1e16, whose squares float32 still holds.
        double = any(
            p.grad is not None and p.grad.abs().dtype == torch.float64 for _, p in distinct
        )
        assert (
            norms.values.dtype == norms.total.dtype == (torch.float64 if double else torch.float32)
        )
        assert norms.values.shape == (len(distinct),)
        assert norms.present == tuple(p.grad is not None for _, p in distinct)
        expected = reference.parameter_norms(distinct)
        assert norms.parameters == pytest.approx(expected, rel=1e-5, abs=0)
        assert norms.total.item() == pytest.approx(reference.total_norm(distinct), rel=1e-5, abs=0)
        layers = norms.layers(depth)
        assert layers == pytest.approx(reference.layer_norms(expected, depth), rel=1e-5, abs=0)
        assert list(layers) == list(reference.layer_norms(expected, depth))
        for value, present in zip(norms.values.tolist(), norms.present, strict=True):
            assert present or value == 0.0


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("layout", ["csr", "csc", "bsr"])
def test_compressed_sparse_parameters(layout: str, dtype: torch.dtype) -> None:
    def compress(dense: Tensor) -> Tensor:
        if layout == "bsr":
            return dense.to_sparse_bsr((2, 3))
        return dense.to_sparse_csr() if layout == "csr" else dense.to_sparse_csc()

    dense = torch.randn(4, 6, dtype=dtype) * (torch.rand(4, 6) < 0.5)
    weight = nn.Parameter(compress(torch.ones(4, 6, dtype=dtype)))
    weight.grad = compress(dense)
    expected = reference.norm(reference.elements(dense))
    assert grad_norms([("weight", weight)]).parameters == pytest.approx({"weight": expected})


def test_double_precision_gradients_keep_it() -> None:
    weight = nn.Parameter(torch.zeros(1000, dtype=torch.float64))
    weight.grad = torch.rand(1000, dtype=torch.float64)
    norms = grad_norms([("weight", weight)])
    expected = reference.norm(reference.elements(weight.grad))
    assert norms.total.item() == pytest.approx(expected, rel=1e-14)


class Tagger(nn.Module):
    """Embedding (sparse), recurrent, normalization, convolution and tied layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, sparse=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.rnn = nn.LSTM(8, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(10)])
        self.blocks[3].weight = self.blocks[5].weight
        self.unused = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.norm(self.rnn(x)[0])
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.scale * x


def test_a_network_after_a_real_backward() -> None:
    model = Tagger()
    meter = NormMeter(model.named_parameters())
    for _ in range(3):
        model.zero_grad()
        model(torch.randint(0, 20, (4, 6))).square().mean().backward()
        norms = meter.measure()
        named = list(model.named_parameters())
        expected = reference.parameter_norms(named)
        assert norms.parameters == pytest.approx(expected, rel=1e-5)
        assert "unused.weight" not in norms.parameters
        assert "unused" not in norms.layers()
        assert norms.layers(1) == pytest.approx(reference.layer_norms(expected, 1), rel=1e-5)
        assert norms.total.item() == pytest.approx(reference.total_norm(named), rel=1e-5)


def test_total_equals_what_torch_clips_by() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model(torch.randn(2, 5, 16)).sum().backward()
    norms = grad_norms(model)
    clipped_by = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert norms.total.item() == pytest.approx(clipped_by.item(), rel=1e-6)


def test_no_warning_in_a_measurement() -> None:
    model = Tagger()
    model(torch.randint(0, 20, (4, 6))).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grad_norms(model).layers()
