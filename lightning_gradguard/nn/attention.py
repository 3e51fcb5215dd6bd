"""Attention over time: one context out of all states, and a short way for the gradient to each.

Shape suffixes: ``B`` batch, ``T`` time, ``H`` hidden.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_gradguard._validation import check_choice, check_number, check_type

Score = Literal["additive", "dot", "multihead"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class TemporalAttention(nn.Module):
    """Pools the states of a sequence over time into one context.

    With states h_1 … h_T and a query q, the context is c = Σ_t α_t h_t with α = softmax(e) and

        additive:  e_t = vᵀ tanh(W q + U h_t)         Bahdanau et al. 2015, "Neural machine
                                                      translation by jointly learning to align and
                                                      translate", no biases, W, U of (H, H)
        dot:       e_t = qᵀ h_t / √H                  Luong et al. 2015, "Effective approaches to
                                                      attention-based neural machine translation",
                                                      scaled as Vaswani et al. 2017; no parameters
        multihead: :class:`torch.nn.MultiheadAttention` of the query over the states, Vaswani et
                   al. 2017, "Attention is all you need"; α is the mean over the heads

    so dc/dh_t reaches a state T steps back without passing the T recurrent steps between. Padding
    has weight 0 and never changes a result, whatever it contains.

    Args:
        hidden_size: Features H of a state and of the query; of a bidirectional module both
            directions together.
        score: How the states are compared with the query, see above.
        num_heads: Heads of ``"multihead"``, 1 otherwise.
        batch_first: Whether states are ``(B, T, H)`` instead of ``(T, B, H)``.
        dropout: Probability of dropping a weight in training. Default: 0, as in
            ``torch.nn.MultiheadAttention``.
        device: Where the parameters are made.
        dtype: Type of the parameters.

    Raises:
        TypeError: If a number is none, or not an integer where one is asked for.
        ValueError: If an argument is out of range or ``hidden_size`` is not a multiple of
            ``num_heads``.

    Example:
        >>> gru, attention = nn.GRU(3, 8), TemporalAttention(8)
        >>> states, _ = gru(torch.randn(5, 2, 3))
        >>> context, weights = attention(states, lengths=torch.tensor([5, 3]))
        >>> context.shape, weights.shape
        (torch.Size([2, 8]), torch.Size([2, 5]))
        >>> weights[1, 3:].tolist()
        [0.0, 0.0]
    """

    def __init__(
        self,
        hidden_size: int,
        score: Score = "additive",
        num_heads: int = 1,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_number("hidden_size", hidden_size, at_least=1, integer=True)
        check_choice("score", score, get_args(Score))
        check_number("num_heads", num_heads, at_least=1, integer=True)
        check_number("dropout", dropout, at_least=0, at_most=1)
        if num_heads != 1 and score != "multihead":
            raise ValueError(f"num_heads must be 1 with score={score!r}, got {num_heads}")
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads={num_heads}, got {hidden_size}"
            )
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.score: Score = score
        self.batch_first, self.dropout = batch_first, dropout
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        if score == "additive":
            self.query_weight = nn.Linear(hidden_size, hidden_size, bias=False, **place)
            self.state_weight = nn.Linear(hidden_size, hidden_size, bias=False, **place)
            self.vector = nn.Linear(hidden_size, 1, bias=False, **place)
        elif score == "multihead":
            self.heads = nn.MultiheadAttention(
                hidden_size, num_heads, dropout, batch_first=True, **place
            )

    def forward(
        self,
        states: Tensor | PackedSequence,
        query: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the context and the weights of all timesteps.

        Args:
            states: ``(T, B, H)``, ``(B, T, H)`` with ``batch_first``, ``(T, H)`` for one sequence,
                or packed.
            query: ``(B, H)``, or ``(H,)`` for one sequence. Default: the last state of each
                sequence that is not padding.
            lengths: Integers of shape ``(B,)``, or ``()`` for one sequence: the timesteps from each
                on are padding. Keep them on the CPU, as ``pack_padded_sequence`` asks.
            key_padding_mask: ``True`` where a timestep is padding, shape ``(B, T)``, or ``(T,)``
                for one sequence: for padding that is not at the end.
            need_weights: Whether the weights are returned. Without, ``"multihead"`` can use faster
                kernels.

        Returns:
            Context, ``(B, H)``, and weights, ``(B, T)``, or ``None`` without ``need_weights``;
            ``(H,)`` and ``(T,)`` for one sequence. The weights are those before dropout, but for
            ``"multihead"``, which returns them after it.

        Raises:
            TypeError: If ``lengths`` are no integers or the mask is not boolean.
            ValueError: If a shape does not fit, both ``lengths`` and ``key_padding_mask`` are
                given, or one of them with packed states, or a sequence is empty.
            RuntimeError: If a sequence is empty, where it is compiled or on a GPU: there it is
                checked without making the host wait.
        """
        batched = isinstance(states, PackedSequence) or states.dim() != 2
        if isinstance(states, PackedSequence):
            if lengths is not None or key_padding_mask is not None:
                raise ValueError(
                    "TemporalAttention: expected a PackedSequence without lengths and "
                    "key_padding_mask, as it has lengths of its own"
                )
            states, lengths = pad_packed_sequence(states, batch_first=True)
            states_BTH = self._checked(states, batch_first=True)
        else:
            states_BTH = self._checked(states, batch_first=self.batch_first)
        padding_BT = _padding(states_BTH, lengths, key_padding_mask, batched=batched)
        if query is None:
            query_BH = _last(states_BTH, padding_BT)
        else:
            expected = (states_BTH.shape[0], self.hidden_size)
            _check_shape("query", query, expected if batched else expected[1:])
            query_BH = query.reshape(expected)
        if padding_BT is not None:
            # A weight of 0 would not keep NaN and infinity out of the sums.
            states_BTH = states_BTH.masked_fill(padding_BT.unsqueeze(-1), 0.0)
        context, weights = self._attend(states_BTH, query_BH, padding_BT, need_weights)
        if batched:
            return context, weights
        return context.squeeze(0), None if weights is None else weights.squeeze(0)

    def _checked(self, states: Tensor, *, batch_first: bool) -> Tensor:
        """The states as ``(B, T, H)``."""
        if states.dim() not in (2, 3):
            raise ValueError(
                "TemporalAttention: expected states to be 2-D or 3-D, "
                f"got {states.dim()}-D of shape {tuple(states.shape)}"
            )
        if states.dim() == 2:
            states_BTH, form = states.unsqueeze(0), "T"
        elif batch_first:
            states_BTH, form = states, "B, T"
        else:
            states_BTH, form = states.transpose(0, 1), "T, B"
        if states_BTH.shape[2] != self.hidden_size or states_BTH.shape[1] == 0:
            raise ValueError(
                f"TemporalAttention: expected states of shape ({form}, {self.hidden_size}) with "
                f"T >= 1, got {tuple(states.shape)}"
            )
        return states_BTH

    def _attend(
        self, states_BTH: Tensor, query_BH: Tensor, padding_BT: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self.score == "multihead":
            context_B1H, weights_B1T = self.heads(
                query_BH.unsqueeze(1),
                states_BTH,
                states_BTH,
                key_padding_mask=padding_BT,
                need_weights=need_weights,
            )
            return context_B1H.squeeze(1), weights_B1T.squeeze(1) if need_weights else None
        if self.score == "additive":
            hidden_BTH = self.query_weight(query_BH).unsqueeze(1) + self.state_weight(states_BTH)
            scores_BT = self.vector(torch.tanh(hidden_BTH)).squeeze(-1)
        else:
            # The query is scaled, not the product, which may be out of the range of float16.
            scaled_BH = query_BH / math.sqrt(self.hidden_size)
            scores_BT = torch.matmul(states_BTH, scaled_BH.unsqueeze(-1)).squeeze(-1)
        if padding_BT is not None:
            scores_BT = scores_BT.masked_fill(padding_BT, -math.inf)
        weights_BT = torch.softmax(scores_BT, dim=-1)
        kept_BT = nn.functional.dropout(weights_BT, self.dropout, self.training)
        context_BH = torch.matmul(kept_BT.unsqueeze(1), states_BTH).squeeze(1)
        return context_BH, weights_BT if need_weights else None

    def extra_repr(self) -> str:
        """Arguments of the constructor, as far as they are not the defaults."""
        heads = f", num_heads={self.num_heads}" if self.num_heads != 1 else ""
        first = ", batch_first=True" if self.batch_first else ""
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        return f"{self.hidden_size}, score={self.score!r}{heads}{first}{dropout}"


def _padding(
    states_BTH: Tensor, lengths: Tensor | None, mask: Tensor | None, *, batched: bool
) -> Tensor | None:
    """Where the states are padding, ``(B, T)``; ``None`` if nowhere."""
    batch, steps = states_BTH.shape[:2]
    if lengths is not None and mask is not None:
        raise ValueError(
            "TemporalAttention: expected lengths or key_padding_mask, got both of them"
        )
    if lengths is not None:
        check_type("lengths", lengths, Tensor, "a tensor of integers")
        _check_shape("lengths", lengths, (batch,) if batched else ())
        if lengths.dtype not in _INTEGERS:
            raise TypeError(f"lengths must be a tensor of integers, got one of {lengths.dtype}")
        lengths = lengths.long()  # the number of timesteps may be out of the range of int8
        _require(
            ((lengths >= 1) & (lengths <= steps)).all(),
            "lengths must be at least 1 and at most the number of timesteps",
            lengths,
        )
        step_T = torch.arange(steps, device=states_BTH.device)
        return step_T >= lengths.to(states_BTH.device).reshape(-1, 1)
    if mask is not None:
        check_type("key_padding_mask", mask, Tensor, "a boolean tensor")
        _check_shape("key_padding_mask", mask, (batch, steps) if batched else (steps,))
        if mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be a boolean tensor, got one of {mask.dtype}")
        message = "key_padding_mask must leave at least one timestep of each sequence"
        left_B = (~mask).sum(-1)
        _require((left_B > 0).all(), message, left_B)
        return mask.reshape(batch, steps)
    return None


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"TemporalAttention: expected {name} of shape {expected}, got {tuple(tensor.shape)}"
        )


def _require(condition: Tensor, message: str, got: Tensor) -> None:
    if condition.device.type == "cuda" or torch.compiler.is_compiling():
        torch._assert_async(condition, message)  # noqa: SLF001 - no other way without a host read
    elif not condition:
        raise ValueError(f"{message}, got {got.tolist()}")


def _last(states_BTH: Tensor, padding_BT: Tensor | None) -> Tensor:
    """The last state of each sequence that is not padding."""
    if padding_BT is None:
        return states_BTH[:, -1]
    step_T = torch.arange(states_BTH.shape[1], device=states_BTH.device)
    last_B = torch.where(padding_BT, 0, step_T).amax(dim=1)
    index = last_B.reshape(-1, 1, 1).expand(-1, 1, states_BTH.shape[2])
    return states_BTH.gather(1, index).squeeze(1)
