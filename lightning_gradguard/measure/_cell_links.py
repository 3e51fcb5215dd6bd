"""How the calls of a cell hang together: by the states that one returns and another is given.

What a call returned is marked in the graph of the backward pass, so that it is known again after
views and copies, and forgotten with the graph.

Shape suffixes: ``B`` batch, ``H`` hidden.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lightning_gradguard.measure._cells import CellCall, CellWatch
    from lightning_gradguard.measure._watch import CallWatch

# Nodes of the graph behind a state or an input among which an earlier call is looked for.
_MOST_NODES = 256
_SAME_VALUE = frozenset({"CloneBackward0", "AliasBackward0", "ViewBackward0"})


def mark(watch: CallWatch[Any, Any], call: CellCall, which: int, state_BH: Tensor) -> None:
    """Mark a state as the one that ``call`` returned at position ``which``."""
    node: Any = state_BH.grad_fn
    if node is not None:
        # Kept by the graph, not the other way round, and found again by later calls.
        node.metadata.setdefault(watch, {})[state_BH.output_nr] = (call, which)


def is_made_of(hidden_BH: Tensor, cell_BH: Tensor) -> bool:
    """Whether h is o * tanh(c) of this very c, in the graph too."""
    nodes: list[Any] = [hidden_BH.grad_fn]
    for _ in range(2):
        nodes = [function for node in nodes if node for function, _ in node.next_functions]
    return cell_BH.grad_fn is not None and cell_BH.grad_fn in nodes


def origin_of(watch: CellWatch, states_BH: tuple[Tensor, ...]) -> tuple[CellCall | None, bool]:
    """The earlier call from which a state comes, and whether it was altered since."""
    labels = [_label(watch, state_BH) for state_BH in states_BH]
    origins = {label[0] for label in labels if label is not None}
    if len(origins) == 1 and all(
        label is not None and label[1] == which for which, label in enumerate(labels)
    ):
        return origins.pop(), False
    for state_BH in states_BH:
        origin = find_call(watch, state_BH)
        if origin is not None:
            return origin, True
    return None, False


def _label(watch: CellWatch, state_BH: Tensor) -> tuple[CellCall, int] | None:
    """The call that returned this very state, or a longer batch of it; and which of its states."""
    node: Any = state_BH.grad_fn
    output = state_BH.output_nr
    while node is not None and (node.name() in _SAME_VALUE or _shortens(node)):
        label: tuple[CellCall, int] | None = node.metadata.get(watch, {}).get(output)
        if label is not None:
            break
        node, output = node.next_functions[0]
    if node is None:
        return None
    label = node.metadata.get(watch, {}).get(output)
    return label if label is not None and label[0].generation == watch.generation else None


def _shortens(node: Any) -> bool:
    """Whether it takes the first sequences of a batch, as of those that have not ended."""
    return (
        node.name() == "SliceBackward0"
        and (node._saved_dim, node._saved_start, node._saved_step) == (0, 0, 1)  # noqa: SLF001
    )


def find_call(watch: CellWatch, tensor: Tensor, root: int | None = None) -> CellCall | None:
    """An earlier call (of the sequence that begins with ``root``) on which ``tensor`` depends."""
    nodes: deque[Any] = deque([tensor.grad_fn])
    walked: set[Any] = set()
    clean = True
    while nodes and len(walked) < _MOST_NODES:
        node = nodes.popleft()
        if node is None or node in walked or not node.next_functions:
            continue
        labels = node.metadata.get(watch)
        if labels is None:
            walked.add(node)
            nodes.extend(function for function, _ in node.next_functions)
            continue
        for call, _ in labels.values():
            if call.generation == watch.generation:
                if root is None or call.root == root:
                    return call  # type: ignore[no-any-return]
                clean = False
    if clean:  # so that what is behind many inputs is walked through once
        for node in walked:
            node.metadata[watch] = {}
    return None
