"""What gradients through time cost: beside a plain training step, and beside unrolled cells.

===============  =================================================================================
``models``       a recurrent module under a loss, and the same one unrolled into cells
``variants``     what a training step does beyond training
``timing``       paired ratios from turns in one thread
``trainer``      the same inside a Trainer
``memory``       the most memory in use during a step
``agreement``    whether the numbers of all ways are the same
``results``      table and JSON; ``plot`` draws them
===============  =================================================================================
"""

from __future__ import annotations

from benchmarks.timesteps.command import add_arguments, run

__all__ = ["add_arguments", "run"]
