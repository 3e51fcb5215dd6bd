"""Findings and the alarms of others, judged on programs that nobody tuned anything on.

===============  ================================================================================
``records``      what a program is, what its run leaves behind, what a peer is given
``programs``     what is trained, with a fault or without; ``split`` says what was held out
``runner``       one run, watched by us and by every peer; ``features`` reads what they are given
``peers``        rule sets of others, written anew
``replay``       our findings again, from recorded observations
``judging``      a run and what every detector claimed of it
``scoring``      how good each detector was; ``statistics`` how sure that is; ``cases`` what failed
``sensitivity``  the same with every threshold halved and doubled
``results``      tables and JSON; ``plot`` draws them
===============  ================================================================================
"""

from __future__ import annotations

from benchmarks.detection.command import add_arguments, run

__all__ = ["add_arguments", "run"]
