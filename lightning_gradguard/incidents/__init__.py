"""Steps that went wrong, kept on the disk and done again: no pickle, nothing half-written."""

from __future__ import annotations

from lightning_gradguard.incidents.errors import IncidentError
from lightning_gradguard.incidents.moment import Moment
from lightning_gradguard.incidents.randomness import RandomState
from lightning_gradguard.incidents.reader import Incident, list_incidents, read_incident
from lightning_gradguard.incidents.replay import replay
from lightning_gradguard.incidents.replay_result import Replay
from lightning_gradguard.incidents.settings import Incidents
from lightning_gradguard.incidents.writer import IncidentWriter

__all__ = [
    "Incident",
    "IncidentError",
    "IncidentWriter",
    "Incidents",
    "Moment",
    "RandomState",
    "Replay",
    "list_incidents",
    "read_incident",
    "replay",
]
