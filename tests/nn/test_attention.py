"""Attention over time against the papers' equations, one sequence and one step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_gradguard.nn.attention import TemporalAttention

SCORES = {"additive": 1, "dot": 1, "multihead": 2}
H = 4


def make(score: str, **arguments: object) -> TemporalAttention:
    """In float64, as `batch_first` where not said otherwise."""
    torch.manual_seed(0)
    arguments = {"batch_first": True, "dtype": torch.float64, **arguments}
    return TemporalAttention(H, score, SCORES[score], **arguments)


def states_of(batch: int, steps: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, steps, H, dtype=torch.float64, generator=generator)


def softmax_of(scores: list[Tensor]) -> list[Tensor]:
    total = sum(score.exp() for score in scores)
    return [score.exp() / total for score in scores]


def one_sequence(module: TemporalAttention, states: list[Tensor], query: Tensor) -> list[Tensor]:
    """Context and weights by the equations, from the states that count."""
    if module.score == "multihead":
        return one_sequence_of_heads(module.heads, states, query)
    if module.score == "additive":
        W, U, v = (p.weight for p in (module.query_weight, module.state_weight, module.vector))
        scores = [v[0] @ torch.tanh(W @ query + U @ state) for state in states]
    else:
        scores = [query @ state / math.sqrt(H) for state in states]
    weights = softmax_of(scores)
    return [sum(a * h for a, h in zip(weights, states, strict=True)), torch.stack(weights)]


def one_sequence_of_heads(
    heads: nn.MultiheadAttention, states: list[Tensor], query: Tensor
) -> list[Tensor]:
    projections = zip(heads.in_proj_weight.chunk(3), heads.in_proj_bias.chunk(3), strict=True)
    (Wq, bq), (Wk, bk), (Wv, bv) = projections
    q, keys = Wq @ query + bq, [Wk @ state + bk for state in states]
    values, size = [Wv @ state + bv for state in states], H // heads.num_heads
    contexts, every = [], []
    for head in range(heads.num_heads):
        part = slice(head * size, (head + 1) * size)
        weights = softmax_of([q[part] @ key[part] / math.sqrt(size) for key in keys])
        contexts.append(sum(a * value[part] for a, value in zip(weights, values, strict=True)))
        every.append(torch.stack(weights))
    out = heads.out_proj
    return [out.weight @ torch.cat(contexts) + out.bias, torch.stack(every).mean(0)]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


# -- the equations --------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("with_query", [True, False])
def test_each_sequence_follows_the_equations(score: str, with_query: bool) -> None:
    module, states, lengths = make(score), states_of(3, 5), [5, 1, 3]
    query = states_of(3, 1, seed=2)[:, 0] if with_query else None
    context, weights = module(states, query, lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alive = list(states[row, :length])
        own = alive[-1] if query is None else query[row]
        expected, expected_weights = one_sequence(module, alive, own)
        close(context[row], expected)
        close(weights[row, :length], expected_weights)
        assert not weights[row, length:].any()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("with_query", [True, False])
def test_gradients(score: str, with_query: bool) -> None:
    module, lengths = make(score), torch.tensor([3, 2])
    parameters = dict(module.named_parameters())

    def attend(states: Tensor, query: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(parameters, values, strict=True))
        keywords = {"lengths": lengths}
        arguments = (states, query if with_query else None)
        return torch.func.functional_call(module, given, arguments, keywords)

    inputs = (states_of(2, 3), states_of(2, 1)[:, 0].contiguous(), *parameters.values())
    inputs = tuple(value.detach().requires_grad_() for value in inputs)
    assert torch.autograd.gradcheck(attend, inputs)


def test_the_gradient_reaches_the_first_step_however_long_the_sequence() -> None:
    torch.manual_seed(0)
    rnn, attention = nn.RNN(3, 8), TemporalAttention(8)
    x = torch.randn(200, 4, 3, requires_grad=True)
    states, last = rnn(x)
    (by_last,) = torch.autograd.grad(last.sum(), x, retain_graph=True)
    (by_context,) = torch.autograd.grad(attention(states)[0].sum(), x)
    assert by_last[0].norm() < 1e-6 * by_last[-1].norm()
    assert by_context[0].norm() > 0.1 * by_context[-1].norm()


# -- padding and layouts --------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    score=st.sampled_from(list(SCORES)),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    more=st.integers(0, 3),
    junk=st.sampled_from([0.0, -7.0, 1e300, math.nan, math.inf]),
    left=st.booleans(),
)
def test_padding_never_changes_a_result(
    score: str, lengths: list[int], more: int, junk: float, left: bool
) -> None:
    module, steps = make(score), max(lengths) + more
    padded = torch.full((len(lengths), steps, H), junk, dtype=torch.float64)
    mask = torch.ones(len(lengths), steps, dtype=torch.bool)
    alone = [states_of(1, length, seed)[0] for seed, length in enumerate(lengths)]
    for row, own in enumerate(alone):
        place = slice(steps - len(own), steps) if left else slice(0, len(own))
        padded[row, place], mask[row, place] = own, False
    padded.requires_grad_()
    where = {"key_padding_mask": mask} if left else {"lengths": torch.tensor(lengths)}
    context, weights = module(padded, **where)
    context.square().sum().backward()
    for row, own in enumerate(alone):
        own.requires_grad_()
        own_context, own_weights = module(own)
        own_context.square().sum().backward()
        close(context[row], own_context)
        close(weights[row][~mask[row]], own_weights)
        close(padded.grad[row][~mask[row]], own.grad)
    assert not weights[mask].any()
    assert not padded.grad[mask].any()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_lengths_mask_and_packed_states_are_the_same(score: str, dtype: torch.dtype) -> None:
    module, states, lengths = make(score), states_of(3, 200), torch.tensor([7, 100, 2])
    packed = pack_padded_sequence(states, lengths, batch_first=True, enforce_sorted=False)
    mask = torch.arange(200) >= lengths[:, None]
    context, weights = module(states, lengths=lengths.to(dtype))
    for other_context, other_weights in (module(packed), module(states, key_padding_mask=mask)):
        close(other_context, context)
        close(other_weights, weights[:, : other_weights.shape[1]])


@pytest.mark.parametrize("score", SCORES)
def test_layouts(score: str) -> None:
    first, states, query = make(score), states_of(3, 5), states_of(3, 1)[:, 0]
    second = make(score, batch_first=False)
    context, weights = first(states, query)
    assert context.shape == (3, H)
    assert weights.shape == (3, 5)
    close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    by_time = second(states.transpose(0, 1), query)
    for actual, expected in zip(by_time, (context, weights), strict=True):
        close(actual, expected)
    short = torch.tensor([5, 3, 5])
    expected, _ = first(states, query, lengths=short)
    for module in (first, second):  # without a batch, batch_first means nothing
        actual, own_weights = module(states[1], query[1], lengths=torch.tensor(3))
        close(actual, expected[1])
        assert own_weights.shape == (5,)
        mask = torch.arange(5) >= 3
        close(module(states[1], query[1], key_padding_mask=mask)[0], expected[1])


@pytest.mark.parametrize("score", SCORES)
def test_without_weights_the_context_is_the_same(score: str) -> None:
    module, states, lengths = make(score), states_of(2, 5), torch.tensor([5, 2])
    context, weights = module(states, lengths=lengths, need_weights=False)
    assert weights is None
    close(context, module(states, lengths=lengths)[0])
    assert module(states[0], need_weights=False)[1] is None


# -- as a module ----------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_dropout_takes_weights_away_in_training_only(score: str) -> None:
    module, states = make(score, dropout=0.5), states_of(3, 6)
    torch.manual_seed(5)
    context, weights = module(states)
    torch.manual_seed(5)
    kept = nn.functional.dropout(weights, 0.5)
    assert (kept == 0).any()
    close(context, torch.einsum("bt,bth->bh", kept, states))
    close(weights, module.eval()(states)[1])
    close(module(states)[0], torch.einsum("bt,bth->bh", weights, states))


def test_dropout_reaches_the_heads() -> None:
    assert make("multihead", dropout=0.25).heads.dropout == 0.25


@pytest.mark.parametrize("score", SCORES)
def test_autocast(score: str) -> None:
    module, lengths = make(score, dtype=torch.float32), torch.tensor([5, 2])
    states = states_of(2, 5).float().requires_grad_()
    expected, _ = module(states, lengths=lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context, weights = module(states, lengths=lengths)
    context.sum().backward()
    torch.testing.assert_close(context.float(), expected, rtol=0.05, atol=0.05)
    assert not weights[1, 2:].any()
    assert all(p.grad.isfinite().all() for p in (states, *module.parameters()))
    assert not states.grad[1, 2:].any()


@pytest.mark.parametrize("score", SCORES)
def test_halves(score: str) -> None:
    module = make(score, dtype=torch.bfloat16)
    context, _ = module(states_of(2, 5).bfloat16(), lengths=torch.tensor([5, 2]))
    assert context.dtype == torch.bfloat16
    assert context.isfinite().all()


def compiled_is_the_same(module: TemporalAttention, backend: str) -> None:
    torch.compiler.reset()
    states, query = states_of(3, 5), states_of(3, 1)[:, 0]
    mask = torch.arange(5) >= torch.tensor([5, 1, 3])[:, None]
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for where in ({}, {"lengths": torch.tensor([5, 1, 3])}, {"key_padding_mask": mask}):
        results = zip(compiled(states, query, **where), module(states, query, **where), strict=True)
        for actual, expected in results:
            close(actual, expected)
    close(compiled(states)[0], module(states)[0])
    with pytest.raises(RuntimeError, match="lengths must be at least 1"):
        compiled(states, query, lengths=torch.tensor([5, 0, 3]))


@pytest.mark.parametrize("score", SCORES)
def test_compiles_in_one_graph(score: str) -> None:
    compiled_is_the_same(make(score), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORES)
def test_compiles_with_inductor(score: str) -> None:
    compiled_is_the_same(make(score), "inductor")


def test_repr_says_what_is_not_the_default() -> None:
    assert repr(TemporalAttention(4, "dot")) == "TemporalAttention(4, score='dot')"
    text = repr(TemporalAttention(4, "multihead", 2, batch_first=True, dropout=0.1))
    assert "4, score='multihead', num_heads=2, batch_first=True, dropout=0.1" in text


def test_parameters_and_placement() -> None:
    shapes = {name: tuple(p.shape) for name, p in TemporalAttention(4).named_parameters()}
    assert shapes == {
        "query_weight.weight": (4, 4),
        "state_weight.weight": (4, 4),
        "vector.weight": (1, 4),
    }
    assert not list(TemporalAttention(4, "dot").parameters())
    for score in ("additive", "multihead"):
        module = TemporalAttention(4, score, device="meta", dtype=torch.float16)
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float16)}


# -- bad arguments --------------------------------------------------------------------------------

STATES = torch.zeros(5, 2, H)  # time first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be an integer >= 1, got 0"),
        ({"score": "general"}, "score must be one of 'additive', 'dot', 'multihead'"),
        ({"num_heads": 2}, "num_heads must be 1 with score='additive', got 2"),
        ({"score": "multihead", "num_heads": 3}, "must be a multiple of num_heads=3, got 4"),
        ({"dropout": 1.5}, "dropout must be a number >= 0 and <= 1"),
    ],
)
def test_bad_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemporalAttention(**{"hidden_size": H, **arguments})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(4)), r"expected states to be 2-D or 3-D, got 1-D of shape \(4,\)"),
        (lambda m: m(torch.zeros(5, 2, 3)), r"shape \(T, B, 4\) with T >= 1, got \(5, 2, 3\)"),
        (lambda m: m(torch.zeros(5, 3)), r"shape \(T, 4\) with T >= 1, got \(5, 3\)"),
        (lambda m: m(torch.zeros(0, 2, 4)), r"T >= 1, got \(0, 2, 4\)"),
        (lambda m: m(STATES, STATES[:, 0]), r"expected query of shape \(2, 4\), got \(5, 4\)"),
        (lambda m: m(STATES[:, 0], STATES[0]), r"expected query of shape \(4,\), got \(2, 4\)"),
        (lambda m: m(STATES, lengths=torch.ones(5).long()), r"lengths of shape \(2,\), got \(5,\)"),
        (
            lambda m: m(STATES, key_padding_mask=torch.zeros(5, 2).bool()),
            r"expected key_padding_mask of shape \(2, 5\), got \(5, 2\)",
        ),
        (lambda m: m(STATES, lengths=torch.tensor([0, 5])), r"lengths must be .*, got \[0, 5\]"),
        (lambda m: m(STATES, lengths=torch.tensor([1, 6])), r"lengths must be .*, got \[1, 6\]"),
        (lambda m: m(STATES[:, 0], lengths=torch.tensor(0)), "lengths must be .*, got 0"),
        (
            lambda m: m(STATES, key_padding_mask=torch.ones(2, 5).bool()),
            r"key_padding_mask must leave at least one timestep of each sequence, got \[0, 0\]",
        ),
        (
            lambda m: m(
                STATES,
                lengths=torch.tensor([5, 5]),
                key_padding_mask=torch.zeros(2, 5, dtype=torch.bool),
            ),
            "expected lengths or key_padding_mask, got both",
        ),
        (
            lambda m: m(pack_padded_sequence(STATES, [5, 2]), lengths=torch.tensor([5, 2])),
            "expected a PackedSequence without lengths and key_padding_mask",
        ),
    ],
)
def test_bad_inputs(call: Callable[[TemporalAttention], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(TemporalAttention(H))


def test_bad_types() -> None:
    module = TemporalAttention(H)
    with pytest.raises(TypeError, match=r"tensor of integers, got one of torch\.float32"):
        module(STATES, lengths=torch.tensor([1.0, 2.0]))
    with pytest.raises(TypeError, match=r"lengths must be a tensor of integers, got \[5, 2\]"):
        module(STATES, lengths=[5, 2])
    with pytest.raises(TypeError, match=r"boolean tensor, got one of torch\.float32"):
        module(STATES, key_padding_mask=torch.zeros(2, 5))
    with pytest.raises(TypeError, match="num_heads must be an integer"):
        TemporalAttention(H, "multihead", 2.0)
