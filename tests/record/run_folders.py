"""Made-up runs on disk, written as a run writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning_gradguard.cli.step_rows import last_rows
from lightning_gradguard.record import EventLog
from lightning_gradguard.record.run_history import LayerMatrix, OptimizerHistory, RunHistory
from lightning_gradguard.record.run_writer import RunWriter
from tests.record.runs import made_up_run


def write_part(writer: RunWriter, part: OptimizerHistory) -> None:
    """Hand all tables of one optimizer to a writer."""
    writer.steps(part.label, last_rows(part.steps, len(part.steps["step"])))
    for step, norms in _rows(part.layers):
        writer.layers(part.label, step, norms)
    for step, ratios in _rows(part.updates):
        writer.updates(part.label, step, ratios)
    writer.times(part.label, part.times)


def write_events(directory: Path, part: OptimizerHistory) -> None:
    """Append what was found and done to the event log in the run's ``gradguard`` directory."""
    log = EventLog(directory / "events.jsonl")
    for finding in part.findings:
        log.write("finding", {"optimizer": part.label, **replace(finding, until=None).to_dict()})
        if finding.until is not None:
            log.write("finding", {"optimizer": part.label, **finding.to_dict()})
    for action in part.actions:
        log.write("action", {"optimizer": part.label, **action.to_dict()})
    log.close()


def write_made_up_run(
    directory: Path, run: RunHistory | None = None, *, status: str = "finished"
) -> RunHistory:
    """Write a run into a log directory as if it had just happened; returns what was written.

    Args:
        directory: The log directory, in which ``gradguard`` is made.
        run: The run. Default: :func:`made_up_run`.
        status: How it ended, or ``"running"``.
    """
    run = run or made_up_run()
    run = replace(run, info=replace(run.info, status=status))
    writer = RunWriter(directory / "gradguard", run.info)
    for part in run.optimizers:
        write_part(writer, part)
        write_events(directory / "gradguard", part)
    writer.flush()
    writer.update(run.info)
    writer.close()
    return run


def _rows(matrix: LayerMatrix) -> list[tuple[int, dict[str, float]]]:
    return [
        (int(step), dict(zip(matrix.names, values, strict=True)))
        for step, values in zip(matrix.steps.tolist(), matrix.values.tolist(), strict=True)
    ]
