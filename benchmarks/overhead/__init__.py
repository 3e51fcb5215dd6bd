"""What a guard costs: time and memory of a Trainer with it over a bare one, and exact counts.

===============  =================================================================================
``workloads``    what is trained
``contenders``   what is added to the Trainer; ``peers`` holds the ones written for this benchmark
``turns``        several ``Trainer.fit`` in one process that train a few steps each in turn
``timing``       paired ratios from turns
``counting``     calls of torch operations and host reads of one step, counted
``memory``       the most memory in use at a time
``results``      table, JSON and plot
===============  =================================================================================
"""

from __future__ import annotations

from benchmarks.overhead.command import add_arguments, run

__all__ = ["add_arguments", "run"]
