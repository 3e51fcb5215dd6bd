"""A run as one HTML page that needs no network: verdict, findings, charts, tables."""

from __future__ import annotations

from lightning_gradguard.record.html_report.writer import report_html, write_report

__all__ = ["report_html", "write_report"]
