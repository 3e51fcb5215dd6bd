"""Skip RNNs equation by equation, one sequence and one timestep at a time (Campos et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return torch.tensor(1.0 if value.item() >= 0.5 else 0.0, dtype=value.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def lstm(w: Mapping[str, Tensor], x: Tensor, state: tuple[Tensor, Tensor]):
    h, c = state
    H = h.numel()

    def gate(n):
        rows = slice(n * H, (n + 1) * H)
        total = w["weight_ih"][rows] @ x + w["weight_hh"][rows] @ h
        return total + w["bias_ih"][rows] + w["bias_hh"][rows] if "bias_ih" in w else total

    c = torch.sigmoid(gate(1)) * c + torch.sigmoid(gate(0)) * torch.tanh(gate(2))
    return torch.sigmoid(gate(3)) * torch.tanh(c), c


def gru(w: Mapping[str, Tensor], x: Tensor, state: tuple[Tensor]):
    (h,) = state
    H = h.numel()

    def halves(n):
        rows = slice(n * H, (n + 1) * H)
        from_x, from_h = w["weight_ih"][rows] @ x, w["weight_hh"][rows] @ h
        if "bias_ih" in w:
            from_x, from_h = from_x + w["bias_ih"][rows], from_h + w["bias_hh"][rows]
        return from_x, from_h

    r, z = torch.sigmoid(sum(halves(0))), torch.sigmoid(sum(halves(1)))
    from_x, from_h = halves(2)
    return ((1 - z) * torch.tanh(from_x + r * from_h) + z * h,)


@dataclass
class Twin:
    """What a Skip RNN with these weights must do.

    Attributes:
        equations: :func:`lstm` or :func:`gru`.
        weights: All parameters of the module by name.
        layers: How many.
        directions: How many.
        share_gate: As of the module.
    """

    equations: Callable
    weights: Mapping[str, Tensor]
    layers: int
    directions: int
    share_gate: bool

    def run(self, xs: Sequence[Tensor], states, probabilities: Tensor):
        """All sequences alone.

        Args:
            xs: Each ``(T_b, I)``.
            states: For each tensor of the state ``(K, B, H)``.
            probabilities: The first ũ, ``(G, B, 1)``.

        Returns:
            The output ``(T_b, …)`` and the gates ``(T_b,)`` of each sequence, and what was carried
            to the end, as it was given.
        """
        alone = [
            self._sequence(list(x), [tuple(s[k, b] for s in states) for k in range(len(states[0]))],
                           list(probabilities[:, b, 0]))
            for b, x in enumerate(xs)
        ]  # fmt: skip
        outputs, gates, ends, last = zip(*alone, strict=True)
        count = len(states)
        carried = [
            torch.stack([torch.stack([end[k][n] for end in ends]) for k in range(len(ends[0]))])
            for n in range(count)
        ]
        return outputs, gates, carried, torch.stack([torch.stack(p) for p in last], 1)[..., None]

    def _sequence(self, x, states, probabilities):
        ends, used, last = [], [], []
        groups = [range(self.layers)] if self.share_gate else [[n] for n in range(self.layers)]
        for group in groups:
            outputs = []
            for way in range(self.directions):
                parts = [layer * self.directions + way for layer in group]
                names = [f"_l{layer}" + ("_reverse" if way else "") for layer in group]
                output, u, end, p = self._scan(
                    x[::-1] if way else x, names, [states[k] for k in parts],
                    probabilities[len(used)],
                )  # fmt: skip
                outputs.append(output[::-1] if way else output)
                used.append(torch.stack(u[::-1] if way else u))
                ends += end
                last.append(p)
            x = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
        return torch.stack(x), used, ends, last

    def _scan(self, x, names, states, probability):
        outputs, used = [], []
        weights = [
            {key.removesuffix(name): w for key, w in self.weights.items() if key.endswith(name)}
            for name in names
        ]
        for below in x:
            u = _Round.apply(probability)
            used.append(u)
            news = []
            for w, old in zip(weights, states, strict=True):
                news.append(self.equations(w, below, old))
                below = news[-1][0]
            states = [
                tuple(u * s_new + (1 - u) * s_old for s_new, s_old in zip(new, old, strict=True))
                for new, old in zip(news, states, strict=True)
            ]
            read = states[-1][-1]
            logit = weights[-1]["weight_update"] @ read + weights[-1]["bias_update"]
            delta = torch.sigmoid(logit).squeeze()
            added = probability + torch.minimum(delta, 1 - probability)
            probability = u * delta + (1 - u) * added
            outputs.append(states[-1][0])
        return outputs, used, states, probability
