"""What happened to memory, disk, loggers and people."""

from __future__ import annotations

from lightning_gradguard.record.events import EventLog, read_events
from lightning_gradguard.record.history import StepRecord
from lightning_gradguard.record.recorder import Recorder
from lightning_gradguard.record.report import action_lines, format_report

__all__ = ["EventLog", "Recorder", "StepRecord", "action_lines", "format_report", "read_events"]
