"""Arguments that do not fit, and outputs that are not those of the module, are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_gradguard.measure import _way_back
from lightning_gradguard.measure.adjoint import ReplayError, recurrent_adjoint
from tests.measure.recurrent_cases import Case
from tests.measure.recurrent_twin import adjoint_of


@pytest.mark.parametrize("layout", ["padded", "unbatched", "packed unsorted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_wrong_output_is_refused(layout: str, dtype: torch.dtype) -> None:
    lengths = (5,) if layout == "unbatched" else (2, 5) if "packed" in layout else (5, 5)
    built = Case(layout=layout, lengths=lengths, dtype=dtype).build()
    output = built.rnn(built.input)[0]
    wrong = output._replace(data=output.data * 1.5) if "packed" in layout else output * 1.5
    adjoint_of(built, output=output)
    with pytest.raises(ReplayError):
        adjoint_of(built, output=wrong)


@pytest.mark.parametrize(
    ("dtype", "change"), [(torch.float32, 1e-3), (torch.float64, 1e-7), (torch.float64, math.nan)]
)
@pytest.mark.parametrize("elements", [2**21, 1])
def test_one_wrong_entry_of_the_output_is_noticed(
    dtype: torch.dtype, change: float, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_way_back, "_CHUNK_ELEMENTS", elements)
    built = Case(dtype=dtype, lengths=(40,) * 8, hidden_size=32).build()
    output = built.rnn(built.input)[0].detach()
    output[20, 3, 4] += change
    with pytest.raises(ReplayError):
        adjoint_of(built, output=output)


def test_weights_changed_since_the_forward_are_noticed() -> None:
    built = Case(hidden_size=20).build()
    output = built.rnn(built.input)[0]
    with torch.no_grad():
        built.rnn.weight_hh_l0.add_(0.1)
    with pytest.raises(ReplayError):
        adjoint_of(built, output=output)


def test_dropout_of_another_forward_is_noticed() -> None:
    built = Case(num_layers=2, dropout=0.5).build()
    output = built.rnn(built.input)[0]
    with pytest.raises(ReplayError):
        adjoint_of(built, output=output, rng_state=torch.get_rng_state())


LSTM, GRU = nn.LSTM(3, 5), nn.GRU(3, 5)
X, G = torch.ones(4, 2, 3), torch.ones(4, 2, 5)
STATE = torch.ones(1, 2, 5)
PACKED = pack_padded_sequence(X, torch.tensor([4, 2]))
OTHER = pack_padded_sequence(G, torch.tensor([4, 3]))
SWAPPED = pack_padded_sequence(G, torch.tensor([2, 4]), enforce_sorted=False)
TRAINED = nn.LSTM(3, 5, num_layers=2, dropout=0.5)


@pytest.mark.parametrize(
    ("rnn", "value", "hx", "options", "names"),
    [
        (nn.Linear(3, 5), X, None, {"grad_output": G}, "rnn .*Linear"),
        (nn.LSTMCell(3, 5), X, None, {"grad_output": G}, "rnn .*LSTMCell"),
        (LSTM, X, None, {}, ".*grad_output.* must be given"),
        (LSTM, X[:0], None, {"grad_output": G[:0]}, "input .*(timestep|0)"),
        (LSTM, X[0, 0], None, {"grad_output": G}, "input .*"),
        (LSTM, X[None], None, {"grad_output": G}, "input .*"),
        (LSTM, X[..., :2], None, {"grad_output": G}, "input .*3"),
        (LSTM, [X], None, {"grad_output": G}, "input .*"),
        (LSTM, X, None, {"grad_output": G[:3]}, r"grad_output .*4 .*\(3, 2, 5\)"),
        (LSTM, X, None, {"grad_output": G[..., :4]}, r"grad_output .*5 .*\(4, 2, 4\)"),
        (LSTM, X, None, {"grad_output": "g"}, "grad_output .*"),
        (LSTM, X, None, {"grad_hn": STATE[0]}, r"grad_hn .*\(1, 2, 5\)"),
        (LSTM, X, None, {"grad_cn": STATE[:, :1]}, r"grad_cn .*\(1, 2, 5\)"),
        (GRU, X, None, {"grad_cn": STATE}, "grad_cn .*"),
        (GRU, X, None, {"grad_output": G, "grad_cn": STATE}, "grad_cn .*"),
        (LSTM, X, STATE, {"grad_output": G}, "hx .*"),
        (LSTM, X, (STATE, STATE[..., :4]), {"grad_output": G}, r"hx.*\(1, 2, 5\)"),
        (GRU, X, (STATE, STATE), {"grad_output": G}, "hx .*"),
        (GRU, X, STATE[:, :1], {"grad_output": G}, r"hx .*\(1, 2, 5\)"),
        (LSTM, PACKED, None, {"grad_output": OTHER}, "grad_output .*"),
        (LSTM, PACKED, None, {"grad_output": SWAPPED}, "grad_output .*lengths"),
        (LSTM, PACKED, None, {"grad_output": G[:3]}, "grad_output .*"),
        (LSTM, X, None, {"grad_output": G, "output": G[:3]}, "output .*"),
        (TRAINED, X, None, {"grad_output": G}, "rng_state .*"),
        (TRAINED, X, None, {"grad_output": G, "rng_state": torch.ones(3)}, "rng_state .*"),
    ],
)
def test_bad_arguments_are_named(
    rnn: nn.Module, value: Any, hx: Any, options: dict[str, Any], names: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{names}") as caught:
        recurrent_adjoint(rnn, value, hx, **options)
    message = str(caught.value)
    assert message.startswith(names.split(maxsplit=1)[0].split(".", maxsplit=1)[0])
    assert "\n" not in message
    assert len(message) < 250


def test_missing_rng_state_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="rng_state"):
        recurrent_adjoint(TRAINED, X, grad_output=G)
