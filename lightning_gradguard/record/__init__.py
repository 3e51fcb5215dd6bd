"""What happened to memory, disk, loggers and people."""

from __future__ import annotations

from lightning_gradguard.record.action_lines import action_lines
from lightning_gradguard.record.alert import Alert, GradientAlert
from lightning_gradguard.record.alert_channels import (
    AlertChannel,
    WandbRun,
    channels_of,
    wandb_runs,
)
from lightning_gradguard.record.alert_sender import AlertSender
from lightning_gradguard.record.events import EventLog, read_events
from lightning_gradguard.record.history import StepRecord
from lightning_gradguard.record.recorder import Recorder
from lightning_gradguard.record.report import OptimizerReport, Report

__all__ = [
    "Alert",
    "AlertChannel",
    "AlertSender",
    "EventLog",
    "GradientAlert",
    "OptimizerReport",
    "Recorder",
    "Report",
    "StepRecord",
    "WandbRun",
    "action_lines",
    "channels_of",
    "read_events",
    "wandb_runs",
]
