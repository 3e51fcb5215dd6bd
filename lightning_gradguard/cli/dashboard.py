"""``gradguard dashboard``: a workspace in W&B whose sections are the guard's."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from lightning_gradguard.cli.command import Command, CommandError, extra_needed, in_one_line

_NAME = "GradGuard"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--entity", required=True, help="user or team of the project in W&B")
    parser.add_argument("--project", required=True, help="the project that the runs are in")
    parser.add_argument(
        "--name", default=_NAME, help="what to call the workspace (default: %(default)s)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the workspace as JSON, and save nothing"
    )


def _run(options: argparse.Namespace) -> None:
    with extra_needed("dashboard"):
        from lightning_gradguard.record.wandb_workspace import save_workspace, workspace_json

        make = workspace_json if options.dry_run else save_workspace
        text = _made(make, options.entity, options.project, options.name)
    print(text)  # noqa: T201 - this is its output


def _made(make: Callable[[str, str, str], str], entity: str, project: str, name: str) -> str:
    try:
        return make(entity, project, name)
    except ModuleNotFoundError:
        raise
    except ValueError as error:  # says in a sentence what is wrong with a name
        raise CommandError(in_one_line(error)) from error
    except Exception as error:  # of W&B, of the network, or because nobody is logged in
        raise CommandError(
            f"the workspace cannot be saved: {type(error).__name__}: {in_one_line(error)}"
        ) from error


DASHBOARD = Command(
    name="dashboard",
    help="make a workspace in W&B: norms, time, depth, actions, findings",
    description="Make a workspace in a W&B project, with a section each for norms, time, depth, "
    "actions and findings, and print its address.",
    example="gradguard dashboard --entity my-team --project my-project",
    add_arguments=_add_arguments,
    run=_run,
)
