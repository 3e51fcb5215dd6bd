"""What happened to memory, disk, loggers and people."""

from __future__ import annotations

from lightning_gradguard.record.action_lines import action_lines
from lightning_gradguard.record.events import EventLog, read_events
from lightning_gradguard.record.history import StepRecord
from lightning_gradguard.record.recorder import Recorder
from lightning_gradguard.record.report import OptimizerReport, Report

__all__ = [
    "EventLog",
    "OptimizerReport",
    "Recorder",
    "Report",
    "StepRecord",
    "action_lines",
    "read_events",
]
