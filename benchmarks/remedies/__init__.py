"""What remedies are worth: programs that fail, with and without the line that should mend them.

===============  =================================================================================
``tasks``        what is learned
``models``       small nets that fail, each for one reason
``programs``     how they are trained, and where a remedy changes that
``failing``      the programs that fail
``cases``        each remedy beside the program that fails without it
``results``      table and JSON; ``plot`` draws them
``document``     ``docs/remedies.md``, written from the JSON
===============  =================================================================================

The remedies are not written again here: each is the line of code that the library gives for that
program, and it is run as it stands.
"""

from __future__ import annotations

from benchmarks.remedies.command import add_arguments, run

__all__ = ["add_arguments", "run"]
