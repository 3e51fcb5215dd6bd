"""What is wrong with an incident, in one sentence."""

from __future__ import annotations


class IncidentError(ValueError):
    """An incident that cannot be read or replayed; the message says why and what would help."""
