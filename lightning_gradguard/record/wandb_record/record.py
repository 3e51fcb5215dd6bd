"""A run of the guard, in a run of W&B."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_gradguard.diagnose import Finding, Pathology
from lightning_gradguard.record.plain_report import verdict
from lightning_gradguard.record.plain_values import plain_values
from lightning_gradguard.record.report import OptimizerReport
from lightning_gradguard.record.run_history import OptimizerHistory, RunHistory, RunInfo
from lightning_gradguard.record.wandb_record.axes import (
    STEP,
    action_key,
    define_axes,
    found_key,
)
from lightning_gradguard.record.wandb_record.media import Picture, histograms, images
from lightning_gradguard.record.wandb_record.staircase import Staircase
from lightning_gradguard.record.wandb_record.tables import (
    ACTION_COLUMNS,
    FINDING_COLUMNS,
    MAX_ROWS,
    action_rows,
    finding_rows,
    with_finding,
    worst_open,
)
from lightning_gradguard.respond.actions import Action

FINDINGS_TABLE = "gradguard/findings_table"
ACTIONS_TABLE = "gradguard/actions_table"
REPORT = "gradguard/report"


class WandbRecord:
    """Shows in W&B what the guard knows of a run, beside the metrics that its logger gets.

    Whatever W&B raises, as for a run that someone has finished in the meantime, is the caller's.

    Args:
        run: The run, what ``wandb.init()`` returns. No other is touched: there may be several.

    Example:
        >>> from types import SimpleNamespace
        >>> from lightning_gradguard.respond.actions import ActionKind
        >>> run = SimpleNamespace(log=print, summary={})  # stands in for one of W&B's
        >>> WandbRecord(run).event(7, Action(ActionKind.SKIP, 7, "Step dropped."))
        {'gradguard/actions/skip': 0.0, 'trainer/global_step': 7}
        {'gradguard/actions/skip': 1.0, 'trainer/global_step': 7}
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._staircase = Staircase(run.summary.get)
        self._findings: dict[str, list[Finding]] = {}
        self._actions: dict[str, list[Action]] = {}
        self._tables: dict[str, list[list[Any]]] = {}

    def start(self, info: RunInfo) -> None:
        """Put the guard's settings into the configuration and say how metrics are drawn.

        Args:
            info: What is known of the run. A sweep that sets ``gradguard`` itself has the last
                word on it, as W&B locks what it sets.
        """
        # A resumed run has the settings that it was started with.
        self._run.config.update(
            {"gradguard": plain_values({**info.settings, "versions": info.versions})},
            allow_val_change=True,
        )
        define_axes(self._run, [str(part["label"]) for part in info.optimizers] or [""])

    def event(self, step: int, event: Finding | Action, label: str = "", *, times: int = 1) -> None:
        """Mark what has just happened; the tables get it when the run is shown next.

        Args:
            step: The Trainer's, as the logger counts.
            event: A finding that opened or changed, or an action.
            label: Name of the optimizer.
            times: How often an action of its kind was taken since the last event.
        """
        if isinstance(event, Action):
            self._actions[label] = [*self._actions.get(label, []), event][-MAX_ROWS:]
            key = action_key(event.kind, label)
            levels = {key: self._staircase.level(key) + times}
        else:
            found = with_finding(self._findings.get(label, []), event)
            self._findings[label] = found
            levels = _levels(found, event.pathology, label)
        self._log(step, self._staircase.jump(levels))
        self._log(step, levels)

    def show(
        self,
        step: int,
        history: OptimizerHistory,
        pictures: Mapping[str, Picture] | None = None,
    ) -> None:
        """Log where the gradient is, and the tables if they have changed.

        It writes at most eight pictures of each kind, nine histograms and two tables: call it at a
        low rate.

        Args:
            step: The Trainer's, as the logger counts.
            history: Of one optimizer, up to now.
            pictures: Of it, see :func:`~lightning_gradguard.record.wandb_record.media.images`.
        """
        levels = self._take(history)
        self._log(step, self._staircase.jump(levels))
        self._log(
            step,
            {
                **levels,
                **histograms(history),
                **(images(pictures, step, history.label) if pictures else {}),
                **self._changed_tables(),
            },
        )

    def finish(self, step: int, history: RunHistory, report: Path | None = None) -> None:
        """Log the last of the tables, a verdict and the report; the run is left open.

        Args:
            step: The Trainer's last.
            history: Of the whole run.
            report: The HTML report, as a file; ``None`` if there is none.
        """
        levels: dict[str, float] = {}
        for part in history.optimizers:
            levels |= self._take(part)
        self._log(step, self._staircase.jump(levels))
        # All of them: each line goes on to the last step.
        values = {**self._staircase.levels, **self._changed_tables()}
        if report is not None:
            values[REPORT] = self._report(report)
        self._log(step, values)
        self._run.summary.update(_summary(history))

    def _take(self, history: OptimizerHistory) -> dict[str, float]:
        """Takes over what is known of one optimizer; returns the levels of its pathologies."""
        label = history.label
        known = {finding.pathology for finding in self._findings.get(label, [])}
        self._findings[label] = list(history.findings)
        self._actions[label] = list(history.actions)
        levels: dict[str, float] = {}
        for pathology in sorted(known | {finding.pathology for finding in history.findings}):
            levels |= _levels(history.findings, pathology, label)
        return levels

    def _changed_tables(self) -> dict[str, Any]:
        """The tables that have other rows than when they were logged last.

        Each is a new one, which takes the place of the last in W&B. It has to be: a table that is
        extended (W&B's mode ``"INCREMENTAL"``) keeps the rows of findings that have healed since,
        and before wandb 0.20 no table could be logged twice.
        """
        import wandb

        rows = {
            FINDINGS_TABLE: finding_rows(self._findings),
            ACTIONS_TABLE: action_rows(self._actions),
        }
        columns = {FINDINGS_TABLE: FINDING_COLUMNS, ACTIONS_TABLE: ACTION_COLUMNS}
        changed = {key: data for key, data in rows.items() if data != self._tables.get(key, [])}
        self._tables |= changed
        return {
            key: wandb.Table(columns=list(columns[key]), data=data) for key, data in changed.items()
        }

    def _report(self, report: Path) -> Any:
        """Logs the report as an artifact; returns it as a panel."""
        import wandb

        # Run ids may have characters that names of artifacts may not, and be as long as those.
        name = re.sub(r"[^\w.-]", "-", f"gradguard-report-{self._run.id}")[:128]
        artifact = wandb.Artifact(name, type="report")
        artifact.add_file(str(report), name=report.name)
        self._run.log_artifact(artifact)
        with report.open(encoding="utf-8") as page:
            # As it is: W&B would put a style sheet of its own into it, from the network.
            return wandb.Html(page, inject=False)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if values:
            self._run.log({**values, STEP: step})


def _levels(findings: Sequence[Finding], pathology: Pathology, label: str) -> dict[str, float]:
    worst = worst_open([finding for finding in findings if finding.pathology is pathology])
    return {found_key(pathology, label): float(worst or 0)}


def _summary(history: RunHistory) -> dict[str, Any]:
    """What runs can be sorted and filtered by."""
    worst = worst_open(history.findings)
    return {
        "gradguard/verdict": " ".join(_verdict(part) for part in history.optimizers),
        "gradguard/severity": worst.label if worst else "none",
        "gradguard/open_findings": sum(finding.until is None for finding in history.findings),
    }


def _verdict(part: OptimizerHistory) -> str:
    text = verdict(OptimizerReport(part.findings, part.actions, part.counts, part.label))
    return f"{part.label}: {text}" if part.label else text
