"""What the recurrent modules of this package cost beside torch's fused ones of the same sizes.

===============  =================================================================================
``contenders``   every module, cells of torch in a loop, modules of others, and what each is beside
``passes``       one forward and backward pass, also as a CUDA graph and with its cell compiled
``measuring``    ratios of time and memory
``results``      tables, targets and JSON; ``plot`` draws them
===============  =================================================================================
"""

from __future__ import annotations

from benchmarks.modules.command import add_arguments, run

__all__ = ["add_arguments", "run"]
