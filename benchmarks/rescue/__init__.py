"""Over which learning rates, and through which faults, a run is saved, and whether any is harmed.

===============  ================================================================================
``tasks``        what is learned; ``workloads`` by which nets, at which learning rates
``faults``       what goes wrong in the middle of a run
``contenders``   no guard, peers, and the guard; ``stable_adamw`` is one of the peers
``runner``       one run; ``jobs`` all of them, and those that are already done
``scoring``      ranges, rescues, faults, harm
``results``      tables and JSON; ``plot`` draws them; ``document`` writes ``docs/rescue.md``
===============  ================================================================================
"""

from __future__ import annotations

from benchmarks.rescue.command import add_arguments, run

__all__ = ["add_arguments", "run"]
