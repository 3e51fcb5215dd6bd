"""A workspace of W&B that shows what the guard logs, section by section.

The only file that imports ``wandb_workspaces``: ``pip install 'lightning-gradguard[dashboard]'``.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from lightning_gradguard.record.wandb_record.axes import STEP
from lightning_gradguard.record.wandb_record.record import ACTIONS_TABLE, FINDINGS_TABLE, REPORT

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

# Where a run has several optimizers their name is the second part of a key. A media panel takes no
# pattern: there are those of one optimizer, and of the two of a GAN.
_LABELS = ("", "optimizer0/", "optimizer1/")
_ANY_LABEL = "(.+/)?"

_HOW_TO_READ = """\
**GradGuard** tells what is wrong with the gradients of a run, where, and what to do about it.

- **Findings**: one row each, open and severe ones first, with the remedy to try first.
- **Severity** over time: 10 is a note, 20 a warning, 30 critical, 0 healed.
- **Report**: all of it on one page, once the run has ended.
"""


def workspace(entity: str, project: str, name: str = "GradGuard") -> Workspace:
    """Build the workspace: findings, norms, time, depth, and what the guard did.

    Panels take their metrics by patterns, so that it fits any model, and runs that come later.

    Args:
        entity: User or team that the project belongs to.
        project: Project that the runs are in.
        name: What to call it. Default ``"GradGuard"``.

    Raises:
        ModuleNotFoundError: If ``wandb-workspaces`` is not installed.
        ValueError: If a name is empty, or ``name`` has an emoji, which W&B refuses.
    """
    for argument, value in (("entity", entity), ("project", project), ("name", name)):
        if not value:
            raise ValueError(f"{argument} must be a name, got {value!r}")
    ws, _ = _library()
    sections = [_findings(), _norms(), _time(), _depth(), _actions()]
    panels = [panel for section in sections for panel in section.panels]
    for number, panel in enumerate(panels):
        # Random otherwise, and there is no other way to set it: the same workspace has the same.
        panel._id = f"gradguard{number:02d}"  # noqa: SLF001
    built: Workspace = ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(
            pinned_columns=["summary:gradguard/severity", "summary:gradguard/verdict"]
        ),
    )
    return built


def workspace_json(entity: str, project: str, name: str = "GradGuard") -> str:
    """The workspace as W&B would store it; the same each time, and without a network.

    Args:
        entity: User or team that the project belongs to.
        project: Project that the runs are in.
        name: What to call it.

    Raises:
        ModuleNotFoundError: If ``wandb-workspaces`` is not installed.
        ValueError: If a name is not allowed, see :func:`workspace`.
    """
    # The library has no public name for what it sends.
    view = workspace(entity, project, name)._to_model()  # noqa: SLF001
    text: str = view.model_dump_json(by_alias=True, exclude_none=True, indent=2)
    return text


def save_workspace(entity: str, project: str, name: str = "GradGuard") -> str:
    """Save the workspace in W&B as a new view of the project.

    Args:
        entity: User or team that the project belongs to.
        project: Project that the runs are in.
        name: What to call it.

    Returns:
        Its address.

    Raises:
        ModuleNotFoundError: If ``wandb-workspaces`` is not installed.
        ValueError: If a name is not allowed, see :func:`workspace`.
        Exception: What W&B raises, as where nobody is logged in.
    """
    built: Any = workspace(entity, project, name)  # it has no annotations here
    return str(built.save().url)


def _findings() -> Any:
    ws, wr = _library()
    return ws.Section(
        name="Findings",
        is_open=True,
        pinned=True,
        panels=[
            wr.MarkdownPanel(markdown=_HOW_TO_READ),
            wr.WeavePanelSummaryTable(table_name=FINDINGS_TABLE),
            _lines("Severity of what is open", f"^gradguard/{_ANY_LABEL}found/"),
            wr.ScalarChart(
                title="Findings that are open at the end",
                metric=wr.SummaryMetric("gradguard/open_findings"),
            ),
            wr.MediaBrowser(title="Report", media_keys=[REPORT], num_columns=1),
        ],
    )


def _norms() -> Any:
    ws, _ = _library()
    return ws.Section(
        name="Gradient norms",
        is_open=True,
        panels=[
            _lines(
                "Gradient norm, before and after clipping, and threshold",
                f"^(grad_norm/{_ANY_LABEL}total(_clipped)?|gradguard/{_ANY_LABEL}clip_threshold)$",
                log_y=True,
            ),
            _lines("Loss", "(^|[/_.])[Ll]oss(_step|_epoch)?$"),
            _lines("Gradient norm of each layer", "^grad_norm/", log_y=True),
            _pictures("Layers by step", "grad_norm"),
            _histogram("Where the norm is: layers", "layers"),
        ],
    )


def _time() -> Any:
    ws, _ = _library()
    return ws.Section(
        name="Through time",
        panels=[
            _lines("Decay rate, nats per step back in time", "^grad_time/.+/decay_rate$"),
            _lines("Half-life, steps", "^grad_time/.+/half_life$", log_y=True),
            _lines("Horizon, steps", "^grad_time/.+/horizon$", log_y=True),
            _lines("Share of the last tenth of the sequence", "^grad_time/.+/recency$"),
            _pictures("Timesteps by step", "grad_time"),
            _histogram("Where the norm is: timesteps", "time/"),
        ],
    )


def _depth() -> Any:
    ws, _ = _library()
    return ws.Section(
        name="Through depth",
        panels=[
            _lines("Slope of the gradient over depth", f"^grad_depth/{_ANY_LABEL}slope$"),
            _lines("Relative update of each layer", "^update_ratio/", log_y=True),
        ],
    )


def _actions() -> Any:
    ws, wr = _library()
    return ws.Section(
        name="What the guard did",
        panels=[
            _lines("Actions so far", f"^gradguard/{_ANY_LABEL}actions/"),
            _lines("Learning rate, times", f"^gradguard/{_ANY_LABEL}lr_scale$"),
            _lines("Clip coefficient", f"^gradguard/{_ANY_LABEL}clip_coef$"),
            _lines("Tensors capped", f"^gradguard/{_ANY_LABEL}capped_tensors$"),
            _lines(
                "Skipped steps and rollbacks", f"^gradguard/{_ANY_LABEL}(skipped_steps|rollbacks)$"
            ),
            wr.WeavePanelSummaryTable(table_name=ACTIONS_TABLE),
        ],
    )


def _lines(title: str, pattern: str, *, log_y: bool | None = None) -> Any:
    # Patterns are matched by more than one engine: nothing in them that only some know.
    _, wr = _library()
    return wr.LinePlot(title=title, x=STEP, metric_regex=pattern, log_y=log_y)


def _pictures(title: str, shown: str) -> Any:
    _, wr = _library()
    keys = [f"grad_maps/{label}{shown}" for label in _LABELS]
    return wr.MediaBrowser(title=title, media_keys=keys, num_columns=1)


def _histogram(title: str, of: str) -> Any:
    return _lines(title, f"^grad_histograms/{_ANY_LABEL}{of}")


def _library() -> tuple[Any, Any]:
    """The modules of workspaces and of panels."""
    try:
        with warnings.catch_warnings():
            # It is written in the manner of pydantic 1, of which only its authors need to know.
            warnings.simplefilter("ignore", DeprecationWarning)
            import wandb_workspaces.reports.v2 as wr
            import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed; get it with: "
            "pip install 'lightning-gradguard[dashboard]'",
            name=error.name,
        ) from error
    return ws, wr
