"""Rule sets of others, written anew from their published descriptions ("re-implementations").

Each alarm names the member of `Pathology` that is closest to the rule. A rule that keeps firing is
one alarm; after 16 quiet steps it counts anew.
"""

from __future__ import annotations

from benchmarks.detection.peers.autotrainer import AutoTrainer
from benchmarks.detection.peers.bttackler import BTTackler
from benchmarks.detection.peers.deepchecker import TheDeepChecker
from benchmarks.detection.peers.deepdiagnosis import DeepDiagnosis
from benchmarks.detection.peers.pulsegrad import PulseGrad
from benchmarks.detection.peers.sagemaker import SAVED_EVERY, SageMakerDebugger
from benchmarks.detection.peers.simple import LossDidNotFall, NaNOnly
from benchmarks.detection.peers.spikes import KillLossSpike, OLMoSkipStep, SpikeDetection, ZClip
from benchmarks.detection.records import Peer

__all__ = ["all_peers"]


def all_peers(steps: int) -> list[Peer]:
    """New peers for a run of so many steps."""
    return [
        SageMakerDebugger(),
        SageMakerDebugger(every=SAVED_EVERY),
        AutoTrainer(steps, gate=True),
        AutoTrainer(steps, gate=False),
        TheDeepChecker(steps),
        DeepDiagnosis(),
        BTTackler(),
        PulseGrad(),
        OLMoSkipStep(),
        KillLossSpike(steps),
        SpikeDetection(),
        ZClip(),
        NaNOnly(),
        LossDidNotFall(),
    ]
