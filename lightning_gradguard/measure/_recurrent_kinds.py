"""What a recurrent module is, whatever its class: by the gates that it has."""

from __future__ import annotations

from torch import nn

from lightning_gradguard.nn._gates import recurrent_name

_BY_GATES = {4: "lstm", 3: "gru"}


def recurrent_kind(rnn: nn.Module) -> str:
    """``"lstm"``, ``"gru"``, the nonlinearity of an Elman RNN, or ``"other"``.

    Of modules that are not torch's own, the rows of their recurrent weights tell how many gates
    there are. No weight is read: reading a parametrized one may change it.

    Example:
        >>> from lightning_gradguard.nn import RNN, LayerNormLSTM
        >>> recurrent_kind(LayerNormLSTM(3, 4)), recurrent_kind(RNN(3, 4, nonlinearity="prelu"))
        ('lstm', 'prelu')
    """
    if isinstance(rnn, nn.LSTM | nn.LSTMCell):
        return "lstm"
    if isinstance(rnn, nn.GRU | nn.GRUCell):
        return "gru"
    nonlinearity = str(getattr(rnn, "nonlinearity", "other"))
    if isinstance(rnn, nn.RNN | nn.RNNCell):
        return nonlinearity
    own = dict(rnn.named_parameters(recurse=False))
    rows = [weight.shape[0] for name, weight in own.items() if recurrent_name(name) == "weight_hh"]
    hidden_size = getattr(rnn, "hidden_size", None)
    if not rows or not isinstance(hidden_size, int):
        return "other"
    gates = rows[0] // hidden_size
    return nonlinearity if gates == 1 else _BY_GATES.get(gates, "other")


def has_biases(rnn: nn.Module) -> bool:
    """Whether a recurrent module was made with biases, as they all are by default."""
    return bool(getattr(rnn, "bias", True))
