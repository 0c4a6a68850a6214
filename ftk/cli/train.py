"""`ftk train`."""

from typing import Annotated, Any

import typer

from ftk.cli.options import DryRun, Json, Overrides, RunFile, Workspace, load_run, show


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
    json: Json = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; the run that is there is set aside.")] = False,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Go on from a checkpoint of other settings or other data.")
    ] = False,
) -> None:
    """Train from the cache with the denoiser alone in memory; resumes by itself from the newest checkpoint."""
    resolved = load_run(run_file, overrides, workspace)
    from ftk.train import stage

    if dry_run:
        show_plan(stage.dry_run(resolved), json)
        return
    from ftk.deliver.run_delivery import RunDelivery

    report = stage.run(resolved, RunDelivery, fresh=fresh, allow_change=allow_change)
    if report is not None:
        show("train", report, json)


def show_plan(plan: dict[str, Any], as_json: bool) -> None:
    """The plan as a table, and below it what sigmas look like."""
    sigmas = plan["sigmas"]
    show("train", plan if as_json else {name: value for name, value in plan.items() if name != "sigmas"}, as_json)
    if not as_json:
        typer.echo(sigmas)
