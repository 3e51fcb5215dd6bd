"""What recurrent modules learn to remember, and whether the measured horizon says so beforehand.

===============  ================================================================================
``tasks``        what has to be remembered, when it is solved, and which models try
``models``       recurrent modules with a head
``spans``        how far back the gradient reaches in a model
``runner``       one run
``correlation``  Spearman's rank correlation with an interval
``scoring``      from runs to rows, and to what the horizon says of them
``aims``         what was to be reached
``results``      tables and JSON; ``plot`` draws them; ``document`` writes ``docs/memory.md``
===============  ================================================================================
"""

from __future__ import annotations

from benchmarks.memory.command import add_arguments, run

__all__ = ["add_arguments", "run"]
